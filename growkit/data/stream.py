"""Batches as a pure function of a state that counts tokens.

A source gives rows from a state on, and the state after them; the state is plain JSON, so that it travels inside the
batch and lies in a checkpoint. Nothing else decides what comes next: the shape of a batch may change at any step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from growkit.data.shape import StepShape
from growkit.errors import DataError
from growkit.ops.targets import UNSCORED

State = Mapping[str, Any]


class Rows(NamedTuple):
    """``tokens``, ``targets``: int64 (rows, context); targets may be UNSCORED. ``segments``: which document of its row
    a token is of, int32 (rows, context); None: attention is not bounded by documents. ``scored``: targets that are
    predicted, in all rows that were taken, those of other processes included. Where rows are drawn by their losses:
    ``blocks``, which of the text each is of, int64 (rows,), and ``weights``, how much each counts, float32 (rows,)."""

    tokens: Tensor
    targets: Tensor
    segments: Tensor | None
    scored: int
    blocks: Tensor | None = None
    weights: Tensor | None = None


class DataSource(Protocol):
    """An endless, deterministic sequence of rows. Its state has at least ``cursor``: the tokens read so far."""

    def begin(self) -> State:
        """The state of this source before its first row."""
        ...

    def take(self, state: State, rows: int, context_length: int, mine: slice) -> tuple[Rows, State]:
        """The rows ``mine`` of the next ``rows``, and the state after all of them."""
        ...


@runtime_checkable
class Several(DataSource, Protocol):
    """A source made of others."""

    def alone(self, number: int) -> DataSource:
        """Rows of one of them only; states are those of all."""
        ...


class Batch(NamedTuple):
    """A micro-batch: ``tokens``, ``targets``, ``segments`` as of Rows. ``window``: as of StepShape. ``unscored``:
    whether any target is. ``weight``: what its mean loss is multiplied by, so that every scored token of the step
    counts the same. ``state``: of the source *after* this batch, over all processes; it travels with the batch because
    a trainer may fetch ahead. ``part``, ``parts``: where rows are to be chosen, which of the step's micro-batches this
    is and how many there are; then the rows are all the candidates of the step, the same in each. ``blocks``,
    ``row_weights``: as of Rows. ``source``: as of StepShape."""

    tokens: Tensor
    targets: Tensor
    segments: Tensor | None
    window: int | None
    unscored: bool
    weight: float
    state: State
    part: int = 0
    parts: int = 1
    blocks: Tensor | None = None
    row_weights: Tensor | None = None
    source: int | None = None

    @property
    def cursor(self) -> int:
        return int(self.state["cursor"])


class TokenStream:
    """The endless stream over ``tokens`` (uint8 or any integer array): the corpus cut into blocks, the blocks in a new
    random order each epoch. Position p of the stream is a (token, next token) pair of the corpus; every pair occurs
    once per epoch. Any number of rows of any length are the next pairs, so changing either repeats and skips nothing.

    ``starts``: token at which each document begins, the first at 0; then rows have segments. One ends before the end
    token of its document, which is the first of the next one, or where a block ends that the next does not go on from.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        *,
        block_tokens: int,
        seed: int,
        shuffle: bool = True,
        starts: NDArray[np.int64] | None = None,
    ) -> None:
        self.tokens, self.block_tokens, self.seed, self.shuffle = tokens, block_tokens, seed, shuffle
        self.epoch_tokens = require_pairs(tokens)
        self._ends = None if starts is None else starts[1:] - 1
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> NDArray[np.int64]:
        """Block numbers in the epoch's order; a last, shorter block keeps its place at the end."""
        whole = self.epoch_tokens // self.block_tokens
        if not self.shuffle:
            return np.arange(whole)
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(whole)

    def positions(self, start: int, count: int) -> NDArray[np.int64]:
        """Corpus positions of stream positions start .. start+count."""
        stream = np.arange(start, start + count, dtype=np.int64)
        epochs, inside = np.divmod(stream, self.epoch_tokens)
        result = np.empty_like(stream)
        for epoch in range(start // self.epoch_tokens, -(-(start + count) // self.epoch_tokens)):
            mine = epochs == epoch
            block, offset = np.divmod(inside[mine], self.block_tokens)
            order = self._order(epoch)
            tail = block >= len(order)
            block[~tail] = order[block[~tail]]
            result[mine] = block * self.block_tokens + offset
        return result

    def begin(self) -> State:
        return {"cursor": 0}

    def take(self, state: State, rows: int, context_length: int, mine: slice) -> tuple[Rows, State]:
        cursor, count = state["cursor"], rows * context_length
        first, last, _ = mine.indices(rows)
        at = self.positions(cursor + first * context_length, (last - first) * context_length)
        rows_here = self.rows_at(at.reshape(last - first, context_length))
        return rows_here._replace(scored=count), {"cursor": cursor + count}

    def rows_at(self, at: NDArray[np.int64]) -> Rows:
        """The rows at the positions ``at`` (rows, context) of the corpus."""
        return rows_at(self.tokens, at, self._ends)

    def read(self, start: int, rows: int, context_length: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets), each int64 (rows, context_length), from stream position ``start``."""
        rows_here = self.rows_at(self.positions(start, rows * context_length).reshape(rows, context_length))
        return rows_here.tokens, rows_here.targets


def rows_at(tokens: NDArray[np.integer], at: NDArray[np.int64], ends: NDArray[np.int64] | None) -> Rows:
    """The rows at the positions ``at`` (rows, context) of ``tokens``. ``ends``: of the end tokens; then they have
    segments."""
    return Rows(
        torch.from_numpy(tokens[at].astype(np.int64)),
        torch.from_numpy(tokens[at + 1].astype(np.int64)),
        None if ends is None else torch.from_numpy(_segments(at, ends)),
        at.size,
    )


def _segments(at: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int32]:
    document = np.searchsorted(ends, at, side="right")
    new = np.zeros(at.shape, dtype=bool)
    new[:, 1:] = (np.diff(document, axis=1) != 0) | (np.diff(at, axis=1) != 1)
    return new.cumsum(axis=1, dtype=np.int32)


def require_pairs(tokens: NDArray[np.integer]) -> int:
    """How many (token, next token) pairs there are. Raises DataError for none."""
    if len(tokens) < 2:
        raise DataError("corpus-too-short", "has no pair of tokens", key="data.source")
    return len(tokens) - 1


def padding(state: State) -> int | None:
    """Positions that were padding so far, of all sources; None where no source pads its rows."""
    return _counted(state, "padding")


def joined(state: State) -> int | None:
    """Tokens so far in rows of what is left of documents, of all sources; None where none decomposes documents."""
    return _counted(state, "joined")


def _counted(state: State, name: str) -> int | None:
    parts = [_counted(own, name) for own in state.get("sources", [])]
    known = [count for count in (state.get(name), *parts) if count is not None]
    return sum(known) if known else None


@dataclass
class Batches:
    """Endless micro-batches of optimizer steps from ``first_step`` on, ``accumulate`` a step, from ``state`` on.
    ``shape``: of each step, asked once for each in turn, no sooner than its first row is wanted. Process ``rank`` of
    ``world_size`` takes its rows of each. The rows of a step are the same ones whatever those two numbers and
    ``accumulate`` are. ``candidates``: rows that are read for each that a step has. ``before``: called with the number
    of a step before its rows are taken, which may be a step before it is trained."""

    source: DataSource
    state: State
    shape: Callable[[int], StepShape]
    first_step: int = 0
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    candidates: int = 1
    before: Callable[[int], None] | None = None

    def __iter__(self) -> Iterator[Batch]:
        for batches in self.steps():
            yield from batches

    def steps(self, of: Callable[[int], bool] = lambda step: True) -> Iterator[list[Batch]]:
        """The micro-batches of each step ``of`` which it is true; no rows are made of the others."""
        step, state = self.first_step, self.state
        while True:
            if self.before is not None:
                self.before(step)
            shape = self.shape(step).times(self.candidates)
            if of(step):
                batches = self._step(shape, state)
                state = batches[-1].state
                yield _together(batches) if self.candidates > 1 else batches
            else:
                state = self._after(shape, state)
            step += 1

    def _after(self, shape: StepShape, state: State) -> State:
        """The state after a step."""
        rows, length = shape.rows, shape.context_length
        if shape.drawn_length is not None:
            rows, length = shape.drawn_rows, shape.drawn_length
        return self._source(shape).take(state, rows, length, slice(0, 0))[1]

    def _source(self, shape: StepShape) -> DataSource:
        if shape.source is None:
            return self.source
        assert isinstance(self.source, Several), "one source has no others to choose from"
        return self.source.alone(shape.source)

    def _step(self, shape: StepShape, state: State) -> list[Batch]:
        """All of a step's, since how much each of them weighs is known when all are there."""
        parts = self.accumulate * self.world_size
        ends = [shape.rows * part // parts for part in range(parts + 1)]
        taken: list[tuple[Rows, State]] = []
        source, whole = self._source(shape), None
        if shape.drawn_length is not None:  # a drawn row may lie in two micro-batches, so all are drawn at once
            drawn, count = shape.drawn_length, shape.drawn_rows
            rows, state = source.take(state, count, drawn, slice(0, count))
            whole = cut(rows, shape.context_length, shape.pieces)
        for first in range(0, parts, self.world_size):
            begin, mine, end = ends[first], first + self.rank, ends[first + self.world_size]
            if whole is not None:
                rows = part_of(whole, slice(begin, end), slice(ends[mine], ends[mine + 1]))
            else:
                share = slice(ends[mine] - begin, ends[mine + 1] - begin)
                rows, state = source.take(state, end - begin, shape.context_length, share)
            taken.append((rows, state))
        even = sum(rows.scored for rows, _ in taken) / parts
        return [
            Batch(
                rows.tokens,
                rows.targets,
                rows.segments,
                shape.window,
                unscored=bool((rows.targets == UNSCORED).any()),
                weight=_scored(rows) / even,
                state=state,
                blocks=rows.blocks,
                row_weights=rows.weights,
                source=shape.source,
            )
            for rows, state in taken
        ]


def _together(batches: list[Batch]) -> list[Batch]:
    """Each with the rows of all of a step, none of which is padded."""
    assert all(batch.weight == 1 for batch in batches)
    segments = [batch.segments for batch in batches if batch.segments is not None]
    whole = batches[-1]._replace(
        tokens=torch.cat([batch.tokens for batch in batches]),
        targets=torch.cat([batch.targets for batch in batches]),
        segments=torch.cat(segments) if segments else None,
        parts=len(batches),
    )
    return [whole._replace(part=part) for part in range(len(batches))]


def _scored(rows: Rows) -> int:
    """Targets that are predicted in these rows alone."""
    return int((rows.targets != UNSCORED).sum())


def cut(rows: Rows, context_length: int, pieces: int) -> Rows:
    """Each row in ``pieces`` of ``context_length``, one after the other; what is left of it is dropped."""

    def apart(tensor: Tensor) -> Tensor:
        return tensor[:, : pieces * context_length].reshape(-1, context_length)

    segments = None if rows.segments is None else apart(rows.segments)
    made = Rows(apart(rows.tokens), apart(rows.targets), segments, 0)
    return made._replace(scored=_scored(made))


def part_of(rows: Rows, together: slice, mine: slice) -> Rows:
    """The rows ``mine``, of which there are, with those of other processes, ``together``."""
    segments = None if rows.segments is None else rows.segments[mine]
    scored = int((rows.targets[together] != UNSCORED).sum())
    return Rows(rows.tokens[mine], rows.targets[mine], segments, scored)


def validation_windows(
    tokens: NDArray[np.integer], context_length: int, wanted_tokens: int, unscored: int = 0
) -> tuple[NDArray[np.int64], int]:
    """Start positions of windows spread evenly over ``tokens``, and how many tokens they score.

    The first ``unscored`` targets of a window are only context; the windows do not overlap in the others.
    """
    scored = context_length - unscored
    possible = (len(tokens) - 1 - unscored) // scored
    count = max(1, min(possible, wanted_tokens // scored))
    starts = np.floor(np.arange(count) * (possible / count)).astype(np.int64) * scored
    return starts, count * scored


def windows(tokens: NDArray[np.integer], starts: NDArray[np.int64], context_length: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets), int64 (len(starts), context_length)."""
    at = starts[:, None] + np.arange(context_length)
    return torch.from_numpy(tokens[at].astype(np.int64)), torch.from_numpy(tokens[at + 1].astype(np.int64))
