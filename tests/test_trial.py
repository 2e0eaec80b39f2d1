"""A larger model's first step is tried before the growth is committed; short memory shrinks the micro-batch."""

from __future__ import annotations

import dataclasses
import multiprocessing
import resource
from pathlib import Path

import pytest
import torch

from growkit.config.load import parse_recipe
from growkit.errors import TrainingError
from growkit.growth.state import TrainState
from growkit.models.decoder import DecoderLM, init_params
from growkit.models.presets import PRESETS
from growkit.schedule.plan import growth_schedule
from growkit.train.trial import fitting_micro_batch
from tests.support import cli, recipe_dict, records, write_recipe


def planned(folder: Path, **stage: object):  # type: ignore[no-untyped-def]
    recipe = recipe_dict(folder)
    recipe["stages"][0] |= stage
    loaded = parse_recipe(write_recipe(folder, recipe).read_text(), [], PRESETS, name="recipe")
    schedule = growth_schedule(loaded)
    config = schedule.stages[0].model
    return loaded, schedule, TrainState(config, init_params(config, torch.Generator().manual_seed(0)))


def _limited(folder: str, queue) -> None:  # type: ignore[no-untyped-def]
    """In a process of its own: allow 400 MB more than it has now, and ask for a step that needs several GB."""
    torch.set_num_threads(1)
    sizes = {"context_length": 512, "global_batch_tokens": 512 * 512, "micro_batch_size": 512}
    recipe, schedule, state = planned(Path(folder), **sizes)
    fitting_micro_batch(
        state, dataclasses.replace(schedule.stages[0], micro_batch_size=1), recipe, "cpu", torch.float32
    )
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 400 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    queue.put(fitting_micro_batch(state, schedule.stages[0], recipe, "cpu", torch.float32))


def test_short_memory_halves_the_micro_batch(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    queue = context.SimpleQueue()
    child = context.Process(target=_limited, args=(str(tmp_path), queue))
    child.start()
    child.join()
    assert child.exitcode == 0
    size = queue.get()
    assert 1 <= size < 512 and 512 % size == 0


def _short_of_memory(monkeypatch: pytest.MonkeyPatch, rows_that_fit: int) -> None:
    """Makes passes over more rows fail as the CPU allocator does."""
    forward = DecoderLM.forward

    def limited(self: DecoderLM, tokens: torch.Tensor, *args: object, **kwargs: object) -> object:
        if tokens.shape[0] > rows_that_fit and self.training:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
            )
        return forward(self, tokens, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(DecoderLM, "forward", limited)


def test_the_run_goes_on_at_constant_global_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same steps, same tokens, same losses up to the order of sums, with micro-batches of half the size."""
    recipe = recipe_dict(tmp_path)
    recipe["model"]["dropout"] = 0.0
    path = write_recipe(tmp_path, recipe)
    assert cli("train", path, "run.name=roomy")[0] == 0
    _short_of_memory(monkeypatch, rows_that_fit=2)
    assert cli("train", path, "run.name=tight")[0] == 0
    roomy, tight = (records(tmp_path / "runs" / name, "step") for name in ("roomy", "tight"))
    assert [(r["step"], r["tokens"], r["flops"]) for r in roomy] == [
        (r["step"], r["tokens"], r["flops"]) for r in tight
    ]
    assert all(abs(a["loss"] - b["loss"]) < 1e-4 for a, b in zip(roomy, tight, strict=True))


def test_no_room_for_one_sequence_stops_before_the_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, schedule, state = planned(tmp_path)
    before = {name: tensor.clone() for name, tensor in state.params.items()}
    random_state = torch.get_rng_state()
    _short_of_memory(monkeypatch, rows_that_fit=0)
    with pytest.raises(TrainingError, match=r"stages\.0\.micro_batch_size.*out-of-memory"):
        fitting_micro_batch(state, schedule.stages[0], recipe, "cpu", torch.float32)
    assert all(torch.equal(before[name], state.params[name]) for name in before)
    assert torch.equal(random_state, torch.get_rng_state())


def test_other_errors_are_not_taken_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, schedule, state = planned(tmp_path)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(DecoderLM, "forward", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        fitting_micro_batch(state, schedule.stages[0], recipe, "cpu", torch.float32)
