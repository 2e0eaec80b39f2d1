"""``growkit grow``, ``inspect`` and ``generate``: what can be done with a checkpoint without training."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from growkit.checkpoint import store
from growkit.checkpoint.metrics_log import encoded
from growkit.checkpoint.run_folder import MARK, RunFolder, log_before, run_of
from growkit.checkpoint.store import Checkpoint
from growkit.config.load import apply_override
from growkit.duration import quantity
from growkit.errors import ConfigError
from growkit.eval.generate import sample_text
from growkit.eval.ngram import bits
from growkit.growth.engine import growth_report, lazy_states
from growkit.growth.path import grown_config, path
from growkit.models.decoder import build
from growkit.train.display import growth_table

console = Console(highlight=False)
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
OWN_MAPPING_BYTES = 1 << 18  # blocks from here on are mapped on their own while a checkpoint grows
MIN_TEMPERATURE = 1e-3  # below it, logits over temperature leave the range of float32


def open_any(folder: Path, step: int | None = None) -> Checkpoint:
    """A checkpoint folder, or the latest checkpoint (or that of ``step``) of a run folder. Raises CheckpointError."""
    if (folder / MARK).is_file():
        return RunFolder.open(folder).load(step)
    if step is not None:
        mend = "name a run folder, or leave --from out"
        raise ConfigError("no-such-step", "is for a run, and this is not one", key="--from", value=step, mend=mend)
    return store.read(folder)


def grow_checkpoint(source: Path, targets: Sequence[str], output: Path, seed: int, probe_tokens: int) -> None:
    """Grows ``source`` into a new checkpoint at ``output``; tensors stream, its certificate's too, so memory
    holds a few at a time."""
    if output.exists():
        mend = "name a folder that does not exist"
        raise ConfigError("file-exists", "is already there", key="--output", value=str(output), mend=mend)
    _give_freed_blocks_back()
    checkpoint = open_any(source)
    fields: dict[str, Any] = {}
    for target in targets:
        apply_override(fields, target)
    methods = fields.pop("methods", {})
    if not isinstance(methods, dict) or not all(isinstance(method, str) for method in methods.values()):
        mend = "write methods.OPERATOR=METHOD"
        raise ConfigError("not-a-section", "must name a method for each", key="methods", value=methods, mend=mend)
    config = checkpoint.manifest.model
    wanted = grown_config(config, fields, methods)
    links = path(config, wanted, methods)
    stage = checkpoint.manifest.progress.stage + 1
    grown = lazy_states(checkpoint.state, links, torch.Generator().manual_seed(seed), stage=stage)
    probe = torch.randint(config.vocab_size, (1, probe_tokens + 1), generator=torch.Generator().manual_seed(seed))
    report = growth_report(checkpoint.state, grown, links, probe)
    step = checkpoint.manifest.progress.step
    event = {"kind": "growth", "stage": stage, "name": output.name, "step": step} | report.record()
    run, at = run_of(checkpoint.folder), checkpoint.manifest.progress
    if run is not None:
        event["run"] = run.path.name
    place = {"tokens": at.tokens, "flops": at.flops, "seconds": checkpoint.manifest.seconds}
    log = log_before(checkpoint.folder, checkpoint.manifest) + encoded(event | place)
    manifest = dataclasses.replace(
        checkpoint.manifest,
        model=wanted,
        lineage=(*checkpoint.manifest.lineage, event),
        log_bytes=len(log),
        layout="whole",
    )
    store.write(output, grown[-1], manifest, log=log)
    console.print(growth_table(event))
    console.print(f"wrote {output}", soft_wrap=True, markup=False)


def _give_freed_blocks_back() -> None:
    """glibc keeps freed blocks of up to 32 MB in its heap, where they lie between others: growing 1.3B parameters, it
    held 1.7 GB that nobody used. Mapped on their own, they go back when they are freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library has neither this nor the habit
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES)


def inspect_checkpoint(folder: Path) -> None:
    checkpoint = open_any(folder)
    manifest, config = checkpoint.manifest, checkpoint.manifest.model
    at = manifest.progress
    console.print(f"[bold]{escape(str(checkpoint.folder))}[/bold]: sound, every file matches its hash", soft_wrap=True)
    console.print(
        f"step {at.step} (stage {at.stage + 1}), {quantity(at.tokens)} tokens, {quantity(at.flops)} FLOPs; "
        f"{config.num_params():,} parameters, {len(config.layers)} layers of width {config.embed_dim}"
    )
    table = Table("layer", "copied from", "attention", "MLP")
    for layer in config.layers:
        mixer = layer.mixer
        heads = f"{mixer.num_heads} heads × {mixer.head_dim}, {mixer.num_kv_heads} kv; q {_projection(mixer.q)}"
        mlp = (
            _projection(layer.mlp.projection) if layer.mlp.kind == "pattention" else f"{layer.mlp.kind} {layer.mlp.dim}"
        )
        table.add_row(str(layer.id), "–" if layer.origin is None else str(layer.origin), heads, mlp)
    console.print(table)
    for entry in manifest.lineage:
        if entry["kind"] == "growth":
            console.print(growth_table(entry))
        else:
            nats = entry["validation_loss"]
            loss = f"validation loss {nats:.4f} nats ({bits(nats):.3f} bits per byte)"
            console.print(f"stage {entry['name']} ended at step {entry['step']}: {loss}", markup=False)
    console.print(", ".join(f"{key} {value}" for key, value in manifest.environment.items()), soft_wrap=True)


def generate_text(folder: Path, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> None:
    if temperature and not MIN_TEMPERATURE <= temperature < math.inf:
        problem = f"must be 0, or a number from {MIN_TEMPERATURE} on"
        raise ConfigError("out-of-range", problem, key="--temperature", value=temperature)
    checkpoint = open_any(folder)
    model = build(checkpoint.manifest.model, checkpoint.state.params, copy=False)
    text = sample_text(model, prompt, tokens, seed=seed, temperature=temperature, top_k=top_k)
    console.print(text, markup=False, soft_wrap=True)


def _projection(spec: object) -> str:
    banks = getattr(spec, "banks", None)
    return "linear" if banks is None else f"tokens {' + '.join(map(str, banks))}"
