"""``growkit grow``, ``merge`` and ``convert``: one checkpoint made of others, without training."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from growkit.checkpoint import store
from growkit.checkpoint.hf.folder import ModelFolder, refuse_existing, rounding, write_grown
from growkit.checkpoint.hf.tokenformer import read_published
from growkit.checkpoint.manifest import Manifest
from growkit.checkpoint.metrics_log import encoded
from growkit.checkpoint.opening import open_any
from growkit.checkpoint.run_folder import log_before, run_of
from growkit.checkpoint.store import Checkpoint
from growkit.cli.checkpoints import tokenizer_files, tokenizer_of
from growkit.config.load import apply_override
from growkit.config.recipe import DataConfig
from growkit.data.corpus import whole_text
from growkit.errors import ConfigError, DataError
from growkit.growth.banks import merge, merge_record
from growkit.growth.engine import growth_report, lazy_states
from growkit.growth.path import grown_config, path
from growkit.growth.state import TrainState
from growkit.models.config import ModelConfig
from growkit.schedule.progress import Progress
from growkit.train.display import growth_table

console = Console(highlight=False)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
MAPPED_BYTES = 16 << 20  # of a block that is not the heap's; in pages of 2 MB (growkit.cli) it is soon filled


def grow_checkpoint(
    source: Path,
    targets: Sequence[str],
    output: Path,
    seed: int,
    probe_tokens: int,
    data: str | None = None,
    *,
    as_growkit: bool = False,
    dtype: str | None = None,
) -> None:
    """Grows ``source`` into a new checkpoint at ``output``; tensors stream, its certificate's too, so memory holds a
    few at a time (methods that look before they grow hold the model once). ``data``: text that the certificate is
    measured on, and that methods which look before they grow choose by; without it, random tokens, for the certificate
    only. A Hugging Face folder becomes another one, its tensors in ``dtype`` or as they were, unless ``as_growkit``."""
    refuse_existing(output, "--output")
    _give_back_large_blocks()
    checkpoint = open_any(source, verify=False)  # it is, beside the growth
    folder = checkpoint if isinstance(checkpoint, ModelFolder) and not as_growkit else None
    if dtype is not None and folder is None:
        problem = "is for Hugging Face folders: growkit's own checkpoints are float32"
        raise ConfigError("bad-command-line", problem, key="--dtype", value=dtype, mend="leave it out")
    fields: dict[str, Any] = {}
    said: dict[str, str] = {}
    for target in targets:
        key = target.partition("=")[0]
        if key in said:
            problem = f"is said twice, as {said[key]!r} and as {target!r}"
            raise ConfigError("bad-override", problem, key=key, mend="say it once")
        said[key] = target
        apply_override(fields, target)
    methods = fields.pop("methods", {})
    if not isinstance(methods, dict) or not all(isinstance(method, str) for method in methods.values()):
        mend = "write methods.OPERATOR=METHOD"
        raise ConfigError("not-a-section", "must name a method for each", key="methods", value=methods, mend=mend)
    config = checkpoint.manifest.model
    wanted = grown_config(config, fields, methods)
    if folder is not None:
        folder.adapter.fields(wanted)  # refused before anything is grown
    if wanted.ramp < 1:
        problem = "comes in over a stage's grow_time, and there is no stage here"
        mend = "write it into a stage of a recipe (`growkit extend`), or use another method"
        raise ConfigError("method-does-not-fit", problem, key="methods", value=methods, mend=mend)
    links = path(config, wanted, methods)
    stage = checkpoint.manifest.progress.stage + 1
    generator = torch.Generator().manual_seed(seed)
    probe = None if data is None else _probe(checkpoint, data, probe_tokens)
    grown = lazy_states(checkpoint.state, links, generator, stage=stage, probe=probe)
    if probe is None:
        probe = _random_probe(config, seed, probe_tokens)
    at = checkpoint.manifest.progress
    event = {"kind": "growth", "stage": stage, "name": output.name, "step": at.step}
    if folder is not None:
        event |= growth_report(grown, probe).record()
        stored = getattr(torch, dtype) if dtype is not None else folder.dtype
        event |= {"source": source.name, "dtype": str(stored).removeprefix("torch.")}
        if stored != torch.float32:
            event["delta_logits_stored"] = rounding(grown[-1], stored, probe)
        write_grown(folder, output, grown[-1], event, stored)
        _show_grown(event, output)
        return
    run = run_of(checkpoint.folder)
    if run is not None:
        event["run"] = run.path.name
    place = {"tokens": at.tokens, "flops": at.flops, "seconds": checkpoint.manifest.seconds}

    def describe(written: TrainState) -> tuple[Manifest, bytes]:
        event.update(growth_report(grown, probe, grown=written).record())
        wait_until_checked()
        log = log_before(checkpoint.folder, checkpoint.manifest) + encoded(event | place)
        manifest = dataclasses.replace(
            checkpoint.manifest,
            model=wanted,
            lineage=(*checkpoint.manifest.lineage, event),
            log_bytes=len(log),
            layout="whole",
        )
        return manifest, log

    beside = tokenizer_files(checkpoint)
    kept = store.Kept(checkpoint, grown.kept_params, grown.kept_moments())
    with store.checked_beside(checkpoint, unread=kept.files("moments")) as wait_until_checked:
        store.write_described(output, grown[-1], describe, kept=kept, beside=beside)
    _show_grown(event, output)


def merge_checkpoints(
    first: Path, second: Path, ancestor: Path, output: Path, data: str | None, probe_tokens: int
) -> None:
    """Writes the banks that ``first`` and ``second`` grew on ``ancestor`` side by side as a checkpoint at ``output``,
    with certificates of how far it is from each, measured on the text ``data`` or on random tokens."""
    refuse_existing(output, "--output")
    a, b, base = open_any(first), open_any(second), open_any(ancestor)
    merged = merge(a.state, b.state, base.state)
    probe = _probe(a, data, probe_tokens) if data is not None else _random_probe(merged.config, 0, probe_tokens)
    at, other, before = (one.manifest.progress for one in (a, b, base))
    stage = max(at.stage, other.stage) + 1
    event = {"kind": "growth", "stage": stage, "name": output.name, "step": at.step}
    event |= merge_record(a.state, merged, probe)
    theirs = merge_record(b.state, merged, probe)
    event["merged"] = {"checkpoint": str(b.folder), "lineage": list(b.manifest.lineage), "record": theirs}
    # What was spent on both, the ancestor counted once.
    spent = {key: getattr(at, key) + getattr(other, key) - getattr(before, key) for key in ("tokens", "flops")}
    log = log_before(a.folder, a.manifest) + encoded(event | spent | {"seconds": a.manifest.seconds})
    manifest = dataclasses.replace(
        a.manifest,
        model=merged.config,
        progress=dataclasses.replace(at, stage=max(at.stage, other.stage), **spent),
        lineage=(*a.manifest.lineage, event),
        log_bytes=len(log),
        layout="whole",
    )
    store.write(output, merged, manifest, log=log, beside=tokenizer_files(a))
    console.print(growth_table(event | {"name": f"{output.name}, from {first}"}))
    console.print(growth_table(event | theirs | {"name": f"{output.name}, from {second}"}))
    console.print(f"wrote {output}", soft_wrap=True, markup=False)


def convert_published(file: Path, output: Path, num_heads: int) -> None:
    """Writes the published TokenFormer weights in ``file`` as a growkit checkpoint at ``output``."""
    refuse_existing(output, "--output")
    state = read_published(file, num_heads)
    store.write(output, state, Manifest(state.config, Progress()))
    config = state.config
    size = f"{config.num_params():,} parameters, {len(config.layers)} layers of width {config.embed_dim}"
    console.print(f"wrote {output}: {size}", soft_wrap=True, markup=False)


def _show_grown(event: dict[str, Any], output: Path) -> None:
    console.print(growth_table(event))
    if "delta_logits_stored" in event:
        moved = f"{event['delta_logits_stored']:.1e}"
        console.print(
            f"stored as {event['dtype']}, which by itself moves the grown model's logits by {moved} (relative)"
        )
    console.print(f"wrote {output}", soft_wrap=True, markup=False)


def _probe(checkpoint: Checkpoint, data: str, tokens: int) -> Tensor:
    """(1, tokens + 1) from the middle of the text ``data``. Raises DataError."""
    text, _ = whole_text(DataConfig(source=data), tokenizer_of(checkpoint))
    if len(text) <= tokens:
        problem = f"has {len(text)} tokens, the probe {tokens + 1}"
        raise DataError("corpus-too-short", problem, key="--data", value=data, mend="use more text")
    first = (len(text) - tokens - 1) // 2
    return torch.from_numpy(text[first : first + tokens + 1].astype("int64"))[None]


def _random_probe(config: ModelConfig, seed: int, tokens: int) -> Tensor:
    return torch.randint(config.vocab_size, (1, tokens + 1), generator=torch.Generator().manual_seed(seed))


def _give_back_large_blocks() -> None:
    """One heap, for small blocks; those of ``MAPPED_BYTES`` and more are the kernel's, and go back to it. By default
    glibc has a heap for each thread and comes to take larger and larger blocks from them, where they end up between
    others: growing the MLPs of 1.3B parameters, 3 GB that nobody used."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library has neither this nor the habit
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(M_TRIM_THRESHOLD, MAPPED_BYTES)
