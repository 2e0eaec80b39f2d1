"""What a config.json says of a growkit model, in words that tools around transformers know."""

from __future__ import annotations

from typing import Any

from growkit.models.config import Attention, ModelConfig

MODEL_TYPE = "growkit"
ARCHITECTURE = "GrowkitForCausalLM"


def described(config: ModelConfig) -> dict[str, Any]:
    """What tools around transformers ask any model for, by the names they know."""
    attention = (layer.mixer for layer in config.layers if isinstance(layer.mixer, Attention))
    first = next(attention, None)
    heads = {}
    if first is not None:
        heads["num_attention_heads"] = first.num_heads
        heads["num_key_value_heads"] = first.num_kv_heads
        heads["head_dim"] = first.head_dim
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": len(config.layers),
        **heads,
        "tie_word_embeddings": config.tied_head,
    }
