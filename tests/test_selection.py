"""Choosing what to train on: Rho-1's tokens and RHO-LOSS's rows are those of a slow reference, their cost is counted,
and a run that chooses, stopped and resumed, is bitwise the run that never stopped."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from growkit.checkpoint.reference import Reference
from growkit.checkpoint.run_folder import RunFolder
from growkit.cli.recipes import read
from growkit.data.stream import Batch
from growkit.models.decoder import DecoderLM, build
from growkit.ops.targets import UNSCORED
from growkit.schedule.selection import Selection
from growkit.train import selection
from growkit.train.selection import Selector, best_rows, top_share
from tests.support import TEXT, cli, in_child, model_config, probe, recipe_dict, records, trained_like, write_recipe
from tests.test_distributed import LOSS_TOLERANCE, two_processes
from tests.test_resume import assert_same_run

CONFIG = model_config("transformer")
CLOSE = 1e-10  # float64, the same sums in another order
QUIET = {"ngram_order": 0, "sample_tokens": 0, "validation_tokens": 64}


def model(seed: int, dropout: float = 0.0) -> DecoderLM:
    return build(model_config("transformer", dropout=dropout), trained_like(CONFIG, seed=seed).params)


def reference_of(seed: int) -> Reference:
    return Reference("somewhere", model(seed).requires_grad_(False).eval(), "digest")


def batch_of(tokens: Tensor, *, part: int = 0, parts: int = 1, padded: int = 0) -> Batch:
    """``padded``: targets of each row that are not scored, its last."""
    targets = tokens[:, 1:].clone()
    if padded:
        targets[:, -padded:] = UNSCORED
    return Batch(tokens[:, :-1], targets, None, None, bool(padded), 1.0, {"cursor": 0}, part, parts)


def losses(model: DecoderLM, batch: Batch) -> Tensor:
    """Nats of each target, from logits; of what is not scored 0."""
    logits = model(batch.tokens)
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view_as(batch.targets)


def slow_top(values: list[float], among: list[int], count: int) -> set[int]:
    """One by one, the largest that is left; of equal ones the first."""
    left, found = list(among), set()
    for _ in range(count):
        best = left[0]
        for place in left:
            if values[place] > values[best]:
                best = place
        left.remove(best)
        found.add(best)
    return found


def test_the_top_share_is_that_of_a_slow_search() -> None:
    """Also with many equal values; a share of nothing is nothing, and the smallest share is one."""
    draw = random.Random(0)
    for size, share in ((1, 0.01), (7, 0.5), (24, 0.6), (24, 1.0), (60, 0.34)):
        values = [float(draw.randint(0, 6)) for _ in range(size)]
        for among in ([], list(range(size)), [place for place in range(size) if draw.random() < 0.7]):
            mask = torch.zeros(size, dtype=torch.bool)
            mask[among] = True
            count = 0 if not among else min(len(among), max(1, int(share * len(among) + 0.5)))
            kept = top_share(torch.tensor(values).view(1, -1), mask.view(1, -1), share)[0]
            assert set(kept.nonzero()[:, 0].tolist()) == slow_top(values, among, count)
        every = top_share(torch.tensor(values), None, share)
        assert int(every.sum()) == max(1, int(share * size + 0.5))
        rows = best_rows(torch.tensor(values), (size + 1) // 2)
        assert rows.tolist() == sorted(slow_top(values, list(range(size)), (size + 1) // 2))


@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("chunk", [0, 7])
def test_rho_1_is_the_mean_over_the_tokens_of_largest_excess(padded: int, chunk: int) -> None:
    """Loss, gradient and what is said of it, beside logits and a slow search; with a z-loss."""
    keep, z_loss = 0.4, 0.1
    reference, batch = reference_of(5), batch_of(probe(CONFIG), padded=padded)
    mine, theirs = model(3), model(3)
    selector = Selector(Selection("rho_1", CONFIG, keep=keep), reference, chunk_tokens=chunk, z_loss=z_loss)
    found = selector.loss(mine, batch)
    found.total.backward()

    each, base = losses(theirs, batch).flatten(), losses(reference.model, batch).flatten()
    excess = (each - base).tolist()
    scored = (batch.targets.flatten() != UNSCORED).nonzero()[:, 0].tolist()
    count = int(keep * len(scored) + 0.5)
    kept = sorted(slow_top(excess, scored, count))
    z = theirs(batch.tokens).flatten(0, 1).logsumexp(-1).square()
    wanted = sum(each[place] + z_loss * z[place] for place in kept) / count
    assert isinstance(wanted, Tensor)
    wanted.backward()
    torch.testing.assert_close(found.total, wanted, rtol=CLOSE, atol=CLOSE)
    torch.testing.assert_close(found.cross_entropy, each[kept].mean(), rtol=CLOSE, atol=CLOSE)
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=CLOSE, atol=CLOSE, msg=name)
    said = {name: float(value) for name, value in selector.step_done().items()}
    assert said == pytest.approx(
        {
            "kept": count / len(scored),
            "excess": sum(excess[place] for place in kept) / count,
            "excess_read": sum(excess[place] for place in scored) / len(scored),
        },
        rel=1e-6,
    )
    assert said["excess"] > said["excess_read"]


def test_rho_loss_trains_on_the_rows_of_largest_reducible_loss() -> None:
    """Of all the step's candidates, though they come in two micro-batches; scored without dropout, which the training
    pass has, so that the random state moves by the latter alone."""
    reference, trained = reference_of(5), model(3, dropout=0.5).train()
    tokens = probe(CONFIG, rows=12)
    selector = Selector(Selection("rho_loss", CONFIG, candidates=3), reference)
    whole = batch_of(tokens)
    excess = (losses(model(3), whole) - losses(reference.model, whole)).mean(1).tolist()
    chosen = sorted(slow_top(excess, list(range(12)), 4))
    seen: list[Tensor] = []
    trained.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]) if module.training else None)
    for part in range(2):
        torch.manual_seed(part)
        found = selector.loss(trained, batch_of(tokens, part=part, parts=2))
        after = torch.get_rng_state()
        torch.manual_seed(part)
        rows = chosen[2 * part : 2 * part + 2]
        assert torch.equal(seen[-1], tokens[rows, :-1])
        wanted = trained(tokens[rows, :-1], tokens[rows, 1:])
        assert torch.equal(found.total, wanted.total) and torch.equal(after, torch.get_rng_state())
    said = {name: float(value) for name, value in selector.step_done().items()}
    means = {"excess": sum(excess[row] for row in chosen) / 4, "excess_read": sum(excess) / 12}
    assert said == pytest.approx({"kept": 1 / 3} | means, rel=1e-6)


def test_what_scores_in_bf16_leaves_the_gradients() -> None:
    """Autocast keeps its casts of weights: those made without gradients must not serve the pass that has them."""
    trained = build(CONFIG, {name: p.float() for name, p in trained_like(CONFIG, seed=3).params.items()}).train()
    base = build(CONFIG, {name: p.float() for name, p in trained_like(CONFIG, seed=5).params.items()})
    reference = Reference("somewhere", base.requires_grad_(False).eval(), "digest")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = Selector(Selection("rho_loss", CONFIG, candidates=2), reference).loss(
            trained, batch_of(probe(CONFIG, rows=4))
        )
    loss.total.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.parameters())


def small(folder: Path, **select: Any) -> Path:
    """A run of two stages that grows and shortens its rows, with ``select``."""
    recipe = recipe_dict(folder, monitor=QUIET)
    recipe["data"]["select"] = select
    recipe["stages"] = recipe["stages"][:2]
    recipe["stages"][1]["context"] = {"schedule": "discrete", "start": 8, "at": {"50%": 16}, "how": "reshape"}
    recipe["stages"][0].pop("validate_every")
    return write_recipe(folder, recipe)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps on a text of lower-case letters and numbers."""
    folder = tmp_path_factory.mktemp("reference")
    recipe = recipe_dict(folder, monitor=QUIET, optim={"lr": 1e-2})
    recipe["stages"] = [recipe["stages"][0] | {"duration": "60 steps"}]
    assert in_child("train", write_recipe(folder, recipe), "run.name=reference") == 0
    return folder / "runs" / "reference"


KINDS: dict[str, dict[str, Any]] = {
    "rho_1": {"kind": "rho_1", "keep": 0.5},
    "rho_loss": {"kind": "rho_loss", "candidates": 3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed(kind: str, reference: Path, tmp_path: Path) -> None:
    """Within both stages; what was read, trained on and reckoned is in the log and in the checkpoint."""
    path = small(tmp_path, reference=str(reference), **KINDS[kind])
    runs = tmp_path / "runs"
    assert in_child("train", path, "run.name=whole") == 0
    assert in_child("train", path, "run.name=stopped", env={"GROWKIT_FAULT": "after_rename:1"}) == -signal.SIGKILL
    assert in_child("resume", runs / "stopped", env={"GROWKIT_FAULT": "after_rename:2"}) == -signal.SIGKILL
    assert in_child("resume", runs / "stopped") == 0
    assert_same_run(runs / "stopped", runs / "whole")

    _, schedule = read(str(path), [])
    manifest = RunFolder.open(runs / "whole").load().manifest
    tokens, last = 2 * 6 * 128, records(runs / "whole", "step")[-1]
    reads = 3 if kind == "rho_loss" else 1
    assert (manifest.progress.tokens, manifest.progress.cursor) == (tokens, reads * tokens)
    assert last.get("passed_over_tokens", 0) == (reads - 1) * 6 * 128
    assert last["kept"] == (0.5 if kind == "rho_1" else pytest.approx(1 / 3))
    assert last["excess"] > last["excess_read"]
    base = RunFolder.open(reference).load().manifest.model
    flops = 0.0
    for stage in schedule.stages:
        for number in range(6):
            length = stage.shape(number).context_length
            forward, scoring = stage.model.forward_flops_per_token(length), base.forward_flops_per_token(length)
            flops += 128 * (3 * forward + (scoring if kind == "rho_1" else 3 * (forward + scoring)))
    assert manifest.progress.flops == pytest.approx(flops) == pytest.approx(schedule.flops)
    assert "reference" in manifest.corpus


def test_rho_1_leaves_noise_alone(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text of which half the lines are bytes that tell nothing, the reference having seen the other half alone:
    hardly a token of noise is kept where there are others."""
    draw = random.Random(0)
    lines = [
        f"{number} {TEXT}".encode() if number % 2 else bytes(draw.randrange(128, 256) for _ in range(100)) + b"\n"
        for number in range(300)
    ]
    corpus = tmp_path / "noisy.txt"
    corpus.write_bytes(b"".join(lines))
    kept: list[tuple[float, float, float]] = []  # shares of noise: in what is read, in what is kept, the least possible
    loss = Selector._rho_1

    def watched(self: Selector, model: DecoderLM, batch: Batch) -> Any:
        def top(values: Tensor, among: Tensor | None, share: float) -> Tensor:
            where = top_share(values, among, share)
            noise = (batch.targets >= 128).float()
            shares = float(noise.mean()), float(noise[where].mean())
            kept.append((*shares, max(0.0, shares[0] - (1 - share)) / share))
            return where

        monkeypatch.setattr(selection, "top_share", top)
        return loss(self, model, batch)

    monkeypatch.setattr(Selector, "_rho_1", watched)
    path = small(tmp_path, kind="rho_1", keep=0.4, reference=str(reference))
    code, _, err = cli("train", path, f"data.source={corpus}", "stages.0.duration=20 steps", "model.dropout=0")
    assert code == 0, err
    found, trained, least = (sum(column) / len(kept) for column in zip(*kept, strict=True))
    assert found > 0.4 and trained < least + 0.05, (found, trained, least)


def test_a_reference_from_hugging_face_is_the_same(reference: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    assert cli("export", reference, exported)[0] == 0
    path = small(tmp_path, kind="rho_1", keep=0.5, reference=str(reference))
    for name, of in (("own", reference), ("theirs", exported)):
        code, _, err = cli("train", path, f"run.name={name}", f"data.select.reference={of}")
        assert code == 0, err
    own, theirs = (tmp_path / "runs" / name for name in ("own", "theirs"))
    assert [r["loss"] for r in records(own, "step")] == [r["loss"] for r in records(theirs, "step")]
    digests = [RunFolder.open(run).load().manifest.corpus["reference"] for run in (own, theirs)]
    assert digests[0] == digests[1]


def test_rows_of_documents_with_padding(reference: Path, tmp_path: Path) -> None:
    """Padding is no candidate: half of what is scored is kept."""
    path = small(tmp_path, kind="rho_1", keep=0.5, reference=str(reference))
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number:02}.txt").write_text(TEXT[: 5 + number * 7 % 55])
    options = (f"data.source={texts}", "data.packing=best_fit", "data.validation_fraction=0.2", "run.name=packed")
    code, _, err = cli("train", path, *options)
    assert code == 0, err
    steps = records(tmp_path / "runs" / "packed", "step")
    assert steps[-1]["padding"] > 0
    assert all(abs(step["kept"] - 0.5) < 0.02 for step in steps)  # of about 60 in a micro-batch, to the nearest


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes(strategy: str, reference: Path, tmp_path: Path) -> None:
    """Rho-1 chooses in a micro-batch, so two processes choose what one does; of RHO-LOSS each has its own rows."""
    path = small(tmp_path, kind="rho_1", keep=0.5, reference=str(reference))
    alone = ("model.dropout=0", "stages.0.micro_batch_size=2", "stages.1.micro_batch_size=2")
    two = (f"trainer.strategy={strategy}", "trainer.devices=2", *alone)
    rho_loss = f"data.select={{kind: rho_loss, candidates: 3, reference: {reference}}}"
    runs = tmp_path / "runs"
    assert in_child("train", path, *alone, "run.name=alone") == 0
    assert two_processes("train", path, *two, "run.name=both", run=runs / "both") == [0, 0]
    for a, b in zip(records(runs / "alone", "step"), records(runs / "both", "step"), strict=True):
        for name in ("loss", "excess", "excess_read", "kept"):
            assert abs(a[name] - b[name]) <= LOSS_TOLERANCE, (a["step"], name)
    assert two_processes("train", path, *two, rho_loss, "run.name=rows", run=runs / "rows") == [0, 0]
    step = records(runs / "rows", "step")[-1]
    assert step["excess"] > step["excess_read"] and step["passed_over_tokens"] == 2 * 6 * 128


def test_a_profile_and_a_plan_have_the_choosing_in_them(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))  # where the measured speed is kept
    for kind, settings in KINDS.items():
        path = small(tmp_path, reference=str(reference), **settings)
        trace = tmp_path / f"{kind}.json"
        code, out, err = cli("profile", path, "--stage", 1, "--steps", 2, "-o", trace)
        assert code == 0 and "forward" in out, err
        code, out, err = cli("plan", path, "--measure")
        assert code == 0 and "% of the FLOPs go into choosing" in out, err
        assert ("passed over" in out) == (kind == "rho_loss")
        _, schedule = read(str(path), [])
        pace = schedule.stages[0].pace
        base = RunFolder.open(reference).load().manifest.model.forward_flops_per_token(16)
        forward = schedule.stages[0].model.forward_flops_per_token(16)
        extra = base if kind == "rho_1" else 3 * (forward + base)
        assert pace.step_flops(16) - pace.training_flops(16) == pytest.approx(128 * extra)


def test_a_run_goes_on_with_its_own_reference_alone(reference: Path, tmp_path: Path) -> None:
    copy = tmp_path / "reference"
    shutil.copytree(reference, copy)
    path = small(tmp_path, kind="rho_1", reference=str(copy))
    env = {"GROWKIT_FAULT": "after_rename:1"}
    assert in_child("train", path, "run.name=run", env=env) == -signal.SIGKILL
    shutil.rmtree(copy)
    run = tmp_path / "runs" / "run"
    assert "[reference-missing]" in cli("resume", run)[2]
    trained = recipe_dict(tmp_path, monitor=QUIET)
    trained["stages"] = [trained["stages"][0] | {"duration": "2 steps"}]
    assert in_child("train", write_recipe(tmp_path, trained), f"run.folder={tmp_path}", "run.name=reference") == 0
    assert "[reference-changed]" in cli("resume", run)[2]
    shutil.rmtree(copy)
    shutil.copytree(reference, copy)
    assert in_child("resume", run) == 0
