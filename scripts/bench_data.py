"""How fast data are prepared, beside the ``tokenizers`` library alone.

    python scripts/bench_data.py [--megabytes 20] [--rounds 3]

The text is the standard library's sources and made-up sentences, half of it each, in files of a folder. On one core and
on two, in a process bound to them, both arms run in turns on the same documents: the library's ``encode_batch_fast`` on
texts that are in memory, in one call and in calls of a few megabytes, and growkit's whole way from files that nobody
has seen to an entry of the cache on the disk, twice. A round's ratio is of the faster time of each; the median of the
rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tokenizers  # noqa: E402

from growkit import __version__  # noqa: E402
from growkit.config.recipe import DataConfig  # noqa: E402
from growkit.data.bpe import train_bpe  # noqa: E402
from growkit.data.corpus import load_corpus  # noqa: E402
from growkit.data.sources import standard_library  # noqa: E402
from growkit.data.tokenizer import decoded, groups_of, load_tokenizer  # noqa: E402

GOAL = 0.9  # of the library's rate
CORES = (1, 2)
VOCABULARY = 8192
TRAINED_ON = 4_000_000  # bytes of text that the tokenizer is trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20, help="of text")
    parser.add_argument("--rounds", type=int, default=3, help="of both arms, on each number of cores")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "bench_data.json")
    parser.add_argument("--on", type=Path, help=argparse.SUPPRESS)  # the folder that a bound process measures in
    options = parser.parse_args()
    if options.on is not None:
        print(json.dumps(measured_rounds(options.on, options.rounds)))
        return
    report = {"machine": machine(), "preparation": preparation(options.megabytes, options.rounds)}
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def machine() -> dict[str, Any]:
    versions = {"growkit": __version__, "tokenizers": tokenizers.__version__, "python": platform.python_version()}
    return versions | {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0))}


def preparation(megabytes: int, rounds: int) -> dict[str, Any]:
    """Both arms on each number of cores, each in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        documents = make_text(folder / "text", megabytes * 1_000_000)
        some, size = [], 0
        for document in random.Random(0).sample(documents, len(documents)):
            if size < TRAINED_ON:
                some.append(document)
                size += len(document)
        train_bpe(some, VOCABULARY, folder / "tokenizer")
        result: dict[str, Any] = {"goal": GOAL, "bytes": sum(map(len, documents)), "documents": len(documents)}
        result |= {"vocabulary": VOCABULARY, "cores": []}
        for cores in CORES:
            bound = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
            command = ["taskset", "-c", bound, sys.executable, __file__, "--on", place, "--rounds", str(rounds)]
            env = os.environ | {"RAYON_NUM_THREADS": str(cores)}
            done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            ratio = statistics.median(each["ratio"] for each in found)
            result["cores"].append({"cores": cores, "ratio": ratio, "met": ratio >= GOAL, "rounds": found})
            print(json.dumps(result["cores"][-1], indent=1), flush=True)
    return result


def make_text(folder: Path, size: int) -> list[bytes]:
    """Writes the documents as files; returns them."""
    documents = [document.text for document in standard_library(DataConfig()) if document.text]
    while sum(map(len, documents)) > size / 2:
        documents.pop()
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["".join(draw.choices(letters, range(26, 0, -1), k=draw.randint(1, 10))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]  # Zipf's law
    left = size - sum(map(len, documents))
    while left > 0:
        sentences = []
        for _ in range(draw.randint(5, 200)):
            chosen = draw.choices(words, weights, k=draw.randint(3, 25))
            sentences.append(" ".join(chosen).capitalize() + draw.choice(".?!") + draw.choice(" \n"))
        documents.append("".join(sentences).encode())
        left -= len(documents[-1])
    folder.mkdir()
    for number, document in enumerate(documents):
        (folder / f"{number:06d}.txt").write_bytes(document)
    return documents


def measured_rounds(folder: Path, rounds: int) -> list[dict[str, float]]:
    """Seconds of both arms in turns, and how fast the second is beside the first. Each time with a tokenizer that has
    seen nothing."""
    documents = [path.read_bytes() for path in sorted((folder / "text").iterdir())]
    texts = [decoded(document) for document in documents]
    groups = [[decoded(document) for document in group] for group in groups_of(documents)]
    name = str(folder / "tokenizer")

    def library(batches: list[list[str]]) -> float:
        fast = tokenizers.Tokenizer.from_file(f"{name}/tokenizer.json")
        began = time.perf_counter()
        for batch in batches:
            fast.encode_batch_fast(batch, add_special_tokens=False)
        return time.perf_counter() - began

    def growkit() -> float:
        tokenizer = load_tokenizer(DataConfig(tokenizer=name))
        with tempfile.TemporaryDirectory() as cache:
            data = DataConfig(source=str(folder / "text"), tokenizer=name, cache=cache)
            began = time.perf_counter()
            load_corpus(data, tokenizer)
            return time.perf_counter() - began

    results = []
    for _ in range(rounds):
        alone, ours = zip((library([texts]), growkit()), (library(groups), growkit()), strict=True)
        found = {"library_at_once": alone[0], "library_in_groups": alone[1], "growkit": ours[0], "again": ours[1]}
        results.append({key: round(value, 4) for key, value in (found | {"ratio": min(alone) / min(ours)}).items()})
    return results


if __name__ == "__main__":
    main()
