"""How far apart AltUp's blocks are after 300 steps, from every start and lift there is, on the quickstart's data.

    python scripts/stream_distances.py [--steps 300] [--only push] [--jobs 2] [--threads 1]

The model of recipes/altup.yaml, trained for a while, grows to more blocks by every method (docs/operators/altup.md) and
trains on, each time through `growkit train`. ``distance`` is the smallest ‖x_i − x_j‖ of two blocks at the end of the
stack, over the mean of their norms (growkit/train/blocks.py); of tied blocks, with which K is really less, it is
rounding. Writes docs/results/stream_distances.json and prints the table of docs/operators/altup.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from growkit.checkpoint.metrics_log import read_log
from growkit.cli.recipes import built_in
from growkit.train import hardware
from scripts.synthetic_tasks import ROOT, growkit

RESULTS = ROOT / "docs" / "results" / "stream_distances.json"
BEFORE = 100  # steps before growth
LEAST = 0.05  # of what counts as apart

# (blocks before, blocks after, method, what else is said): of the model before, of the growth
GROWTHS: list[tuple[int, int, str, dict[str, Any]]] = [
    *((1, to, method, {}) for to in (2, 4) for method in ("pull", "push", "same", "copies", "round_robin")),
    (1, 4, "copies", {"altup_order": "free"}),
    (1, 4, "copies", {"altup_coefficients": "routed"}),
    (1, 4, "pull", {"altup_variant": "full"}),
    (2, 4, "clone", {}),
    (2, 4, "passive", {}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="after growth (default: 300)")
    methods = tuple(dict.fromkeys(method for _, _, method, _ in GROWTHS))
    parser.add_argument("--only", nargs="+", choices=methods, default=methods, help="methods (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, each (default: 1)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        wanted = [growth for growth in GROWTHS if growth[2] in options.only]
        rows = [job.result() for job in [pool.submit(one, Path(folder), options, *growth) for growth in wanted]]
    if len(wanted) < len(GROWTHS):
        rows += [row for row in json.loads(RESULTS.read_text())["rows"] if row["method"] not in options.only]
    rows.sort(key=lambda row: GROWTHS.index((row["before"], row["after"], row["method"], row["more"])))
    machine = hardware.environment("cpu", torch.float32, 1) | {"cores": os.cpu_count(), "threads": options.threads}
    report = {"steps": options.steps, "steps_before": BEFORE, "machine": machine, "rows": rows}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    if close := [row for row in rows if row["distance"] < LEAST]:
        raise SystemExit(f"closer than {LEAST}: {close}")


def one(
    folder: Path, options: argparse.Namespace, before: int, after: int, method: str, more: dict[str, Any]
) -> dict[str, Any]:
    """Trains, grows, trains on; gives what the last validation says of the blocks."""
    name = "-".join(map(str, (before, after, method, *more.values())))
    recipe = OmegaConf.to_container(OmegaConf.load(built_in()["altup"]))
    assert isinstance(recipe, dict)
    recipe["model"]["altup_blocks"] = before
    first, second, _ = recipe["stages"]
    first |= {"duration": f"{BEFORE} steps", "global_batch_tokens": 1024}
    second |= {
        "duration": f"{options.steps} steps",
        "grow": {"altup_blocks": after, **more},
        "methods": {"altup": method},
    }
    recipe["stages"] = [first, second]
    recipe["run"] = {"folder": str(folder), "name": name, "threads": options.threads, "seed": 0}
    recipe["monitor"] = {"progress": "off"}
    OmegaConf.save(recipe, written := folder / f"{name}.yaml")
    growkit("train", written)
    log = list(read_log(folder / name / "metrics.jsonl"))
    blocks = [record for record in log if record["kind"] == "blocks"]
    validation = [record for record in log if record["kind"] == "validation"][-1]
    row = {"before": before, "after": after, "method": method, "more": more, "step": validation["step"]}
    return row | {
        "distance": blocks[-1]["distance"],
        "new_block_grad_share": blocks[-1]["new_block_grad_share"],
        "bits_per_byte": validation["bits_per_byte"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | K | | least distance | gradient in what is new |", "|---|---|---|---|---|"]
    for row in rows:
        share = "" if row["new_block_grad_share"] is None else f"{row['new_block_grad_share']:.1%}"
        said = ", ".join(str(value) for value in row["more"].values())
        cells = [f"`{row['method']}`", f"{row['before']} → {row['after']}", said, f"{row['distance']:.2f}", share]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
