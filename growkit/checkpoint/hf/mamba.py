"""Mamba, and FalconMamba with its norms of Δ's rank, B and C: RMSNorm and one mixer a layer, nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from growkit.checkpoint.hf.adapter import Adapter, Rule, require_usual
from growkit.checkpoint.hf.settings import Settings
from growkit.models.config import Linear, Mamba, ModelConfig, Norm, projections

if TYPE_CHECKING:
    from torch import Tensor

# Of a mixer, what is no weight or bias of a projection. Their Δ has its bias in dt_proj.
ALONE = {
    "A_log": "A_log",
    "D": "D",
    "dt_bias": "dt_proj.bias",
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
}


class Taps(Rule):
    """Theirs is a convolution's weight: (channels, 1, taps)."""

    def to_ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [theirs[0].squeeze(1)]

    def to_theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return [ours[0].unsqueeze(1)]


class MambaAdapter(Adapter):
    name = "mamba"
    architecture = "MambaForCausalLM"
    model_type = "mamba"
    layer = "backbone.layers."
    aliases = {"backbone.embedding.weight": "backbone.embeddings.weight"}  # what the original checkpoints call it
    outside = {"embedding.weight": "backbone.embeddings.weight", "final_norm.gain": "backbone.norm_f.weight"}
    modules = {
        "mamba_norm": "norm",
        "mamba.in_proj": "mixer.in_proj",
        "mamba.x_proj": "mixer.x_proj",
        "mamba.dt_proj": "mixer.dt_proj",
        "mamba.out_proj": "mixer.out_proj",
    }
    # The original code's words for sizes, which transformers carries along and growth would leave behind.
    older = ("d_model", "d_inner", "n_layer", "ssm_cfg")
    inner_norm = False

    def from_hf(self, config: Settings) -> ModelConfig:
        require_usual(config)
        if config.get("hidden_act", str, "silu") not in ("silu", "swish"):
            raise config.refuse("hidden_act", "is not what Mamba's gate is made of", mend="growkit knows silu here")
        embed = config.positive("hidden_size", int)
        around = Linear(config.get("use_bias", bool, False))
        mixer = Mamba(
            # Where both are said, transformers builds what intermediate_size says.
            inner=config.positive("intermediate_size", int, config.positive("expand", int, 2) * embed),
            state=config.positive("state_size", int, 16),
            dt_rank=self._rank(config, embed),
            conv=config.positive("conv_kernel", int, 4),
            in_proj=around,
            x_proj=Linear(),
            dt_proj=Linear(),
            out_proj=around,
            conv_bias=config.get("use_conv_bias", bool, True),
            inner_norm=config.positive("mixer_rms_eps", float, 1e-6) if self.inner_norm else None,
            dt_start=(
                config.positive("time_step_min", float, 0.001),
                config.positive("time_step_max", float, 0.1),
            ),
        )
        norm = Norm("rmsnorm", config.positive("layer_norm_epsilon", float, 1e-5))
        return self.model(config, mixer, None, norm, tied=True)

    def _rank(self, config: Settings, embed: int) -> int:
        if config.values.get("time_step_rank", "auto") == "auto":
            return math.ceil(embed / 16)
        return config.positive("time_step_rank", int)

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        layer = self.require_alike(config)
        mixer, embed = layer.mixer, config.embed_dim
        if not isinstance(mixer, Mamba):
            raise self.cannot("layers", "attention layers")
        if layer.mlp is not None:
            raise self.cannot("layers", "an MLP beside the mixer")
        if config.norm.kind != "rmsnorm":
            raise self.cannot("norm", f"a {config.norm.kind}")
        biases: dict[str, bool] = {}
        for name, projection in projections(mixer).items():
            if not isinstance(projection, Linear):
                raise self.cannot("layers", "parameter tokens")
            biases[name] = projection.bias
        if biases["in_proj"] != biases["out_proj"] or biases["x_proj"] or biases["dt_proj"]:
            having = ", ".join(name for name, bias in biases.items() if bias)
            raise self.cannot("use_bias", f"biases on {having} alone; in_proj and out_proj have one or neither has")
        if (mixer.inner_norm is not None) != self.inner_norm:
            has = "no norm" if self.inner_norm else f"a norm, with eps {mixer.inner_norm:g},"
            raise self.cannot("inner_norm", f"{has} of what B, C and Δ are made of")
        if mixer.inner % embed:
            problem = f"{mixer.inner} channels at a width of {embed}, of which its `expand` says whole multiples"
            above = mixer.inner + embed - mixer.inner % embed
            raise self.cannot("expand", problem, f"grow d_inner={above} as well, or use --as growkit")
        return (
            self.named(config)
            | {
                "state_size": mixer.state,
                "expand": mixer.inner // embed,
                "intermediate_size": mixer.inner,
                "time_step_rank": mixer.dt_rank,
                "conv_kernel": mixer.conv,
                "time_step_min": mixer.dt_start[0],
                "time_step_max": mixer.dt_start[1],
                "use_bias": biases["in_proj"],
                "use_conv_bias": mixer.conv_bias,
                "hidden_act": "silu",
                "layer_norm_epsilon": config.norm.eps,
                # Of a model's start alone; but transformers 5 does it to every out_proj it loads, too.
                "rescale_prenorm_residual": False,
            }
            | ({"mixer_rms_eps": mixer.inner_norm} if self.inner_norm else {})
        )

    def layer_rules(self, config: ModelConfig, prefix: str, before: str, module: str, leaf: str) -> list[Rule]:
        if module != "mamba":
            return super().layer_rules(config, prefix, before, module, leaf)
        kind = Taps if leaf == "conv_weight" else Rule
        return [kind((f"{before}{module}.{leaf}",), (f"{prefix}mixer.{ALONE[leaf]}",))]


class FalconMamba(MambaAdapter):
    name = "falcon_mamba"
    architecture = "FalconMambaForCausalLM"
    model_type = "falcon_mamba"
    aliases = {}
    inner_norm = True
