"""growkit's models as transformers models: AutoModelForCausalLM, generate, save_pretrained, Trainer.

Legend: B batch, T new tokens, S cached and new tokens, D embed, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from growkit.checkpoint.hf.cache import KeptBy
from growkit.checkpoint.hf.config import GrowkitConfig
from growkit.checkpoint.hf.format import described
from growkit.errors import ConfigError
from growkit.models.config import Mamba
from growkit.models.decoder import DecoderLM, init_tensor
from growkit.models.visible import Visible

# What transformers may ask a model for that DecoderLM does not hand out.
NOT_GIVEN = ("inputs_embeds", "output_attentions", "output_hidden_states")


def register() -> None:
    """Enters the model into transformers' table of causal language models."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    AutoModelForCausalLM.register(GrowkitConfig, GrowkitForCausalLM, exist_ok=True)


class GrowkitForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A DecoderLM (``growkit``) behind transformers' interface; ``around`` wraps one without copying it."""

    config_class = GrowkitConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Layer"]
    # A tied head is no parameter of its own in DecoderLM: there is nothing to tie, and nothing is stored twice.
    _tied_weights_keys = {}

    def __init__(self, config: GrowkitConfig, growkit: DecoderLM | None = None) -> None:
        super().__init__(config)
        self._given = growkit is not None
        self.growkit = growkit if growkit is not None else DecoderLM(config.model)
        # Whether a cache cannot be cut back by some tokens, which assisted generation does.
        self._is_stateful = any(isinstance(layer.mixer, Mamba) for layer in self.growkit.config.layers)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def around(cls, model: DecoderLM) -> Self:
        """A transformers model whose parameters are those of ``model``."""
        config = GrowkitConfig(model.config, architectures=[cls.__name__], dtype=model.embedding.weight.dtype)
        return cls(config, model).train(model.training)

    def with_decoder(self, model: DecoderLM) -> Self:
        """The same around another DecoderLM: what ``growkit.grow`` hands back."""
        old = described(self.config.model) | {"growkit": None}
        fields = {name: value for name, value in self.config.to_dict().items() if name not in old}
        other = type(self)(GrowkitConfig(model.config, **fields), model).train(model.training)
        other.generation_config = self.generation_config
        return other

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own. The configuration says where a ramp is by now (DecoderLM.set_ramp)."""
        self.config.growkit = GrowkitConfig(self.growkit.config).growkit
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draws the parameters of a model made from its configuration alone, and those that a file lacks; what was
        loaded or given stays. (transformers would draw by a module's class; here the table of parameters says how.)"""
        if self._given:
            return
        self.growkit.place_ramp()  # which no file holds
        for name, spec in self.growkit.param_axes().items():  # ``initialization`` leaves those that were loaded
            parameter = self.growkit.get_parameter(name)
            if spec.start != "normal" or spec.constant is not None:
                initialization.copy_(parameter, init_tensor(spec, torch.default_generator))
            elif spec.init_std is None:
                initialization.constant_(parameter, spec.starts_at())
            else:
                initialization.normal_(parameter, 0.0, spec.init_std)

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers' name for ``checkpoint_layers``."""
        return self.growkit.checkpoint_layers

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.growkit.checkpoint_layers = value

    def get_input_embeddings(self) -> nn.Embedding:
        return self.growkit.embedding

    def get_output_embeddings(self) -> nn.Linear | None:
        return None if self.config.tie_word_embeddings else self.growkit.head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> nn.Embedding:
        if new_num_tokens not in (None, self.config.vocab_size):
            problem = f"is not the model's vocabulary of {self.config.vocab_size}, which does not change in place"
            mend = "make a larger model of it: growkit.grow(model, optimizer, vocab_size=...), or `growkit grow`"
            raise ConfigError("cannot-grow", problem, key="resize_token_embeddings", value=new_num_tokens, mend=mend)
        return self.growkit.embedding

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T), continuing ``past_key_values`` if there are any → logits (B, T or ``logits_to_keep``, V).

        ``attention_mask`` (B, S): 0 where there is padding, at either side; positions count the tokens alone unless
        ``position_ids`` (B, T) say otherwise. ``labels`` (B, T): the loss of each next token, −100 left out; further
        arguments are those of transformers' causal loss. Raises ConfigError for what DecoderLM cannot do.
        """
        for name in NOT_GIVEN:
            if kwargs.get(name) is not None and kwargs[name] is not False:
                mend = "leave it out; `model.growkit` is the DecoderLM inside"
                raise ConfigError("not-in-transformers", "is not given by growkit models", key=name, mend=mend)
        if input_ids is None:
            raise ConfigError("not-in-transformers", "is missing", key="input_ids", mend="pass tokens (rows, length)")
        if use_cache is None:
            use_cache = not self.training and labels is None and self.config.use_cache
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        cache = None if past_key_values is None else KeptBy(past_key_values, self.config.model)
        past = cache.length if cache is not None else 0
        mask: Visible | None = None
        if attention_mask is not None:
            wanted = (input_ids.shape[0], past + input_ids.shape[1])
            if tuple(attention_mask.shape) != wanted:
                mend = f"pass one of shape {wanted}: a row for each sequence, 0 where there is padding"
                shape = tuple(attention_mask.shape)
                raise ConfigError(
                    "not-in-transformers", "has another shape", key="attention_mask", value=shape, mend=mend
                )
            real = attention_mask.to(input_ids.device).bool()
            if not real.all():
                mask = Visible(_visible(real, input_ids.shape[1]), real=real[:, past:])
                if position_ids is None:
                    position_ids = (real.cumsum(-1) - 1).clamp(min=0)[:, past:]
        elif position_ids is not None and not bool((position_ids.diff(dim=-1) == 1).all()):
            mend = "pass one sequence a row; packed rows would see each other"
            raise ConfigError("not-in-transformers", "start again inside a row", key="position_ids", mend=mend)
        h = self.growkit.hidden(input_ids, cache, positions=position_ids, mask=mask)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.growkit.logits(h[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def _visible(real_BS: Tensor, new: int) -> Tensor:
    """(B, 1, T, S): each query sees the tokens up to its own place. Padding sees itself: a softmax over nothing would
    be NaN, and reach the tokens through the next layer's values."""
    S = real_BS.shape[1]
    causal = torch.ones(new, S, dtype=torch.bool, device=real_BS.device).tril(S - new)
    return (causal & real_BS[:, None, None, :]) | causal.triu(S - new)
