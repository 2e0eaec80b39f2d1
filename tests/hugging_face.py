"""Tiny models of transformers' own classes with large random weights, and the folders they save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
    "mamba": (MambaConfig, MambaForCausalLM),
    "falcon_mamba": (FalconMambaConfig, FalconMambaForCausalLM),
}
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MAMBA_SIZES: dict[str, Any] = {  # an odd rank of Δ, which is not a width / 16
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 5,
    "time_step_rank": 3,
    "layer_norm_epsilon": 1e-4,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rms_norm_eps": 1e-4},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    "gpt_neox": {"rotary_pct": 0.5},
    "mamba": {},
    "falcon_mamba": {"mixer_rms_eps": 1e-3},
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}


def model(family: str, *, seed: int = 0, **fields: Any) -> Any:
    """A model in evaluation, every parameter random, its logits of standard deviation ≥ 1."""
    config, kind = CLASSES[family]
    sizes = MAMBA_SIZES if "mamba" in family else SIZES
    made = kind(config(**(sizes | OWN[family] | fields))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 0.2)
            parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
        assert float(made(tokens()).logits.std()) >= 1
    return made


def save(made: Any, folder: Path, **options: Any) -> Path:
    made.save_pretrained(folder, **options)
    return folder


def tokens(length: int = 40) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(3))


def logits(made: Any, of: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return made(of, **options).logits


def reloaded(family: str, folder: Path) -> Any:
    return CLASSES[family][1].from_pretrained(folder, dtype=torch.float32).eval()
