"""Blocks of a text drawn by the last loss of each: importance sampling (Katharopoulos & Fleuret 2018, arXiv 1803.00942)
with losses that are as old as the last visit (Loshchilov & Hutter 2015, arXiv 1511.06343).

Legend: N blocks, B rows of a step.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from growkit.data.shape import LAG
from growkit.data.stream import Rows, State, TokenStream
from growkit.errors import DataError


class LossTable:
    """The last loss of each of ``blocks`` blocks, float32, and how likely each is drawn:

        p_i = (1 − smoothing) L_i^(1/temperature) / Σ_j L_j^(1/temperature) + smoothing/N.

    A block without a loss counts as the largest there is (Loshchilov & Hutter draw those first); without any, all are
    alike. Losses of the last LAG steps wait, so that a trainer that runs ahead draws by the same numbers as one that
    was resumed.
    """

    def __init__(self, blocks: int, *, smoothing: float, temperature: float) -> None:
        self.smoothing, self.temperature = smoothing, temperature
        self.losses = np.full(blocks, np.nan, dtype=np.float32)
        self._waiting: list[tuple[int, NDArray[np.int64], NDArray[np.float32]]] = []
        self._learned = -1  # the last step whose losses came
        self._likely: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def begin(self, step: int, state: Mapping[str, Any] | None) -> None:
        """Goes on before step ``step``, with what ``state_at`` said; None: nothing was seen."""
        self._learned, self._likely = step - 1, None
        if state is None:
            self.losses[:] = np.nan
            self._waiting = []
            return
        stored = np.frombuffer(base64.b64decode(state["losses"]), dtype="<f4")
        assert len(stored) == len(self.losses), "the order of the data has changed, and the run goes on with it"
        self.losses[:] = stored
        self._waiting = [
            (at, np.array(blocks, dtype=np.int64), np.array(losses, dtype=np.float32))
            for at, blocks, losses in state["waiting"]
        ]

    def settle(self, step: int) -> None:
        """Before the draws of step ``step``: takes in what they may know. Of a block that came twice in a step, the
        later row counts."""
        assert self._learned >= step - LAG, "the data are fetched further ahead than a step"
        for at, blocks, losses in self._waiting:
            if at <= step - LAG:
                self.losses[blocks] = np.where(np.isfinite(losses), losses, np.nan)
                self._likely = None
        self._waiting = [entry for entry in self._waiting if entry[0] > step - LAG]

    def learn(self, step: int, blocks: NDArray[np.int64], losses: NDArray[np.float32]) -> None:
        """The losses of the rows of step ``step``, in their order, over all processes."""
        self._waiting.append((step, blocks, losses))
        self._learned = step

    def state_at(self, step: int) -> dict[str, Any]:
        """Plain JSON, before step ``step``. The losses are base64 of little-endian float32: exact, 5.3 MB for a million
        blocks."""
        self.settle(step)
        text = base64.b64encode(self.losses.astype("<f4").tobytes()).decode("ascii")
        waiting = [[at, blocks.tolist(), losses.tolist()] for at, blocks, losses in self._waiting]
        return {"losses": text, "waiting": waiting}

    @property
    def seen(self) -> float:
        """The share of the blocks that have a loss."""
        return float(np.isfinite(self.losses).mean())

    def probabilities(self) -> NDArray[np.float64]:
        """p, (N,)."""
        return self._probabilities()[0]

    def draw(self, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
        """The block for each number in [0, 1)."""
        bounds = self._probabilities()[1]
        found = np.searchsorted(bounds, uniform * bounds[-1], side="right")
        return np.minimum(found, len(bounds) - 1)

    def _probabilities(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """p, and its sums up to each block."""
        if self._likely is None:
            losses = self.losses.astype(np.float64)
            known = np.isfinite(losses)
            losses[~known] = losses[known].max() if known.any() else 1.0
            top = losses.max()
            shares = (losses / top) ** (1 / self.temperature) if top > 0 else np.ones_like(losses)
            likely = (1 - self.smoothing) * shares / shares.sum() + self.smoothing / len(losses)
            self._likely = likely, np.cumsum(likely)
        return self._likely


class DrawnBlocks:
    """The endless sequence of rows that ``table`` draws of ``stream``, with replacement: for every row a block, and of
    that one of its pieces as long as the row, each as likely as the others. What does not fill a block at the end of
    the text, or a piece at the end of a block, is not drawn. A row weighs 1/(N p) if ``unbiased``: then the expected
    mean of weight × loss is the mean loss over all blocks, whatever p is.

    State: ``cursor``, tokens read; ``drawn``, rows; row r has random numbers of its own.
    """

    def __init__(self, stream: TokenStream, table: LossTable, *, unbiased: bool) -> None:
        self.stream, self.table, self.unbiased = stream, table, unbiased

    def begin(self) -> State:
        return {"cursor": 0, "drawn": 0}

    def take(self, state: State, rows: int, context_length: int, mine: slice) -> tuple[Rows, State]:
        first, last, _ = mine.indices(rows)
        drawn, size = state["drawn"], self.stream.block_tokens
        which, where = self._uniform(drawn + first, last - first)
        blocks = self.table.draw(which)
        pieces = size // context_length
        start = blocks * size + (where * pieces).astype(np.int64) * context_length
        found = self.stream.rows_at(start[:, None] + np.arange(context_length))
        weights = np.ones(len(blocks))
        if self.unbiased:
            weights = 1 / (len(self.table.losses) * self.table.probabilities()[blocks])
        count = rows * context_length
        of_rows = {"blocks": torch.from_numpy(blocks), "weights": torch.from_numpy(weights.astype(np.float32))}
        return found._replace(scored=count, **of_rows), {"cursor": state["cursor"] + count, "drawn": drawn + rows}

    def _uniform(self, first: int, rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Two numbers in [0, 1) for each row from ``first`` on: Philox makes four words of every count."""
        key = np.array([self.stream.seed, 2**64 - 1], dtype=np.uint64)  # epochs of a stream have the smaller keys
        words = np.random.Philox(key=key, counter=[first, 0, 0, 0]).random_raw(4 * rows).reshape(rows, 4)
        numbers = (words >> np.uint64(11)).astype(np.float64) / 2**53
        return numbers[:, 0], numbers[:, 1]


def require_block(name: str, tokens: int, block_tokens: int) -> None:
    """Raises DataError if ``tokens`` of training text hold no block."""
    if tokens <= block_tokens:
        problem = f"its training split has {tokens} tokens, and data.select draws blocks of {block_tokens}"
        mend = "use more text, or a smaller data.block_tokens"
        raise DataError("corpus-too-short", problem, key="data.source", value=name, mend=mend)


def drawn_blocks(stream: TokenStream, *, smoothing: float, temperature: float, unbiased: bool) -> DrawnBlocks:
    """Over the whole blocks of ``stream``, of which there is one at least."""
    blocks = stream.epoch_tokens // stream.block_tokens
    return DrawnBlocks(stream, LossTable(blocks, smoothing=smoothing, temperature=temperature), unbiased=unbiased)
