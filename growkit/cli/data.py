"""Getting data ready: preparing a recipe's corpus, and training a tokenizer on it. No torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from growkit.cli.recipes import built_in, find_recipe, read
from growkit.config.load import load_recipe, parse_data
from growkit.config.recipe import BYTES, DataConfig
from growkit.data.bpe import require_trainable, train_bpe
from growkit.data.corpus import Corpus, Part, load_corpus, load_part
from growkit.data.pieces import Pieces, pieces_of, require_pieces
from growkit.data.reading import Sources
from growkit.data.screen import ScreenReport
from growkit.data.tokenizer import load_tokenizer
from growkit.duration import quantity
from growkit.models.presets import PRESETS


class _Bar:
    """A bar for each thing that is done to a source. ``seen``: whether anything was."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name
        self._doing, self._task = "", progress.add_task(f"look at {name}", total=None)
        self.seen = False

    def __call__(self, doing: str, done: int, total: int) -> None:
        self.seen = True
        if doing != self._doing:
            self._progress.remove_task(self._task)
            self._task, self._doing = self._progress.add_task(f"{doing} {self._name}", total=total or None), doing
        self._progress.update(self._task, completed=done)

    def close(self) -> None:
        self._progress.remove_task(self._task)


def prepare_data(name: str, overrides: Sequence[str], workers: int | None) -> None:
    """Prepares what a recipe's run would, and shows what came of it."""
    if workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # the tokenizers library looks once, when it first needs threads
    recipe, schedule = read(name, overrides)
    tokenizer = load_tokenizer(recipe.data)
    tokenizer.require_room(schedule.start_model.vocab_size)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("source", "documents", "bytes", "tokens", "bytes a token", "seconds", "bytes/s"):
        table.add_column(header, justify="left" if header == "source" else "right")
    console = Console(highlight=False)
    parts: list[Part] = []
    sources = Sources(recipe.data)
    with _progress() as progress:
        for index, source in enumerate(sources.names):
            bar, began = _Bar(progress, source), time.perf_counter()
            parts.append(load_part(sources, index, tokenizer, bar))
            seconds = time.perf_counter() - began
            bar.close()
            table.add_row(*_row(parts[-1], seconds, made=bar.seen))
    corpus = Corpus("", tokenizer, tuple(parts))
    corpus.require(schedule.max_context_length)
    console.print(table)
    if corpus.screened is not None:
        for part in parts if len(parts) > 1 else ():
            assert part.screened is not None
            said = ScreenReport.from_json(part.screened).summary()
            console.print(f"{part.name}: {said}", soft_wrap=True, markup=False)
        console.print(ScreenReport.from_json(corpus.screened).table())
    for part in parts:
        console.print(f"{part.name}: {part.folder}", soft_wrap=True, markup=False)
    if recipe.data.packing == "decompose":
        for part in parts:
            pieces = pieces_of(part.train_starts, len(part.train) - 1, schedule.lengths)
            console.print(_buckets(part.name, pieces))
            require_pieces(pieces, part.name)


def _buckets(name: str, pieces: Pieces) -> Table:
    """What each bucket holds: odds in these shares train on every token as often."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in (escape(name), "pieces", "tokens", "share"):
        table.add_column(header, justify="right")
    whole = sum(pieces.pairs(length) for length in pieces.begins)
    for length in sorted(pieces.begins):
        pairs = pieces.pairs(length)
        table.add_row(f"{length}", f"{len(pieces.begins[length]):,}", quantity(pairs), f"{pairs / whole:.1%}")
    table.add_row("left of documents", "joined", quantity(pieces.tail_pairs), f"{pieces.tail_pairs / whole:.1%}")
    return table


def _row(part: Part, seconds: float, *, made: bool) -> tuple[str, ...]:
    size, tokens = part.train_bytes + len(part.validation_text), len(part.train) + len(part.validation)
    rate = quantity(round(size / seconds)) if made else "was there"
    figures = (f"{part.documents:,}", quantity(size), quantity(tokens), f"{size / tokens:.2f}", f"{seconds:.1f}", rate)
    return (escape(part.name), *figures)


def train_tokenizer(source: str, overrides: Sequence[str], vocab_size: int, output: Path) -> None:
    """Trains on the side of the text that a run trains on: what is held out stays unseen."""
    require_trainable(vocab_size, output)
    data = _data_of(source, overrides)
    data.tokenizer, data.end_token = BYTES, None
    with _progress() as progress:
        corpus = load_corpus(data, observe=_Bar(progress, source))
    made = train_bpe(_training_documents(corpus), vocab_size, output)
    console = Console(highlight=False)
    console.print(f"{output}: {made} ids, of {quantity(corpus.train_bytes)} bytes", soft_wrap=True, markup=False)
    if made < vocab_size:
        console.print(f"not {vocab_size}: the text has no further pairs that occur twice")
    console.print(f"use it with data.tokenizer={output} model.vocab_size={made}", soft_wrap=True, markup=False)


def _data_of(source: str, overrides: Sequence[str]) -> DataConfig:
    if source in built_in() or Path(source).suffix in (".yaml", ".yml"):
        return load_recipe(find_recipe(source), overrides, PRESETS).data
    return parse_data([f"data.source={source}", *overrides])


def _training_documents(corpus: Corpus) -> Iterator[bytes]:
    """The documents of a corpus of bytes, those held out left out."""
    for part in corpus.parts:
        stops = [*(part.train_starts[1:] - 1).tolist(), len(part.train)]
        for start, stop in zip(part.train_starts.tolist(), stops, strict=True):
            yield part.train[start:stop].tobytes()


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
