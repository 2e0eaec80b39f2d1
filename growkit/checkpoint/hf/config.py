"""The configuration that transformers sees of a growkit model. It is imported while transformers itself is
(register.py), so it loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from growkit.checkpoint.hf.format import MODEL_TYPE, described
from growkit.errors import ConfigError
from growkit.models.config import ModelConfig, from_json, to_json


class GrowkitConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """``growkit``: the whole ModelConfig as plain JSON values; what else a config.json says of sizes follows from it.

    Raises ConfigError for a description that is no model's, or sizes that contradict it.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True  # there is no growkit model that is meant when none is described
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, growkit: ModelConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        key = "config.json: growkit"
        if growkit is None:
            mend = "use a folder that `growkit export` or save_pretrained wrote"
            raise ConfigError("bad-model", "is missing", key=key, mend=mend)
        model = growkit if isinstance(growkit, ModelConfig) else from_json(growkit, key=key)
        sizes = described(model)
        for name, value in sizes.items():
            if kwargs.get(name, value) != value:
                mend = f"drop it: the model in `growkit` has {value}"
                raise ConfigError("bad-model", "contradicts the model", key=name, value=kwargs[name], mend=mend)
        self.growkit = json.loads(json.dumps(to_json(model)))
        use_cache = kwargs.pop("use_cache", True)
        super().__init__(**(kwargs | sizes))
        self.use_cache = use_cache  # which the base class would drop
        # From here on a model of this configuration may be asked for. Registering it any earlier would load torch and
        # half of transformers while transformers itself is still being imported.
        from growkit.checkpoint.hf import auto

        auto.register()

    @property
    def model(self) -> ModelConfig:
        return from_json(self.growkit, key="config.json: growkit")
