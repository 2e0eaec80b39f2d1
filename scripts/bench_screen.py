"""How fast data.screen reads, and what it remembers: each screen alone, on documents of random words.

    python scripts/bench_screen.py [--documents 5000] [--words 400]

Prints for each screen the bytes it reads in a second of processor time, and the memory it holds for a document that is
kept, as tracemalloc counts it in a second pass over a thousand of them.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import tracemalloc
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from growkit.config.recipe import ScreenConfig  # noqa: E402
from growkit.data.corpus import Document  # noqa: E402
from growkit.data.screen import ScreenReport, screen  # noqa: E402

SCREENS = {
    "`languages`": ScreenConfig(languages=["en", "und"]),
    "`deduplicate: exact`": ScreenConfig(deduplicate="exact"),
    "`deduplicate: near`": ScreenConfig(deduplicate="near"),
    "`deduplicate: near`, 512 permutations": ScreenConfig(deduplicate="near", permutations=512),
}


def made_up(count: int, words: int) -> list[Document]:
    """Documents that are like none of the others, of a vocabulary of 20,000 words."""
    draw = random.Random(0)
    letters = "etaoinshrdlu"
    vocabulary = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(20_000)]
    return [Document(f"{i}.txt", " ".join(draw.choices(vocabulary, k=words)).encode()) for i in range(count)]


def seconds(documents: list[Document], config: ScreenConfig) -> float:
    """Of the processor, for the documents alone: what is loaded once is not in it."""
    kept = screen(documents, config, ScreenReport())
    began = time.process_time()
    for _ in kept:
        continue
    return time.process_time() - began


def held(documents: list[Document], config: ScreenConfig) -> int:
    """Bytes that are held when all documents have been read and the screen is still there."""
    kept = screen(documents, config, ScreenReport())
    tracemalloc.start()
    for _ in documents:
        next(kept, None)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--words", type=int, default=400)
    options = parser.parse_args()
    documents = made_up(options.documents, options.words)
    total = sum(len(document.text) for document in documents)
    print(f"{len(documents)} documents of {total / len(documents):.0f} bytes on average\n")
    print("| screen | MB a second | kB for each document kept |\n|---|---:|---:|")
    for name, config in SCREENS.items():
        rate = total / min(seconds(documents, config) for _ in range(3)) / 1e6
        print(f"| {name} | {rate:.1f} | {held(documents[:1000], config) / min(len(documents), 1000) / 1e3:.2f} |")


if __name__ == "__main__":
    main()
