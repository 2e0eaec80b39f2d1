"""What this machine reaches: a matrix product's speed, and how much of it a recipe's own training steps use."""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from growkit.config.recipe import Recipe, TrainerConfig
from growkit.errors import ConfigError
from growkit.models.decoder import build, init_params
from growkit.models.visible import Visible, visible
from growkit.planner.hardware import THIS_MACHINE, Hardware, this_machine
from growkit.schedule.stage import GrowthSchedule, Stage
from growkit.train.hardware import accelerator, measure_peak_flops, training_dtype

if TYPE_CHECKING:
    pass

SECONDS = 1.0  # of micro-batches that are timed in each stage
FEWEST, MOST = 3, 50  # of them
PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def measure(
    recipe: Recipe, schedule: GrowthSchedule, listener: Callable[[str], None]
) -> tuple[Hardware, tuple[float, ...]]:
    """(This machine in the recipe's precision, the seconds of a step in each stage). Its utilisation is what the stages
    reach together, each with its share of the time; ``listener`` is told of each. A precision measured before stays.
    Raises ConfigError."""
    device, dtype = accelerator(recipe.trainer), training_dtype(recipe.trainer)
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    precision = PRECISIONS[dtype]
    peak = measure_peak_flops(device, dtype)
    steps = []
    for stage in schedule.stages:
        steps.append(step_seconds(recipe, stage, device, dtype))
        share = stage.total_flops / stage.steps / steps[-1] / peak
        listener(f"{stage.name}: {steps[-1]:.3g} s a step, {share:.0%} of the peak")
    seconds = sum(stage.steps * step for stage, step in zip(schedule.stages, steps, strict=True))
    flops = sum(stage.total_flops for stage in schedule.stages)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    before = _before(device == "cuda")
    machine = Hardware(
        THIS_MACHINE,
        peaks=before.get("peaks", {}) | {precision: peak},
        utilisations=before.get("utilisations", {}) | {precision: flops / seconds / peak},
        memory_bytes=_memory(device),
        price_per_hour=None,
        watts=None,
        source=f"{name}, torch {torch.__version__}, measured {datetime.date.today().isoformat()}",
        cuda=device == "cuda",
        automatic=PRECISIONS[training_dtype(TrainerConfig())],
    )
    return machine, tuple(steps)


def step_seconds(recipe: Recipe, stage: Stage, device: str, dtype: torch.dtype) -> float:
    """Wall clock of one optimizer step of ``stage``: medians of a micro-batch, as often as a step has them, of AdamW's
    update, and of the forward passes after it, if any, on a fresh model and random tokens. Where lengths differ: the
    mean over the stage's steps. Choosing what to train on by its losses is not timed: its FLOPs are taken to go as fast
    as training's."""
    trainer = recipe.trainer
    params = init_params(stage.model, torch.Generator().manual_seed(recipe.run.seed))
    model = build(
        stage.model,
        {name: tensor.to(device) for name, tensor in params.items()},
        copy=False,
        backend=trainer.backend,
        checkpoint_layers=trainer.checkpoint_layers,
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    if trainer.compile:
        model.compile(dynamic=False)
    shapes = {length: stage.pace.shape(length).rows // stage.pace.parts for length in stage.lengths.values}

    def read(tokens: Tensor, mask: Visible | None) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss: Tensor = model(
                tokens, tokens, mask=mask, z_loss=recipe.optim.z_loss, chunk_tokens=trainer.loss_chunk_tokens
            ).total
        return loss

    def micro_batch(tokens: Tensor, mask: Visible | None) -> None:
        read(tokens, mask).backward()  # type: ignore[no-untyped-call]

    def look_again(tokens: Tensor, mask: Visible | None) -> None:
        with torch.set_grad_enabled(trainer.compile):  # as train/gain.py does
            read(tokens, mask)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_norm or float("inf"))
        optimizer.step()

    seconds = 0.0
    for length, count in stage.lengths.counts(stage.steps):
        tokens = torch.randint(stage.model.vocab_size, (shapes[length], length), device=device)
        mask = visible(tokens, None, stage.shape(0).window)
        work = partial(micro_batch, tokens, mask)
        work()  # warms caches and the allocator
        update()
        share = count / stage.steps * stage.accumulate
        choosing = stage.pace.choosing_flops(length) / stage.pace.training_flops(length)
        seconds += share * (1 + choosing) * _median_seconds(work, device)
        if stage.pace.again:
            seconds += share * stage.pace.again * _median_seconds(partial(look_again, tokens, mask), device)
    return seconds + _median_seconds(update, device)


def _median_seconds(work: Callable[[], None], device: str) -> float:
    times: list[float] = []
    while len(times) < FEWEST or (sum(times) < SECONDS and len(times) < MOST):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _before(cuda: bool) -> dict[str, dict[str, float]]:
    """What an earlier measurement found on the same kind of device; one that cannot be read is replaced."""
    try:
        found = this_machine()
    except ConfigError:
        return {}
    if found is None or found.cuda != cuda:
        return {}
    return {"peaks": dict(found.peaks), "utilisations": dict(found.utilisations)}


def _memory(device: str) -> float:
    """Bytes of the device, or what this process may use of the machine's."""
    if device == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return float(min(physical, int(text)) if text.isdecimal() else physical)
