"""How often torch.compile compiles a run with a curriculum, and whether a resumed one is the same bits.

    python scripts/check_compilations.py

A small transformer trains through six lengths, then through buckets that change at every step, with validations
between, under the real compiler (Inductor). PyTorch's own counter says how many graphs were made. Then a branch goes on
from a checkpoint within the first curriculum, in this process, after all that was compiled before.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from growkit.checkpoint.metrics_log import read_log  # noqa: E402
from growkit.checkpoint.run_folder import RunFolder  # noqa: E402
from growkit.cli.recipes import read  # noqa: E402
from growkit.cli.training import go_on, start  # noqa: E402
from growkit.config.recipe import TrainerConfig  # noqa: E402
from growkit.train import hardware  # noqa: E402

STEP = 7  # of the checkpoint that the branch goes on from, within a length
RECIPE: dict[str, Any] = {
    "model": {"preset": "transformer", "embed_dim": 32, "num_layers": 1, "num_heads": 2},
    "trainer": {"compile": True, "most_graphs": 8, "precision": "fp32", "save_every": "1 steps", "keep_last": 40},
    "monitor": {"log_every": 1, "validation_tokens": 2048, "ngram_order": 0, "sample_tokens": 0, "progress": "off"},
    "stages": [
        {
            "name": "growing",
            "duration": "16 steps",
            "context_length": 128,
            "context": {"schedule": "linear", "start": 16, "over": "75%"},
            "global_batch_tokens": 1024,
            "micro_batch_size": 4,
            "validate_every": "4 steps",
        },
        {
            "name": "mixed",
            "duration": "14 steps",
            "context": {"schedule": "buckets", "start": 64, "odds": [2, 1]},
        },
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "compilations.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = folder / "text.txt"
        text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(20_000)))
        recipe = folder / "recipe.yaml"
        run, data = {"folder": str(folder), "name": "whole", "threads": 1}, {"source": str(text)}
        recipe.write_text(yaml.safe_dump(RECIPE | {"run": run, "data": data}))
        _, schedule = read(str(recipe), [])
        torch._dynamo.utils.counters.clear()
        assert start(str(recipe), []) == 0
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        lengths = [len(stage.lengths.values) for stage in schedule.stages]
        assert graphs == sum(lengths), f"{graphs} graphs for {lengths} lengths"
        go_on(folder / "whole", STEP, folder / "branch")
        same = outcome(folder / "whole") == outcome(folder / "branch")
        assert same, "the resumed run is another one"
    found = {
        "lengths": lengths,
        "graphs": graphs,
        "steps": sum(stage.steps for stage in schedule.stages),
        "resumed_from_step": STEP,
        "resumed_is_bitwise_the_same": same,
        "cores": os.cpu_count(),
        "machine": hardware.environment("cpu", hardware.training_dtype(TrainerConfig(precision="fp32")), 1),
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


def outcome(run: Path) -> tuple[list[float], dict[str, bytes]]:
    """The loss of every step, and the bits of the last checkpoint's parameters."""
    losses = [record["loss"] for record in read_log(run / "metrics.jsonl") if record["kind"] == "step"]
    params = RunFolder.open(run).load().state.params
    return losses, {name: tensor.numpy().tobytes() for name, tensor in params.items()}


if __name__ == "__main__":
    main()
