"""transformers' cache as DecoderLM writes one: so that generate can reorder and crop it, and offload what grows.

Legend: B batch, G kv heads, T new tokens, d head_dim.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from growkit.errors import ConfigError
from growkit.models import decoder, layers
from growkit.models.config import Mamba, ModelConfig


class KeptBy(decoder.Cache):
    """A view of ``cache``, made anew for each forward pass. Raises ConfigError for one that cannot hold the model's."""

    def __init__(self, cache: Cache, config: ModelConfig) -> None:
        if cache.is_compileable:
            raise _unfit(cache, "has room for a fixed length", "use the dynamic one, which is the default")
        if any(spec.stride > 1 for spec in config.layers):
            raise _unfit(cache, "does not hold what layers of a stride ran on last", "pass use_cache=False")
        self.layers = {}
        self._states: list[MambaStates] = []
        for index, spec in enumerate(config.layers):
            if isinstance(spec.mixer, Mamba):
                self._states.append(_states(cache, index))
                self.layers[spec.id] = _StatesKept(self._states[-1])
            else:
                self.layers[spec.id] = _KeysKept(cache, index)
        self._length = cache.get_seq_length()

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        self._length = length
        for states in self._states:
            states.length = length


class MambaStates(CacheLayerMixin):
    """What a Mamba layer keeps: as ``keys`` the last inputs of its convolution, as ``values`` its state, which the base
    class reorders. They do not grow, so they stay on their device when keys are offloaded. Unlike transformers' own for
    such layers it counts its tokens, and is never written in place, so that gradients go through it."""

    is_sliding = supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.keys = self.values = None
        self.length = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (kept.repeat_interleave(repeats, 0) for kept in (self.keys, self.values))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[indices], self.values[indices]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            mend = "generate without an assistant, or keep a copy of the cache from before"
            problem = "cannot be cut back: a state does not know what it was some tokens ago"
            raise ConfigError("not-in-transformers", problem, key="past_key_values", mend=mend)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a Mamba layer has no keys and values")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: there is no state before the first token."""


def _states(cache: Cache, index: int) -> MambaStates:
    """Those of layer ``index``, put into the place of what transformers had made for keys and values."""
    while len(cache.layers) <= index and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        raise _unfit(cache, f"has room for {len(cache.layers)} layers")
    found = cache.layers[index]
    if isinstance(found, MambaStates):
        return found
    if not isinstance(found, CacheLayerMixin) or found.get_seq_length():
        raise _unfit(cache, "is of another model")
    made = MambaStates()
    cache.layers[index] = made
    return made


def _unfit(cache: Cache, problem: str, mend: str = "pass none, and use the one that comes back") -> ConfigError:
    name = type(cache).__name__
    return ConfigError("not-in-transformers", problem, key="past_key_values", value=name, mend=mend)


class _KeysKept(layers.LayerCache):
    """Keys and values of an attention layer. ``length`` is what it holds before."""

    def __init__(self, cache: Cache, index: int) -> None:
        self.length = cache.get_seq_length(index)
        self._cache, self._index = cache, index

    def append(self, k_BGTd: Tensor, v_BGTd: Tensor) -> tuple[Tensor, Tensor]:
        return self._cache.update(k_BGTd, v_BGTd, self._index)


class _StatesKept(layers.LayerCache):
    """The states of a Mamba layer: what it writes is written into them."""

    def __init__(self, states: MambaStates) -> None:
        self._states = states

    @property
    def inputs(self) -> Tensor | None:
        return self._states.keys

    @inputs.setter
    def inputs(self, inputs: Tensor | None) -> None:
        self._states.keys = inputs

    @property
    def state(self) -> Tensor | None:
        return self._states.values

    @state.setter
    def state(self, state: Tensor | None) -> None:
        self._states.values = state
