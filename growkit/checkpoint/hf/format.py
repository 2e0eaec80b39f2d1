"""What a config.json says of a growkit model, in words that tools around transformers know."""

from __future__ import annotations

from typing import Any

from growkit.models.config import ModelConfig

MODEL_TYPE = "growkit"
ARCHITECTURE = "GrowkitForCausalLM"


def described(config: ModelConfig) -> dict[str, Any]:
    """What tools around transformers ask any model for, by the names they know."""
    first = config.layers[0].mixer
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "tie_word_embeddings": config.tied_head,
    }
