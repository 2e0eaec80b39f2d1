"""growkit's own models in a Hugging Face folder, as ``growkit export`` writes them."""

from __future__ import annotations

from typing import Any

from growkit.checkpoint.hf.adapter import Adapter, Rule
from growkit.checkpoint.hf.format import ARCHITECTURE, MODEL_TYPE, described
from growkit.checkpoint.hf.settings import Settings
from growkit.models.config import ModelConfig, from_json, to_json
from growkit.models.spec import param_specs


class Native(Adapter):
    """All of it, as it is: read by AutoModelForCausalLM once growkit is imported."""

    name = "growkit"
    architecture = ARCHITECTURE
    model_type = MODEL_TYPE

    def from_hf(self, config: Settings) -> ModelConfig:
        said: dict[str, Any] = config.get("growkit", dict)
        return from_json(said, key=f"{config.where}: growkit")

    def fields(self, config: ModelConfig) -> dict[str, Any]:
        fields = {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "growkit": to_json(config)}
        return fields | described(config)

    def rules(self, config: ModelConfig) -> list[Rule]:
        return [Rule((name,), (f"growkit.{name}",)) for name in param_specs(config)]
