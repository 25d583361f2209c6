"""OLMo 3: OLMo 2 with a window in three layers of four, and scaled rotary frequencies in the fourth. Torch-free."""

from typing import Any

from keepwarm.trainer.model.families.base import Config
from keepwarm.trainer.model.families.config_fields import ConfigFields
from keepwarm.trainer.model.families.layer_types import FULL, SLIDING, read_layer_types, windows, write_layer_types
from keepwarm.trainer.model.families.olmo2 import Olmo2Family
from keepwarm.trainer.model.families.rope_config import BY_LAYER, read_rope_by_layer, settings_of, write_scaling
from keepwarm.trainer.model.spec import ModelSpec


class Olmo3Family(Olmo2Family):
    model_type = "olmo3"
    class_name = "Olmo3ForCausalLM"

    def read_window(self, config: ConfigFields, layers: int) -> dict[str, Any]:
        every_fourth = [SLIDING if (index + 1) % 4 else FULL for index in range(layers)]
        return windows(read_layer_types(config, layers) or every_fourth, config.take_nullable("sliding_window", 4096))

    def read_rotary(self, config: ConfigFields) -> dict[str, Any]:
        return read_rope_by_layer(config, default_theta=500000.0)

    def write_own(self, spec: ModelSpec) -> Config:
        return super().write_own(spec) | write_layer_types(spec)

    def in_both_dialects(self, config: Config, spec: ModelSpec) -> Config:
        made = {"rope_theta": spec.rope_theta, **config}
        tables, old = config.get("rope_parameters"), config.get("rope_scaling")
        settings = settings_of(old) if old else write_scaling(spec)
        if tables is None:
            each = (settings, {"rope_type": "default"})
            made["rope_parameters"] = {
                kind: {**table, "rope_theta": spec.rope_theta} for kind, table in zip(BY_LAYER, each, strict=True)
            }
        elif spec.rope_scaling is not None and not old:
            full = settings_of(tables[BY_LAYER[0]])
            made["rope_scaling"] = {name: value for name, value in full.items() if name != "rope_theta"}
        if spec.rope_scaling is not None and made.get("rope_scaling") is None:
            made["rope_scaling"] = settings
        return made
