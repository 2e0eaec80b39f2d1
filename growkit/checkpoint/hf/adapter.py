"""The seam to other families' checkpoints: a configuration and names of tensors, both ways. No torch at import.

An adapter says which numbers are which; tensors are laid out anew one at a time, when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from growkit.checkpoint.hf.settings import Settings
from growkit.errors import ConfigError
from growkit.models.config import (
    MOST_LAYERS,
    Attention,
    DenseMLP,
    LayerSpec,
    Linear,
    Mixer,
    ModelConfig,
    MoEMLP,
    Norm,
    unmasked,
)
from growkit.models.spec import param_specs

if TYPE_CHECKING:
    from torch import Tensor

LEAVES = {"weight": "weight", "bias": "bias", "gain": "weight"}  # ours → theirs, of a linear map or a norm


@dataclass(frozen=True)
class Rule:
    """Tensors ``ours`` and ``theirs`` hold the same numbers; here, one each, also in the same order."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]

    def to_ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        return theirs

    def to_theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return ours


class Stacked(Rule):
    """Ours is theirs, one below the other: gate | up."""

    def to_ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        import torch

        return [torch.cat(list(theirs))]

    def to_theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return ours[0].chunk(len(self.theirs))


@dataclass(frozen=True)
class PerHead(Rule):
    """Theirs is one tensor, in which each of ``heads`` heads has its rows of every one of ours: q, k, v."""

    heads: int

    def to_ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        whole = theirs[0].view(self.heads, len(self.ours), -1, *theirs[0].shape[1:])
        return [part.flatten(0, 1) for part in whole.unbind(1)]

    def to_theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        import torch

        return [torch.stack([part.reshape(self.heads, -1, *part.shape[1:]) for part in ours], dim=1).flatten(0, 2)]


class LaidOut(Mapping[str, "Tensor"]):
    """Our tensors, or theirs, by name, each made from the ``other`` side's when it is asked for."""

    def __init__(self, rules: Sequence[Rule], other: Mapping[str, Tensor], *, ours: bool) -> None:
        self._other, self._ours = other, ours
        self._rules = {
            name: (rule, place) for rule in rules for place, name in enumerate(rule.ours if ours else rule.theirs)
        }

    def __getitem__(self, name: str) -> Tensor:
        rule, place = self._rules[name]
        if self._ours:
            return rule.to_ours([self._other[part] for part in rule.theirs])[place]
        return rule.to_theirs([self._other[part] for part in rule.ours])[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)


class Adapter:
    """One family of checkpoints. Subclasses say how a configuration reads and how ours is said in theirs."""

    name: str  # what ``--as`` calls it
    architecture: str  # what config.json calls it
    model_type: str
    modules: Mapping[str, str]  # ours → theirs, inside a layer
    outside: Mapping[str, str]  # ours → theirs, of whole tensors outside the layers
    layer: str  # theirs, before a layer's number
    head: str = "lm_head.weight"
    aliases: Mapping[str, str] = {}  # other names in files → the names here
    buffers: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)  # what older files hold besides parameters
    older: tuple[str, ...] = ()  # keys of a config.json that ``fields`` says otherwise

    def from_hf(self, config: Settings) -> ModelConfig:
        """The model that a config.json describes. Raises ConfigError for what growkit does not do."""
        raise NotImplementedError

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        """What a config.json says of the model. Raises ConfigError for what it cannot say."""
        raise NotImplementedError

    def to_hf(self, config: ModelConfig, params: Mapping[str, Tensor]) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
        """(``fields``, their tensors, made when asked for), of the model without masks. Raises ConfigError as
        ``fields``, and for one whose last growth is under a ramp still."""
        if config.ramp < 1:
            mend = "train on until the ramp is at 1 (the stage's grow_time), or use a checkpoint from after that"
            raise self.cannot("ramp", f"a mask over what grew last, whose ramp is at {config.ramp:g}", mend)
        config = unmasked(config)
        return self.fields(config), LaidOut(self.rules(config), params, ours=False)

    def rules(self, config: ModelConfig) -> list[Rule]:
        """Every parameter of ours in one rule, in the order of the table of parameters."""
        rules: list[Rule] = []
        places = {layer.id: place for place, layer in enumerate(config.layers)}
        for name, spec in param_specs(config).items():
            if spec.layer is None:
                theirs = self.head if name == "head.weight" else self.outside[name]
                rules.append(Rule((name,), (theirs,)))
                continue
            module, _, leaf = spec.local.rpartition(".")
            prefix, before = f"{self.layer}{places[spec.layer]}.", name.removesuffix(spec.local)
            rules += self.layer_rules(config, prefix, before, module, leaf)
        return rules

    def layer_rules(self, config: ModelConfig, prefix: str, before: str, module: str, leaf: str) -> list[Rule]:
        """The rule of one parameter of a layer; ``prefix``, ``before``: what its names begin with, theirs and ours."""
        return [Rule((f"{before}{module}.{leaf}",), (f"{prefix}{self.modules[module]}.{LEAVES[leaf]}",))]

    def model(
        self,
        config: Settings,
        mixer: Mixer,
        mlp: DenseMLP | None,
        norm: Norm,
        *,
        parallel: bool = False,
        tied: bool = False,
    ) -> ModelConfig:
        """A model whose layers, and norms, are all alike. ``tied``: its head, where config.json does not say it."""
        layers = range(config.positive("num_hidden_layers", int))
        if len(layers) > MOST_LAYERS:
            raise ConfigError("too-large", f"must be at most {MOST_LAYERS}", **config.at("num_hidden_layers"))
        return ModelConfig(
            vocab_size=config.positive("vocab_size", int),
            embed_dim=config.positive("hidden_size", int),
            layers=tuple(LayerSpec(i, mixer, mlp, parallel=parallel) for i in layers),
            norm=norm,
            final_norm=norm,
            tied_head=config.get("tie_word_embeddings", bool, tied),
        )

    def named(self, config: ModelConfig) -> dict[str, Any]:
        """The fields that every family has."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.embed_dim,
            "num_hidden_layers": len(config.layers),
            "tie_word_embeddings": config.tied_head,
        }

    def require_alike(self, config: ModelConfig) -> LayerSpec:
        """Refuses what no other family's configuration says around the layers; returns what every layer is like."""
        first = config.layers[0]
        if any(
            (layer.mixer, layer.mlp, layer.parallel, layer.stride)
            != (first.mixer, first.mlp, first.parallel, first.stride)
            for layer in config.layers
        ):
            raise self.cannot("layers", "layers that differ")
        if config.stream is not None or first.stride > 1:
            what = "a stride" if config.stream is None else f"an AltUp stream of {config.stream.blocks} blocks"
            raise self.cannot("stream", what, "keep it as a growkit checkpoint (--as growkit)")
        if config.logit_scale != 1:
            problem = f"logits multiplied by {config.logit_scale:g}, which cloned width leaves under a tied head"
            raise self.cannot("logit_scale", problem)
        norm, final = config.norm, config.final_norm
        if norm != final:
            problem = (
                f"two norms: {norm.kind} with eps {norm.eps:g} in the layers, {final.kind} with {final.eps:g} last"
            )
            raise self.cannot("final_norm", problem)
        return first

    def require_plain(self, config: ModelConfig) -> tuple[Attention, DenseMLP]:
        """Refuses what no family of Transformers can say; returns attention and MLP of every layer."""
        layer = self.require_alike(config)
        mixer, mlp = layer.mixer, layer.mlp
        if not isinstance(mixer, Attention):
            raise self.cannot("layers", "Mamba layers")
        if isinstance(mlp, MoEMLP):
            raise self.cannot("layers", "experts")
        projections = (mixer.q, mixer.k, mixer.v, mixer.o)
        if not isinstance(mlp, DenseMLP) or not all(isinstance(p, Linear) for p in projections):
            raise self.cannot("layers", "parameter tokens")
        if len(set(projections)) > 1:
            raise self.cannot("layers", "biases on some of q, k, v and o alone")
        return mixer, mlp

    def cannot(self, key: str, what: str, mend: str = "") -> ConfigError:
        """The error for ``what`` ours has and theirs cannot say."""
        mend = mend or "keep it as a growkit checkpoint (--as growkit), or grow it in another way"
        return ConfigError("not-expressible", f"a {self.architecture} cannot have {what}", key=key, mend=mend)


def require_usual(config: Settings) -> None:
    """Refuses what would change the tensors or the function in any family. Raises ConfigError."""
    if config.section("quantization_config") is not None:
        mend = "use the weights as they were before"
        raise config.refuse("quantization_config", "describes quantized weights, which growkit does not read", mend)
    if config.section("auto_map") is not None:
        raise config.refuse("auto_map", "asks for code that comes with the checkpoint, which growkit never runs")
    if config.get("pretraining_tp", int, 1) > 1:
        raise config.refuse("pretraining_tp", "splits the matrix products, which growkit does not")
