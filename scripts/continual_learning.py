"""What a model forgets of one text while it learns another, by what is added and what is frozen.

    python scripts/continual_learning.py [--seeds 3]

A small TokenFormer trains on Python code (the standard library, without its manual). Then it goes on with English (the
manual, pydoc_data/topics.py), in four ways: as it is; with a bank of parameter tokens in each projection and everything
training; with the old banks frozen; with everything old frozen. Every model is scored on text held out of both, and on
the code once more with the new banks left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import typer  # noqa: E402

from growkit.cli.main import app  # noqa: E402
from growkit.config.recipe import DataConfig, TrainerConfig  # noqa: E402
from growkit.data.corpus import standard_library  # noqa: E402
from growkit.train import hardware  # noqa: E402

MANUAL = "pydoc_data"
CODE_BYTES, HELD_OUT, CONTEXT = 4_000_000, 60_000, 128
QUIET = {"ngram_order": 0, "sample_tokens": 0, "progress": "off", "validation_tokens": 2048, "probe_tokens": 512}
# What each way changes in the stage of recipes/second-text.yaml.
NO_GROWTH, ALL_TRAINS = "stages.0.grow={}", "stages.0.freeze=[]"
WAYS: dict[str, tuple[str, ...]] = {
    "no growth, everything trains": (NO_GROWTH, ALL_TRAINS),
    "new banks, everything trains": (ALL_TRAINS,),
    "new banks, old banks frozen": ("stages.0.freeze=[old_banks]",),
    "new banks, everything old frozen": (),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", default="800 steps", help="on code")
    parser.add_argument("--second", default="400 steps", help="on English")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "continual_learning.json")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        texts = write_texts(folder)
        for seed in range(options.seeds):
            for way, scores in one_seed(folder, texts, seed, options).items():
                runs.setdefault(way, []).append(scores)
                print(seed, way, scores, flush=True)
    rows = {way: {key: spread([run[key] for run in of]) for key in of[0]} for way, of in runs.items()}
    machine = hardware.environment("cpu", hardware.training_dtype(TrainerConfig(precision="fp32")), 1)
    scale = {"first": options.first, "second": options.second, "seeds": options.seeds}
    scale |= {"step_tokens": 1024, "cores": os.cpu_count(), "machine": machine}
    options.output.write_text(json.dumps(scale | {"bits_per_byte": rows}, indent=1) + "\n")
    print(table(rows))


def write_texts(folder: Path) -> dict[str, Path]:
    """Code and English, each with a part that nothing trains on."""
    parts: dict[str, list[bytes]] = {"code": [], "english": []}
    for document in standard_library(DataConfig()):
        parts["english" if document.group == MANUAL else "code"].append(document.text)
    texts = {name: b"\n".join(of) for name, of in parts.items()}
    texts["code"] = texts["code"][:CODE_BYTES]
    paths = {}
    for name, text in texts.items():
        for part, piece in ((name, text[:-HELD_OUT]), (f"{name} held out", text[-HELD_OUT:])):
            paths[part] = folder / f"{part.replace(' ', '-')}.txt"
            paths[part].write_bytes(piece)
    return paths


def one_seed(
    folder: Path, texts: dict[str, Path], seed: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    runs = folder / f"runs-{seed}"
    common = (f"run.folder={runs}", f"run.seed={seed}")
    quiet = [f"monitor.{key}={value}" for key, value in (QUIET | {"peak_flops_per_second": 1e12}).items()]
    first = ("trainer.precision=fp32", f"data.source={texts['code']}", f"stages.0.duration={options.first}", *quiet)
    growkit("train", "first-text", "run.name=base", *first, *common)
    base = runs / "base"
    found = {"code alone": scores(base, texts, new_banks=False)}
    for number, (way, changes) in enumerate(WAYS.items()):
        second = (f"data.source={texts['english']}", f"stages.0.duration={options.second}", *changes)
        growkit("extend", base, "second-text", f"run.name={number}", *second, *common)
        found[way] = scores(runs / str(number), texts, new_banks=NO_GROWTH not in changes)
    return found


def scores(run: Path, texts: dict[str, Path], *, new_banks: bool) -> dict[str, float]:
    found = {name: score(run, texts[f"{name} held out"]) for name in ("code", "english")}
    again = score(run, texts["code held out"], "--banks", 1) if new_banks else found["code"]
    return found | {"code, new banks left out": again}


def score(run: Path, text: Path, *words: object) -> float:
    said = growkit("eval", run, "--data", text, "--context", CONTEXT, "--tokens", HELD_OUT, "--json", *words)
    return float(json.loads(said)["bits_per_byte"])


def growkit(*words: object) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status: Any = typer.main.get_command(app).main([str(word) for word in words], standalone_mode=False)
    assert not status, (words, status)
    return out.getvalue()


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": round(statistics.fmean(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = ["| | code | English | code, new banks left out |", "|---|---|---|---|"]
    for way, row in rows.items():
        lines.append(f"| {way} | " + " | ".join(f"{of['mean']:.3f}" for of in row.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
