"""Opening a checkpoint; ``growkit inspect`` and ``generate``: what can be done with one without training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from growkit.checkpoint import manifest as manifests
from growkit.checkpoint.hf.folder import ModelFolder
from growkit.checkpoint.hf.source import is_model_folder, travelling
from growkit.checkpoint.opening import open_any
from growkit.checkpoint.store import Checkpoint
from growkit.config.load import parse_recipe
from growkit.config.recipe import BYTES, DataConfig
from growkit.data.synthetic.tasks import is_task
from growkit.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_in
from growkit.duration import quantity
from growkit.errors import ConfigError, DataError
from growkit.eval.generate import sample_text
from growkit.eval.ngram import bits
from growkit.models.config import DenseMLP, Mamba, MoEMLP, PattentionMLP
from growkit.models.decoder import build
from growkit.models.presets import PRESETS
from growkit.schedule.decisions import decided
from growkit.train.display import growth_table

console = Console(highlight=False)
MIN_TEMPERATURE = 1e-3  # below it, logits over temperature leave the range of float32


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """What the checkpoint's ids are of: its recipe's tokenizer, or one that lies beside weights that no recipe of
    growkit made, or bytes. Raises DataError if it is no longer what the checkpoint was trained with or if that was no
    text, and ConfigError if the model lacks some of its ids."""
    manifest = checkpoint.manifest
    if manifest.recipe:
        data = parse_recipe(manifest.recipe, [], PRESETS, name="the checkpoint's recipe").data
        if is_task(data.source):
            problem = f"was trained on {data.source}, whose tokens are no text"
            mend = "`growkit eval` scores it on the task"
            raise DataError("not-text", problem, key=str(checkpoint.folder), mend=mend)
    else:
        data = DataConfig(tokenizer=tokenizer_in(checkpoint.folder) or BYTES)
    tokenizer = load_tokenizer(data)
    tokenizer.require_same(manifest.corpus.get("tokenizer", tokenizer.identity))
    tokenizer.require_room(manifest.model.vocab_size)
    return tokenizer


def tokenizer_files(checkpoint: Checkpoint) -> list[Path]:
    """The files of the tokenizer that the checkpoint's weights came with, and what goes with it: where no recipe says
    what ids are of, they lie beside the weights, and go where these go."""
    return [] if checkpoint.manifest.recipe else travelling(checkpoint.folder)


def origin_of(checkpoint: Checkpoint) -> Path | None:
    """Where the model's own tokenizer files lie, if it came from Hugging Face: in the checkpoint's folder, or in that
    which its recipe names."""
    manifest = checkpoint.manifest
    if not manifest.recipe:
        return checkpoint.folder if tokenizer_in(checkpoint.folder) is not None else None
    data = parse_recipe(manifest.recipe, [], PRESETS, name="the checkpoint's recipe").data
    folder = Path(data.tokenizer).expanduser()
    ours = (folder / manifests.NAME).is_file()  # a checkpoint that was made of such a folder
    return folder if data.end_token is None and (ours or is_model_folder(folder)) else None


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
    table = Table("layer", "copied from", "mixer", "MLP")
    for layer in config.layers:
        mixer = layer.mixer
        if isinstance(mixer, Mamba):
            mixes = f"mamba, {mixer.inner} channels × {mixer.state}; in {_projection(mixer.in_proj)}"
        else:
            mixes = f"{mixer.num_heads} heads × {mixer.head_dim}, {mixer.num_kv_heads} kv; q {_projection(mixer.q)}"
        table.add_row(str(layer.id), "–" if layer.origin is None else str(layer.origin), mixes, _mlp(layer.mlp))
    console.print(table)
    for entry in manifest.lineage:
        if entry["kind"] == "growth":
            console.print(growth_table(entry))
        elif entry["kind"] == "decision":
            console.print(decided(entry), markup=False, soft_wrap=True)
        else:
            nats = entry["validation_loss"]
            score = entry.get("bits_per_byte", bits(nats))  # entries from before there were tokenizers lack it
            in_bits = "unknown" if score is None else f"{score:.3f}"
            loss = f"validation loss {nats:.4f} nats ({in_bits} bits per byte)"
            if (share := entry.get("sequence_accuracy")) is not None:  # of a synthetic task
                loss = f"validation loss {nats:.4f} nats, {share:.2%} of the sequences right"
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


def _mlp(spec: DenseMLP | MoEMLP | PattentionMLP | None) -> str:
    if spec is None:
        return "–"
    if isinstance(spec, PattentionMLP):
        return _projection(spec.projection)
    if isinstance(spec, DenseMLP):
        return f"{spec.kind} {spec.dim}"
    block = spec.kind.removeprefix("moe_")
    return f"{spec.num_experts} experts of {block} {spec.dim}, {spec.experts_per_token} per token"


def _projection(spec: object) -> str:
    banks = getattr(spec, "banks", None)
    return "linear" if banks is None else f"tokens {' + '.join(map(str, banks))}"
