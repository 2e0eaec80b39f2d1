"""What can be wrong with a recipe's sections, each by itself. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from growkit.config.recipe import DataConfig, LoggerConfig, Recipe
from growkit.data.screen import check_screen
from growkit.duration import Duration
from growkit.errors import ConfigError
from growkit.schedule.lr import LR_BY

PACKINGS = ("none", "documents", "best_fit", "decompose")


def check_sections(recipe: Recipe) -> None:
    """Raises ConfigError for a value that can be told to be wrong without the stages."""
    optim, trainer, monitor = recipe.optim, recipe.trainer, recipe.monitor
    for key, value in (("optim.lr", optim.lr), ("optim.eps", optim.eps)):
        if not value > 0:
            raise ConfigError("not-positive", "must be above zero", key=key, value=value)
    for key, value in (("optim.beta1", optim.beta1), ("optim.beta2", optim.beta2)):
        if not 0 <= value < 1:
            raise ConfigError("out-of-range", "must be in [0, 1)", key=key, value=value)
    for name in ("weight_decay", "clip_norm", "z_loss"):
        at_least(getattr(optim, name), 0, f"optim.{name}")
    choices = {
        "accelerator": ("auto", "cpu", "cuda"),
        "strategy": ("single", "ddp", "fsdp"),
        "precision": ("auto", "bf16", "fp32"),
        "backend": ("auto", "triton", "compiled", "reference"),
    }
    for name, allowed in choices.items():
        one_of(getattr(trainer, name), allowed, f"trainer.{name}")
    at_least(trainer.devices, 1, "trainer.devices")
    if (trainer.strategy == "single") != (trainer.devices == 1):
        mend = "use strategy single with one device, ddp or fsdp with several"
        problem = f"does not go with trainer.devices = {trainer.devices}"
        raise ConfigError("strategy-devices", problem, key="trainer.strategy", value=trainer.strategy, mend=mend)
    at_least(trainer.keep_last, 1, "trainer.keep_last")
    at_least(trainer.loss_chunk_tokens, 0, "trainer.loss_chunk_tokens")
    if trainer.max_minutes is not None and not trainer.max_minutes > 0:
        raise ConfigError("not-positive", "must be above zero", key="trainer.max_minutes", value=trainer.max_minutes)
    one_of(optim.lr_by, LR_BY, "optim.lr_by")
    one_of(monitor.progress, ("auto", "bar", "plain", "off"), "monitor.progress")
    if monitor.peak_flops_per_second is not None and not monitor.peak_flops_per_second > 0:
        key, value = "monitor.peak_flops_per_second", monitor.peak_flops_per_second
        raise ConfigError("not-positive", "must be above zero", key=key, value=value)
    for name in ("peak_flops_per_second", "utilisation", "memory_gb", "price_per_hour", "watts"):
        figure = getattr(recipe.hardware, name)
        if figure is not None and not figure > 0:
            raise ConfigError("not-positive", "must be above zero", key=f"hardware.{name}", value=figure)
    if (share := recipe.hardware.utilisation) is not None and share > 1:
        raise ConfigError("out-of-range", "must be at most 1", key="hardware.utilisation", value=share)
    for name, least in (("log_every", 1), ("validation_tokens", 1), ("probe_tokens", 2), ("sample_tokens", 0)):
        at_least(getattr(monitor, name), least, f"monitor.{name}")
    if not 0 <= monitor.ngram_order <= 7:
        raise ConfigError("out-of-range", "must be in 0..7", key="monitor.ngram_order", value=monitor.ngram_order)
    _check_logger(recipe.logger)
    fraction = recipe.data.validation_fraction
    if not 0 < fraction <= 0.5:
        key = "data.validation_fraction"
        raise ConfigError("out-of-range", "must be above 0 and at most 0.5", key=key, value=fraction)
    one_of(recipe.data.packing, PACKINGS, "data.packing")
    _check_workers(recipe.data)
    check_screen(recipe.data.screen)
    title = recipe.run.name
    if title is not None and (not title or title in (".", "..") or "/" in title or not title.isprintable()):
        mend = "use one folder name without /; run.folder says where"
        raise ConfigError("bad-name", "cannot be the name of a folder", key="run.name", value=title, mend=mend)
    if recipe.run.threads is not None:
        at_least(recipe.run.threads, 1, "run.threads")
    if not 0 <= recipe.run.seed < 2**63:
        raise ConfigError("out-of-range", "must be in 0..2^63-1", key="run.seed", value=recipe.run.seed)


def _check_workers(data: DataConfig) -> None:
    at_least(data.workers, 0, "data.workers")
    at_least(data.prefetch, 1, "data.prefetch")
    learns = data.bandit is not None or (data.select is not None and data.select.kind == "importance")
    if data.workers and learns:
        name = "bandit" if data.bandit is not None else "select"
        problem = f"make steps before data.{name} knows what it chooses for them"
        mend = f"use data.workers=0, or leave data.{name} out"
        raise ConfigError("workers-too-early", problem, key="data.workers", value=data.workers, mend=mend)


def _check_logger(logger: LoggerConfig) -> None:
    one_of(logger.kind, ("none", "wandb", "tensorboard", "csv"), "logger.kind")
    one_of(logger.mode, ("auto", "online", "offline"), "logger.mode")
    one_of(logger.artifacts, ("none", "ends", "all"), "logger.artifacts")
    for key, name in (("project", logger.project), ("entity", logger.entity)):
        if name is not None and (not name or set(name) & set("/\\#?%:") or not name.isprintable()):
            mend = "use a name without / \\ # ? % and :"
            raise ConfigError(
                "bad-name", "cannot be one in Weights & Biases", key=f"logger.{key}", value=name, mend=mend
            )


def whole_steps(text: str, key: str) -> int:
    duration = Duration.parse(text, key=key)
    if duration.unit != "steps" or duration.amount < 1:
        raise ConfigError("bad-duration", "must be a number of steps", key=key, value=text, mend="such as '200 steps'")
    return int(duration.amount)


@contextmanager
def blamed(prefix: str) -> Iterator[None]:
    """Puts the stage in front of a growth error's key."""
    try:
        yield
    except ConfigError as error:
        key = f"{prefix}.{error.key}"
        raise ConfigError(error.code, error.problem, key=key, value=error.value, mend=error.mend) from error


def one_of(value: str, allowed: Sequence[str], key: str) -> None:
    if value not in allowed:
        raise ConfigError(
            "unknown-choice", "is not allowed", key=key, value=value, mend=f"allowed: {', '.join(allowed)}"
        )


def at_least(value, least, key: str):  # type: ignore[no-untyped-def]
    if not value >= least:
        raise ConfigError("too-small", f"must be at least {least}", key=key, value=value)
    return value
