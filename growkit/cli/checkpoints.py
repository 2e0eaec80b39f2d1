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
from torch import Tensor

from growkit.checkpoint import store
from growkit.checkpoint.hf.folder import ModelFolder, read_folder, rounding, write_grown
from growkit.checkpoint.hf.source import is_model_folder
from growkit.checkpoint.hf.tokenformer import read_published
from growkit.checkpoint.manifest import Manifest
from growkit.checkpoint.metrics_log import encoded
from growkit.checkpoint.run_folder import MARK, RunFolder, log_before, run_of
from growkit.checkpoint.store import Checkpoint
from growkit.config.load import apply_override, parse_recipe
from growkit.config.recipe import BYTES, DataConfig
from growkit.data.corpus import whole_text
from growkit.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_in
from growkit.duration import quantity
from growkit.errors import ConfigError, DataError
from growkit.eval.generate import sample_text
from growkit.eval.ngram import bits
from growkit.growth.engine import growth_report, lazy_states
from growkit.growth.path import grown_config, path
from growkit.models.config import DenseMLP, MoEMLP, PattentionMLP
from growkit.models.decoder import build
from growkit.models.presets import PRESETS
from growkit.schedule.progress import Progress
from growkit.train.display import growth_table

console = Console(highlight=False)
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
OWN_MAPPING_BYTES = 1 << 18  # blocks from here on are mapped on their own while a checkpoint grows
MIN_TEMPERATURE = 1e-3  # below it, logits over temperature leave the range of float32


def open_any(folder: Path, step: int | None = None) -> Checkpoint:
    """A checkpoint or Hugging Face folder, or the latest checkpoint (or that of ``step``) of a run folder. Raises
    CheckpointError, and ConfigError for a Hugging Face model growkit does not know."""
    if (folder / MARK).is_file():
        return RunFolder.open(folder).load(step)
    if step is not None:
        mend = "name a run folder, or leave --from out"
        raise ConfigError("no-such-step", "is for a run, and this is not one", key="--from", value=step, mend=mend)
    return read_folder(folder) if is_model_folder(folder) else store.read(folder)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """What the checkpoint's ids are of: its recipe's tokenizer, or one that lies beside weights that no recipe of
    growkit made, or bytes. Raises DataError if it is no longer what the checkpoint was trained with, and ConfigError if
    the model lacks some of its ids."""
    manifest = checkpoint.manifest
    if manifest.recipe:
        data = parse_recipe(manifest.recipe, [], PRESETS, name="the checkpoint's recipe").data
    else:
        data = DataConfig(tokenizer=tokenizer_in(checkpoint.folder) or BYTES)
    tokenizer = load_tokenizer(data)
    tokenizer.require_same(manifest.corpus.get("tokenizer", tokenizer.identity))
    tokenizer.require_room(manifest.model.vocab_size)
    return tokenizer


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
    _refuse_existing(output)
    _give_freed_blocks_back()
    checkpoint = open_any(source)
    folder = checkpoint if isinstance(checkpoint, ModelFolder) and not as_growkit else None
    if dtype is not None and folder is None:
        problem = "is for Hugging Face folders: growkit's own checkpoints are float32"
        raise ConfigError("bad-command-line", problem, key="--dtype", value=dtype, mend="leave it out")
    fields: dict[str, Any] = {}
    for target in targets:
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
        probe = torch.randint(config.vocab_size, (1, probe_tokens + 1), generator=generator.manual_seed(seed))
    report = growth_report(checkpoint.state, grown, links, probe)
    step = checkpoint.manifest.progress.step
    event = {"kind": "growth", "stage": stage, "name": output.name, "step": step} | report.record()
    if folder is not None:
        stored = getattr(torch, dtype) if dtype is not None else folder.dtype
        event |= {"source": source.name, "dtype": str(stored).removeprefix("torch.")}
        if stored != torch.float32:
            event["delta_logits_stored"] = rounding(grown[-1], stored, probe)
        write_grown(folder, output, grown[-1], event, stored)
        _show_grown(event, output)
        return
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
    _show_grown(event, output)


def convert_published(file: Path, output: Path, num_heads: int) -> None:
    """Writes the published TokenFormer weights in ``file`` as a growkit checkpoint at ``output``."""
    _refuse_existing(output)
    state = read_published(file, num_heads)
    store.write(output, state, Manifest(state.config, Progress()))
    config = state.config
    size = f"{config.num_params():,} parameters, {len(config.layers)} layers of width {config.embed_dim}"
    console.print(f"wrote {output}: {size}", soft_wrap=True, markup=False)


def _refuse_existing(output: Path) -> None:
    if output.exists():
        mend = "name a folder that does not exist"
        raise ConfigError("file-exists", "is already there", key="--output", value=str(output), mend=mend)


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
    sound = "sound, every file matches its hash"
    if isinstance(checkpoint, ModelFolder):
        stored = str(checkpoint.dtype).removeprefix("torch.")
        sound = f"{checkpoint.adapter.architecture} in {stored}; every tensor is there and of its shape"
    console.print(f"[bold]{escape(str(checkpoint.folder))}[/bold]: {sound}", soft_wrap=True)
    console.print(
        f"step {at.step} (stage {at.stage + 1}), {quantity(at.tokens)} tokens, {quantity(at.flops)} FLOPs; "
        f"{config.num_params():,} parameters, {len(config.layers)} layers of width {config.embed_dim}"
    )
    table = Table("layer", "copied from", "attention", "MLP")
    for layer in config.layers:
        mixer = layer.mixer
        heads = f"{mixer.num_heads} heads × {mixer.head_dim}, {mixer.num_kv_heads} kv; q {_projection(mixer.q)}"
        table.add_row(str(layer.id), "–" if layer.origin is None else str(layer.origin), heads, _mlp(layer.mlp))
    console.print(table)
    for entry in manifest.lineage:
        if entry["kind"] == "growth":
            console.print(growth_table(entry))
        else:
            nats = entry["validation_loss"]
            score = entry.get("bits_per_byte", bits(nats))  # entries from before there were tokenizers lack it
            in_bits = "unknown" if score is None else f"{score:.3f}"
            loss = f"validation loss {nats:.4f} nats ({in_bits} bits per byte)"
            console.print(f"stage {entry['name']} ended at step {entry['step']}: {loss}", markup=False)
    console.print(", ".join(f"{key} {value}" for key, value in manifest.environment.items()), soft_wrap=True)


def generate_text(folder: Path, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> None:
    if temperature and not MIN_TEMPERATURE <= temperature < math.inf:
        problem = f"must be 0, or a number from {MIN_TEMPERATURE} on"
        raise ConfigError("out-of-range", problem, key="--temperature", value=temperature)
    checkpoint = open_any(folder)
    tokenizer = tokenizer_of(checkpoint)
    model = build(checkpoint.manifest.model, checkpoint.state.params, copy=False)
    options: dict[str, Any] = {"seed": seed, "temperature": temperature, "top_k": top_k}
    text = sample_text(model, prompt, tokens, tokenizer=tokenizer, **options)
    console.print(text, markup=False, soft_wrap=True)


def _mlp(spec: DenseMLP | MoEMLP | PattentionMLP) -> str:
    if isinstance(spec, PattentionMLP):
        return _projection(spec.projection)
    if isinstance(spec, DenseMLP):
        return f"{spec.kind} {spec.dim}"
    block = spec.kind.removeprefix("moe_")
    return f"{spec.num_experts} experts of {block} {spec.dim}, {spec.experts_per_token} per token"


def _projection(spec: object) -> str:
    banks = getattr(spec, "banks", None)
    return "linear" if banks is None else f"tokens {' + '.join(map(str, banks))}"
