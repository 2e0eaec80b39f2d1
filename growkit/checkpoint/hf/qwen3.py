"""Qwen3: Llama's layout with an RMSNorm over each head of q and k."""

from __future__ import annotations

from typing import Any

from growkit.checkpoint.hf.llama import Llama
from growkit.checkpoint.hf.settings import Settings
from growkit.models.config import ModelConfig


class Qwen3(Llama):
    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    model_type = "qwen3"
    older = (*Llama.older, "layer_types", "sliding_window", "max_window_layers")
    qk_norm = True
    head_dim = 128
    kv_heads = 32
    mlp_bias = False

    def require_full_attention(self, config: Settings) -> None:
        kinds: list[Any] = config.get("layer_types", list, [])
        sliding = config.get("use_sliding_window", bool, False) and config.get("sliding_window", int, 4096) > 0
        if not kinds and sliding and config.get("max_window_layers", int, 28) < config.get("num_hidden_layers", int):
            raise config.refuse("use_sliding_window", "asks for sliding windows, which growkit does not do")
        if any(kind != "full_attention" for kind in kinds):
            raise config.refuse("layer_types", "has layers that are no full attention")

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        return super().fields(config) | {"use_sliding_window": False}
