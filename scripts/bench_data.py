"""How fast data are prepared, beside the ``tokenizers`` library alone, and how fast batches are made, beside training.

    python scripts/bench_data.py [--megabytes 12] [--rounds 5]

The text is the standard library's sources and made-up sentences, half of it each, in files of a folder. On one core and
on two, in a process bound to them, both arms run in turns on the same documents: the library's ``encode_batch_fast`` on
texts that are in memory, in one call and in calls of a few megabytes, and growkit's whole way from files that nobody
has seen to an entry of the cache on the disk, twice. A round's ratio is of what both ways took together; the median of
the rounds counts. Beside the seconds on the wall stand those of the processor.

Batches are those of the quickstart's stages, on its own text, as each kind of packing has them; the rate of training is
that of the optimizer step on the same machine, in the same process, measured between two rounds of the batches.
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
from growkit.cli.recipes import read  # noqa: E402
from growkit.config.recipe import DataConfig  # noqa: E402
from growkit.data.bpe import train_bpe  # noqa: E402
from growkit.data.corpus import load_corpus  # noqa: E402
from growkit.data.sources import standard_library  # noqa: E402
from growkit.data.stream import Batches, DataSource  # noqa: E402
from growkit.data.tokenizer import decoded, groups_of, load_tokenizer  # noqa: E402
from growkit.schedule.stage import Stage  # noqa: E402
from growkit.train.data import prepare_data  # noqa: E402
from growkit.train.hardware import training_dtype  # noqa: E402
from growkit.train.measure import step_seconds  # noqa: E402

GOAL = 0.9  # of the library's rate
LOADER_GOAL = 50  # times the rate of training
CORES = (1, 2)
VOCABULARY = 8192
ARMS = ("library_at_once", "growkit", "growkit_again", "library_in_groups")  # the machine's drift falls on both
Times = tuple[float, float]  # seconds on the wall, and of the processor
TRAINED_ON = 4_000_000  # bytes of text that the tokenizer is trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=12, help="of text")
    parser.add_argument("--rounds", type=int, default=5, help="of both arms, on each number of cores")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "bench_data.json")
    parser.add_argument("--on", type=Path, help=argparse.SUPPRESS)  # the folder that a bound process measures in
    options = parser.parse_args()
    if options.on is not None:
        print(json.dumps(measured(options.on, options.rounds)))
        return
    report = {"machine": machine(), "preparation": preparation(options.megabytes, options.rounds), "loader": loader()}
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def machine() -> dict[str, Any]:
    versions = {"growkit": __version__, "tokenizers": tokenizers.__version__, "python": platform.python_version()}
    load = round(os.getloadavg()[0], 1)
    cores = len(os.sched_getaffinity(0))
    return versions | {"machine": platform.machine(), "cores": cores, "load_when_it_began": load}


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
            result["cores"].append({"cores": cores, "met": found["ratio_of_seconds"] >= GOAL} | found)
            print(json.dumps(result["cores"][-1], indent=1), flush=True)
    return result


def loader() -> dict[str, Any]:
    """Tokens per second of batches alone, over those of training, in each stage of the quickstart."""
    result: dict[str, Any] = {"goal": LOADER_GOAL, "recipe": "quickstart", "kinds": []}
    texts = "[{source: stdlib, pattern: 'a*/**/*.py'}, {source: stdlib, pattern: 'e*/**/*.py'}]"
    kinds = {packing: [f"data.packing={packing}"] for packing in ("none", "documents", "best_fit")}
    kinds["mixture"] = [f"data.mixture={texts}"]
    for kind, overrides in kinds.items():
        recipe, schedule = read("quickstart", [*overrides, "trainer.accelerator=cpu"])
        source = prepare_data(recipe, schedule).source(recipe, schedule)
        dtype = training_dtype(recipe.trainer)
        for stage in schedule.stages:
            before = batch_rate(source, stage)
            training = stage.global_batch_tokens / step_seconds(recipe, stage, "cpu", dtype)
            rate = statistics.mean((before, batch_rate(source, stage)))
            row = {"kind": kind, "stage": stage.name, "parameters": stage.model.num_params()}
            row |= {"tokens_per_second": round(rate), "training_tokens_per_second": round(training)}
            result["kinds"].append(row | {"ratio": round(rate / training), "met": rate >= LOADER_GOAL * training})
            print(json.dumps(result["kinds"][-1]), flush=True)
    return result


def batch_rate(source: DataSource, stage: Stage) -> float:
    """Tokens per second."""
    batches = iter(Batches(source, source.begin(), stage.shape, accumulate=stage.accumulate))
    for _ in range(20):
        next(batches)
    began, tokens = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < 2:
        tokens += next(batches).tokens.numel()
    return tokens / seconds


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


def measured(folder: Path, rounds: int) -> dict[str, Any]:
    """What each arm took in each round, each time with a tokenizer that has seen nothing; and the second's rate over
    the first's."""
    documents = [path.read_bytes() for path in sorted((folder / "text").iterdir())]
    at_once = [[decoded(document) for document in documents]]
    in_groups = [[decoded(document) for document in group] for group in groups_of(documents)]
    name = str(folder / "tokenizer")

    def library(batches: list[list[str]]) -> Times:
        fast = tokenizers.Tokenizer.from_file(f"{name}/tokenizer.json")
        began = time.perf_counter(), time.process_time()
        for batch in batches:
            fast.encode_batch_fast(batch, add_special_tokens=False)
        return time.perf_counter() - began[0], time.process_time() - began[1]

    def growkit() -> Times:
        tokenizer = load_tokenizer(DataConfig(tokenizer=name))
        with tempfile.TemporaryDirectory() as cache:
            data = DataConfig(source=str(folder / "text"), tokenizer=name, cache=cache)
            began = time.perf_counter(), time.process_time()
            load_corpus(data, tokenizer)
            return time.perf_counter() - began[0], time.process_time() - began[1]

    each = [(library(at_once), growkit(), growkit(), library(in_groups)) for _ in range(rounds)]
    result: dict[str, Any] = {}
    for place, kind in enumerate(("seconds", "cpu_seconds")):
        times = [[round(took[place], 3) for took in of] for of in each]
        ratios = [(at_once + in_groups) / (first + second) for at_once, first, second, in_groups in times]
        result[f"ratio_of_{kind}"] = round(statistics.median(ratios), 4)
        result[kind] = [dict(zip(ARMS, of, strict=True)) for of in times]
    return result


if __name__ == "__main__":
    main()
