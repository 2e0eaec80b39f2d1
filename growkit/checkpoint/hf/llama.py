"""Llama and what is laid out like it: RMSNorm, SwiGLU, grouped queries, rotary positions over whole heads."""

from __future__ import annotations

from typing import Any

from growkit.checkpoint.hf.adapter import LEAVES, Adapter, Rule, Stacked, require_usual
from growkit.checkpoint.hf.rope import OLDER, read_rope, rope_fields
from growkit.checkpoint.hf.settings import Settings
from growkit.errors import ConfigError
from growkit.models.config import Attention, DenseMLP, Linear, ModelConfig, Norm


class Llama(Adapter):
    name = "llama"
    architecture = "LlamaForCausalLM"
    model_type = "llama"
    layer = "model.layers."
    outside = {"embedding.weight": "model.embed_tokens.weight", "final_norm.gain": "model.norm.weight"}
    modules = {
        "attention_norm": "input_layernorm",
        "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj",
        "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
        "mlp.down": "mlp.down_proj",
    }
    older: tuple[str, ...] = OLDER
    qk_norm = False
    head_dim: int | None = None  # where config.json does not say it; None: width / heads
    kv_heads: int | None = None  # the same; None: as many as heads
    attention_bias = mlp_bias = True  # whether a configuration can ask for them

    def from_hf(self, config: Settings) -> ModelConfig:
        require_usual(config)
        self.require_full_attention(config)
        if config.get("hidden_act", str, "silu") not in ("silu", "swish"):
            raise config.refuse("hidden_act", "is not the gate of a SwiGLU", mend="growkit knows silu here")
        embed, heads = config.positive("hidden_size", int), config.positive("num_attention_heads", int)
        kv_heads = config.positive("num_key_value_heads", int, self.kv_heads or heads)
        if heads % kv_heads:
            raise ConfigError(
                "kv-heads-do-not-divide",
                **config.at("num_key_value_heads"),
                problem=f"does not divide the {heads} heads",
            )
        head_dim = config.positive("head_dim", int, self.head_dim or embed // heads)
        norm = Norm("rmsnorm", config.positive("rms_norm_eps", float, 1e-6))
        projection = Linear(self.attention_bias and config.get("attention_bias", bool, False))
        base, fraction, scaling = read_rope(
            config, head_dim, base_key="rope_theta", share_key="partial_rotary_factor", share=1.0
        )
        if fraction != 1:
            raise config.refuse("partial_rotary_factor", f"has no meaning in a {self.architecture}")
        mixer = Attention(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            q=projection,
            k=projection,
            v=projection,
            o=projection,
            rope_base=base,
            qk_norm=norm if self.qk_norm else None,
            rope_scaling=scaling,
        )
        bias = self.mlp_bias and config.get("mlp_bias", bool, False)
        mlp = DenseMLP(config.positive("intermediate_size", int), "swiglu", bias)
        return self.model(config, mixer, mlp, norm)

    def require_full_attention(self, config: Settings) -> None:
        """Refuses attention that does not see everything before it."""

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        mixer, mlp = self.require_plain(config)
        if config.norm.kind != "rmsnorm":
            raise self.cannot("norm", f"a {config.norm.kind}")
        if mlp.kind != "swiglu":
            raise self.cannot("mlp", f"an MLP of kind {mlp.kind}")
        if config.layers[0].parallel:
            raise self.cannot("layers", "parallel residuals")
        if mixer.rotated != mixer.head_dim:
            raise self.cannot("rope_fraction", "heads that turn in part")
        if mixer.qk_norm != (config.norm if self.qk_norm else None):
            has = "no QK-norm" if mixer.qk_norm is None else f"a QK-norm with eps {mixer.qk_norm.eps:g}"
            beside = f" beside norms with {config.norm.eps:g}" if mixer.qk_norm is not None and self.qk_norm else ""
            raise self.cannot("qk_norm", has + beside)
        biases = {"attention_bias": mixer.o == Linear(True), "mlp_bias": mlp.bias}
        said = {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
        for key, has_bias in biases.items():
            if has_bias and not said[key]:
                raise self.cannot(key, "those biases")
        if config.embed_dim % mixer.num_heads and self.name == "llama":
            problem = f"a width of {config.embed_dim} that is not divisible by its {mixer.num_heads} heads"
            raise self.cannot("embed_dim", problem)
        return (
            self.named(config)
            | {
                "num_attention_heads": mixer.num_heads,
                "num_key_value_heads": mixer.num_kv_heads,
                "head_dim": mixer.head_dim,
                "intermediate_size": mlp.dim,
                "hidden_act": "silu",
                "rms_norm_eps": config.norm.eps,
            }
            | {key: biases[key] for key in biases if said[key]}
            | rope_fields(mixer)
        )

    def layer_rules(self, config: ModelConfig, prefix: str, before: str, module: str, leaf: str) -> list[Rule]:
        if module != "mlp.gate_up":
            return super().layer_rules(config, prefix, before, module, leaf)
        theirs = tuple(f"{prefix}mlp.{part}_proj.{LEAVES[leaf]}" for part in ("gate", "up"))
        return [Stacked((f"{before}{module}.{leaf}",), theirs)]


class Mistral(Llama):
    """Llama's layout; a sliding window, which the first Mistral has, is not growkit's."""

    name = "mistral"
    architecture = "MistralForCausalLM"
    model_type = "mistral"
    kv_heads = 8
    attention_bias = mlp_bias = False

    def require_full_attention(self, config: Settings) -> None:
        window = config.get("sliding_window", int, 0) if "sliding_window" in config.values else 4096
        most = config.get("max_position_embeddings", int, 131072)
        if 0 < window < most:
            problem = f"is a window of {window} positions in sequences of up to {most}, which growkit does not do"
            mend = "where every sequence is shorter, write null, or max_position_embeddings as long as the window"
            raise config.refuse("sliding_window", problem, mend)

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        return super().fields(config) | {"sliding_window": None}
