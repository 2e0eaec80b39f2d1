"""Importance sampling with stale losses: the probabilities are the formula's, the weights make the mean unbiased, the
table goes through a checkpoint bit by bit, and draws know no loss that a prefetching trainer would not have."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from growkit.checkpoint.run_folder import RunFolder
from growkit.cli.recipes import read
from growkit.data.importance import DrawnBlocks, LossTable
from growkit.data.shape import LAG, StepShape
from growkit.data.stream import Batch, Batches, TokenStream
from growkit.models.decoder import build
from growkit.schedule.selection import Selection
from growkit.train.selection import Selector
from tests.support import corpus_file, in_child, model_config, probe, recipe_dict, records, trained_like, write_recipe
from tests.test_distributed import LOSS_TOLERANCE, two_processes
from tests.test_resume import assert_same_run

# Of the mean of 200,000 draws from its expectation: five standard errors, about one in two million; the seed is fixed.
STANDARD_ERRORS = 5.0


def table_of(losses: list[float], smoothing: float = 0.2, temperature: float = 1.0) -> LossTable:
    table = LossTable(len(losses), smoothing=smoothing, temperature=temperature)
    table.losses[:] = losses
    return table


def test_probabilities_are_the_formula() -> None:
    """One by one; blocks without a loss count as the largest, and without any all are alike."""
    losses = [3.0, 0.5, math.nan, 2.0, 0.0]
    counted = [3.0, 0.5, 3.0, 2.0, 0.0]
    for smoothing, temperature in ((0.2, 1.0), (0.5, 2.0), (0.01, 0.25), (1.0, 1.0)):
        powers = [loss ** (1 / temperature) for loss in counted]
        wanted = [(1 - smoothing) * power / sum(powers) + smoothing / 5 for power in powers]
        found = table_of(losses, smoothing, temperature).probabilities()
        assert found.tolist() == pytest.approx(wanted, rel=1e-12) and sum(found) == pytest.approx(1)
    for alike in ([math.nan] * 3, [0.0] * 3):
        assert table_of(alike).probabilities().tolist() == pytest.approx([1 / 3] * 3)


def stream(blocks: int, size: int) -> TokenStream:
    """Every token is the number of its block, but the last, which is of none."""
    tokens = np.repeat(np.arange(blocks), size)
    return TokenStream(np.append(tokens, 0).astype(np.uint8), block_tokens=size, seed=3)


@pytest.mark.parametrize("unbiased", [True, False])
def test_weights_make_the_mean_unbiased(unbiased: bool) -> None:
    """The mean of weight × loss over many draws is the mean over all blocks, whatever they are drawn by; without
    weights it is Σ p L. Weights have the mean 1."""
    truth = np.array([4.0, 0.1, 2.5, 1.0, 0.7, 3.0, 0.2])
    table = table_of([0.3, 2.0, 5.0, math.nan, 0.1, 1.0, 4.0])  # what it is drawn by is old
    source = DrawnBlocks(stream(7, 8), table, unbiased=unbiased)
    rows, _ = source.take(source.begin(), 200_000, 8, slice(0, 200_000))
    assert rows.blocks is not None and rows.weights is not None
    assert torch.equal(rows.tokens, rows.blocks[:, None].expand(-1, 8))
    weights = rows.weights.double().numpy()
    values = weights * truth[rows.blocks.numpy()]
    wanted = truth.mean() if unbiased else float(table.probabilities() @ truth)
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - wanted) < STANDARD_ERRORS * error
    assert abs(weights.mean() - 1) < STANDARD_ERRORS * max(weights.std(), 1e-9) / math.sqrt(len(weights)) + 1e-6
    biased = abs(truth[rows.blocks.numpy()].mean() - truth.mean())
    assert biased > 20 * error, "the check could not fail"


def test_rows_do_not_depend_on_who_takes_them() -> None:
    """Cut into micro-batches and processes anywhere; shorter rows are pieces of the blocks, all of them."""
    table = table_of([1.0, 2.0, 3.0, 4.0, 5.0])
    source = DrawnBlocks(stream(5, 12), table, unbiased=True)
    whole, after = source.take({"cursor": 0, "drawn": 7}, 10, 12, slice(0, 10))
    assert after == {"cursor": 120, "drawn": 17}
    first, state = source.take({"cursor": 0, "drawn": 7}, 4, 12, slice(0, 4))
    second, end = source.take(state, 6, 12, slice(2, 5))
    for name in ("tokens", "targets", "blocks", "weights"):
        assert torch.equal(getattr(first, name), getattr(whole, name)[:4])
        assert torch.equal(getattr(second, name), getattr(whole, name)[6:9])
    assert end == after and first.scored == 48 and second.scored == 72
    text = np.arange(61).astype(np.uint8)
    pieces = DrawnBlocks(TokenStream(text, block_tokens=12, seed=3), table, unbiased=True)
    rows, _ = pieces.take(pieces.begin(), 400, 5, slice(0, 400))
    assert set(rows.tokens[:, 0].tolist()) == {12 * block + 5 * piece for block in range(5) for piece in range(2)}
    assert torch.equal(rows.tokens[:, 0] // 12, rows.blocks)


def test_a_draw_knows_no_loss_of_the_last_two_steps() -> None:
    """A trainer that fetches a step ahead draws what one does that stored and went on before every step; further ahead
    is refused."""

    def walk(ahead: int, stored: bool) -> list[list[int]]:
        table = LossTable(9, smoothing=0.1, temperature=0.5)
        table.begin(0, None)
        source = DrawnBlocks(stream(9, 4), table, unbiased=True)
        shape = StepShape(6, 4)
        steps, drawn, state = [], [], source.begin()
        batches = iter(Batches(source, state, lambda _: shape, before=table.settle))
        for step in range(12):
            if stored:
                state_now = json.loads(json.dumps(table.state_at(step)))
                table.begin(step, state_now)
                batches = iter(Batches(source, state, lambda _: shape, step, before=table.settle))
                drawn = []
            while len(drawn) <= ahead:
                drawn.append(next(batches))
            batch = drawn.pop(0)
            state = batch.state
            assert batch.blocks is not None
            steps.append(batch.blocks.tolist())
            table.learn(step, batch.blocks.numpy(), (batch.blocks + step % 3 + 1).numpy().astype(np.float32) ** 3)
        return steps

    assert walk(0, False) == walk(1, False) == walk(0, True) == walk(1, True)
    with pytest.raises(AssertionError, match="further ahead"):
        walk(LAG, False)


def test_a_table_goes_through_json_bit_by_bit() -> None:
    """Losses, those that wait, and what is not finite, which counts as not seen; its size is what is said of it."""
    table = LossTable(6, smoothing=0.2, temperature=1.0)
    table.begin(0, None)
    values = np.array([0.1, 1 / 3, math.inf, 7e-40, 2.0], dtype=np.float32)
    table.learn(0, np.array([0, 1, 2, 3, 3]), values)
    table.learn(1, np.array([5]), np.array([0.7], dtype=np.float32))
    state = table.state_at(2)
    again = LossTable(6, smoothing=0.2, temperature=1.0)
    again.begin(2, json.loads(json.dumps(state)))
    assert again.state_at(2) == state
    assert again.losses.tobytes() == table.losses.tobytes()
    assert again.losses[3] == 2.0 and np.isnan(again.losses[[2, 4, 5]]).all() and again.seen == 0.5
    again.learn(2, np.array([4]), np.array([1.0], dtype=np.float32))
    again.settle(3)
    assert again.losses[5] == np.float32(0.7) and np.isnan(again.losses[4])
    million = LossTable(1_000_000, smoothing=0.2, temperature=1.0)
    million.begin(0, None)
    assert len(json.dumps(million.state_at(0))) == pytest.approx(5.3e6, rel=0.01)


def test_the_loss_is_the_weighted_mean_over_rows() -> None:
    """And its gradient, with a z-loss; what the table is told is each row's mean without weight."""
    config = model_config("transformer")
    mine, theirs = (build(config, trained_like(config).params) for _ in range(2))
    tokens, weights = probe(config, rows=4), torch.tensor([0.5, 2.0, 0.1, 1.4])
    blocks = torch.tensor([3, 1, 3, 0])
    batch = Batch(
        tokens[:, :-1], tokens[:, 1:], None, None, False, 1.0, {"cursor": 0}, blocks=blocks, row_weights=weights
    )
    selector = Selector(Selection("importance"), None, z_loss=0.1)
    found = selector.loss(mine, batch)
    found.total.backward()
    logits = theirs(tokens[:, :-1])
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
    total = sum(w * (e + 0.1 * z).mean() for w, e, z in zip(weights, each, logits.logsumexp(-1).square(), strict=True))
    (total / 4).backward()
    torch.testing.assert_close(found.total, total / 4)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    (rows,) = selector.rows_done()
    assert rows[:, 0].tolist() == blocks.tolist() and torch.equal(rows[:, 2], weights.double())
    torch.testing.assert_close(rows[:, 1], each.mean(1).detach())


def small(folder: Path, **select: Any) -> Path:
    """Two stages that grow, with lengths that change; about 90 blocks of 32 tokens."""
    recipe = recipe_dict(folder, monitor={"ngram_order": 0, "sample_tokens": 0, "validation_tokens": 64})
    recipe["data"] = {"source": str(corpus_file(folder, 3)), "select": {"kind": "importance"} | select}
    first, _, last = recipe["stages"]
    recipe["stages"] = [first, last | {"context": {"schedule": "discrete", "start": 16, "at": {"50%": 32}}}]
    return write_recipe(folder, recipe)


def test_stopped_and_resumed(tmp_path: Path) -> None:
    """Within both stages; the table is in the checkpoint, costs nothing, and knows the blocks that were seen."""
    path, runs = small(tmp_path, temperature=0.5), tmp_path / "runs"
    assert in_child("train", path, "run.name=whole") == 0
    assert in_child("train", path, "run.name=stopped", env={"GROWKIT_FAULT": "after_rename:1"}) == -signal.SIGKILL
    assert in_child("resume", runs / "stopped", env={"GROWKIT_FAULT": "after_rename:2"}) == -signal.SIGKILL
    assert in_child("resume", runs / "stopped") == 0
    assert_same_run(runs / "stopped", runs / "whole")
    _, schedule = read(str(path), [])
    progress = RunFolder.open(runs / "whole").load().manifest.progress
    assert progress.tokens == progress.cursor == schedule.tokens
    assert progress.flops == pytest.approx(
        sum(
            stage.model.flops_per_token(stage.shape(step).context_length) * stage.shape(step).tokens
            for stage in schedule.stages
            for step in range(stage.steps)
        )
    )
    assert {"cursor", "drawn", "table"} == set(progress.data) and len(progress.data["table"]["waiting"]) == LAG - 1
    steps = records(runs / "whole", "step")
    assert steps[0]["effective_rows"] == 1 and steps[0]["seen_blocks"] == 0
    assert 0.5 < steps[-1]["effective_rows"] < 1 and steps[-1]["seen_blocks"] > 0.2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_draw_what_one_does(strategy: str, tmp_path: Path) -> None:
    path, runs = small(tmp_path), tmp_path / "runs"
    options = ("model.dropout=0", "stages.0.micro_batch_size=2", "stages.1.micro_batch_size=2")
    assert in_child("train", path, *options, "run.name=alone") == 0
    two = (f"trainer.strategy={strategy}", "trainer.devices=2", "run.name=both")
    assert two_processes("train", path, *options, *two, run=runs / "both") == [0, 0]
    for a, b in zip(records(runs / "alone", "step"), records(runs / "both", "step"), strict=True):
        for name in ("loss", "effective_rows", "seen_blocks"):
            assert abs(a[name] - b[name]) <= LOSS_TOLERANCE, (a["step"], name)
