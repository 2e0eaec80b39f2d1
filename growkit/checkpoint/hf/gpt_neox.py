"""GPT-NeoX (Pythia): LayerNorm, biases, GELU, parallel residuals, q, k and v of a head in one tensor."""

from __future__ import annotations

from typing import Any

from growkit.checkpoint.hf.adapter import LEAVES, Adapter, PerHead, Rule, require_usual
from growkit.checkpoint.hf.rope import OLDER, read_rope, rope_fields
from growkit.checkpoint.hf.settings import Settings
from growkit.errors import ConfigError
from growkit.growth.operator import attention_of
from growkit.models.config import Attention, DenseMLP, Linear, MLPKind, ModelConfig, Norm

# Their names of the tanh form differ in how it is written, not in what it computes.
ACTIVATIONS: dict[str, MLPKind] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


class GPTNeoX(Adapter):
    name = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    model_type = "gpt_neox"
    layer = "gpt_neox.layers."
    head = "embed_out.weight"
    aliases = {"lm_head.weight": "embed_out.weight"}  # what transformers calls it inside
    outside = {
        "embedding.weight": "gpt_neox.embed_in.weight",
        "final_norm.gain": "gpt_neox.final_layer_norm.weight",
        "final_norm.bias": "gpt_neox.final_layer_norm.bias",
    }
    modules = {
        "attention_norm": "input_layernorm",
        "attention.o": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    # The causal mask, the number it is filled with, and the speeds of rotary positions.
    buffers = (r"attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$")
    older = OLDER

    def from_hf(self, config: Settings) -> ModelConfig:
        require_usual(config)
        embed, heads = config.positive("hidden_size", int), config.positive("num_attention_heads", int)
        if embed % heads:
            raise ConfigError(
                "heads-do-not-divide", **config.at("hidden_size"), problem=f"is not divisible by the {heads} heads"
            )
        activation = config.get("hidden_act", str, "gelu")
        if activation not in ACTIVATIONS:
            mend = f"growkit knows {', '.join(ACTIVATIONS)} here"
            raise config.refuse("hidden_act", "is not an activation growkit knows", mend)
        base, fraction, scaling = read_rope(
            config, embed // heads, base_key="rotary_emb_base", share_key="rotary_pct", share=0.25
        )
        projection = Linear(config.get("attention_bias", bool, True))
        mixer = Attention(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=embed // heads,
            q=projection,
            k=projection,
            v=projection,
            o=projection,
            rope_base=base,
            rope_fraction=fraction,
            rope_scaling=scaling,
        )
        mlp = DenseMLP(config.positive("intermediate_size", int), ACTIVATIONS[activation], bias=True)
        parallel = config.get("use_parallel_residual", bool, True)
        norm = Norm("layernorm", config.positive("layer_norm_eps", float, 1e-5))
        return self.model(config, mixer, mlp, norm, parallel=parallel)

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        mixer, mlp = self.require_plain(config)
        if config.norm.kind != "layernorm":
            raise self.cannot("norm", f"a {config.norm.kind}")
        if mlp.kind == "swiglu":
            raise self.cannot("mlp", "a SwiGLU")
        if not mlp.bias:
            raise self.cannot("mlp", "an MLP without biases")
        if mixer.num_kv_heads != mixer.num_heads:
            raise self.cannot("num_kv_heads", "grouped queries")
        if mixer.num_heads * mixer.head_dim != config.embed_dim:
            problem = f"{mixer.num_heads} heads of {mixer.head_dim} in a width of {config.embed_dim}"
            raise self.cannot(
                "head_dim", problem, "grow embed_dim and num_heads or head_dim alike, or use --as growkit"
            )
        if mixer.qk_norm is not None:
            raise self.cannot("qk_norm", "a QK-norm")
        if mixer.rotated == 0:
            raise self.cannot("rope_fraction", "heads that do not turn")
        fields = self.named(config) | {
            "num_attention_heads": mixer.num_heads,
            "intermediate_size": mlp.dim,
            "hidden_act": "gelu" if mlp.kind == "gelu" else "gelu_pytorch_tanh",
            "layer_norm_eps": config.norm.eps,
            "attention_bias": mixer.q == Linear(True),
            "use_parallel_residual": config.layers[0].parallel,
        }
        fields |= rope_fields(mixer)
        # Where it is not said, this family's own default of a quarter would hold.
        fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
        return fields

    def layer_rules(self, config: ModelConfig, prefix: str, before: str, module: str, leaf: str) -> list[Rule]:
        if module not in ("attention.q", "attention.k", "attention.v"):
            return super().layer_rules(config, prefix, before, module, leaf)
        if module != "attention.q":
            return []  # in the rule of q
        ours = tuple(f"{before}attention.{part}.{leaf}" for part in "qkv")
        theirs = (f"{prefix}attention.query_key_value.{LEAVES[leaf]}",)
        return [PerHead(ours, theirs, attention_of(config, config.layers[0].id).num_heads)]
