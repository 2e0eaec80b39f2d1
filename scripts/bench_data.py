"""How fast data are prepared, beside the ``tokenizers`` library alone, and how fast batches are made, beside training.

    python scripts/bench_data.py [--megabytes 48] [--rounds 5]

The text is the standard library's sources and made-up sentences, half of it each, in files of a folder, in random order
(the library remembers the words that it sees first: whoever read all of one kind before the other would be slower). On
one core and on two, both arms run in turns on the same documents: the library's ``encode_batch_fast`` in one call on
texts that are in memory, which is its fastest way, to the ids of each as a list; and growkit's whole way from files
that nobody has seen to an entry of the cache on the disk. Each time is a process of its own, bound to the cores. A
round is library, growkit, growkit, library; its ratio is of what both took together; the median of the rounds counts.
Beside the seconds on the wall stand those of the processor.

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
from collections.abc import Callable
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
from growkit.data.tokenizer import decoded, load_tokenizer  # noqa: E402
from growkit.schedule.stage import Stage  # noqa: E402
from growkit.train.data import prepare_data  # noqa: E402
from growkit.train.hardware import training_dtype  # noqa: E402
from growkit.train.measure import step_seconds  # noqa: E402

GOAL = 0.9  # of the library's rate
LOADER_GOAL = 50  # times the rate of training
CORES = (1, 2)
VOCABULARY = 8192
ARMS = ("library", "growkit", "growkit_again", "library_again")  # the machine's drift falls on both
KINDS = ("seconds", "cpu_seconds")  # on the wall, and of the processor
TRAINED_ON = 4_000_000  # bytes of text that the tokenizer is trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=48, help="of text (default: 48)")
    parser.add_argument("--rounds", type=int, default=5, help="of both arms, on each number of cores")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "bench_data.json")
    parser.add_argument("--on", nargs=2, help=argparse.SUPPRESS)  # of a bound process: the arm, the folder
    options = parser.parse_args()
    if options.on is not None:
        arm, folder = options.on
        print(json.dumps({"library": library, "growkit": growkit}[arm](Path(folder))))
        return
    report = {"machine": machine(), "preparation": preparation(options.megabytes, options.rounds), "loader": loader()}
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def machine() -> dict[str, Any]:
    versions = {"growkit": __version__, "tokenizers": tokenizers.__version__, "python": platform.python_version()}
    load = round(os.getloadavg()[0], 1)
    cores = len(os.sched_getaffinity(0))
    return versions | {"machine": platform.machine(), "cores": cores, "load_when_it_began": load}


def preparation(megabytes: int, rounds: int) -> dict[str, Any]:
    """Both arms on each number of cores."""
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
            found = measured(folder, cores, rounds)
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
    draw.shuffle(documents)
    folder.mkdir()
    for number, document in enumerate(documents):
        (folder / f"{number:06d}.txt").write_bytes(document)
    return documents


def measured(folder: Path, cores: int, rounds: int) -> dict[str, Any]:
    """What each arm took in each round, and the median of growkit's rate over the library's."""
    bound = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    env = os.environ | {"RAYON_NUM_THREADS": str(cores)}

    def once(arm: str) -> dict[str, float]:
        words = ("--on", arm.removesuffix("_again"), str(folder))
        command = ["taskset", "-c", bound, sys.executable, __file__, *words]
        found: dict[str, float] = json.loads(
            subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout
        )
        return found

    each = [{arm: once(arm) for arm in ARMS} for _ in range(rounds)]
    result: dict[str, Any] = {}
    for kind in KINDS:
        times = [{arm: took[kind] for arm, took in of.items()} for of in each]
        ratios = [(of["library"] + of["library_again"]) / (of["growkit"] + of["growkit_again"]) for of in times]
        result |= {f"ratio_of_{kind}": round(statistics.median(ratios), 4), kind: times}
    return result


def library(folder: Path) -> dict[str, float]:
    texts = [decoded(path.read_bytes()) for path in sorted((folder / "text").iterdir())]
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    return taken(lambda: [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)])


def growkit(folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
        data = DataConfig(source=str(folder / "text"), tokenizer=str(folder / "tokenizer"), cache=cache)
        tokenizer = load_tokenizer(data)
        return taken(lambda: load_corpus(data, tokenizer))


def taken(work: Callable[[], object]) -> dict[str, float]:
    """What ``work`` takes; what it gives is let go of later."""
    began = time.perf_counter(), time.process_time()
    made = work()
    seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    del made
    return dict(zip(KINDS, (round(second, 3) for second in seconds), strict=True))


if __name__ == "__main__":
    main()
