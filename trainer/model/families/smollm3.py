"""SmolLM3: Llama whose every fourth layer does not rotate; those layers may have a window. Torch-free."""

from typing import Any

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.base import Config
from keepwarm.trainer.model.families.config_fields import ConfigFields, shown
from keepwarm.trainer.model.families.layer_types import FULL, SLIDING, read_layer_types, windows, write_layer_types
from keepwarm.trainer.model.families.llama import LlamaFamily
from keepwarm.trainer.model.families.rope_config import read_rope
from keepwarm.trainer.model.spec import ModelSpec


class SmolLM3Family(LlamaFamily):
    model_type = "smollm3"
    class_name = "SmolLM3ForCausalLM"
    default_kv_heads = 4
    tied = True

    def read_window(self, config: ConfigFields, layers: int) -> dict[str, Any]:
        nope = self._nope(config, layers)
        window = config.take_nullable("sliding_window", None)
        used = config.flag("use_sliding_window", False)
        derived = [SLIDING if used and window is not None and index in nope else FULL for index in range(layers)]
        types = read_layer_types(config, layers) or derived
        if SLIDING in types and not used:
            raise SpecError("config.json: layer_types has layers with a window, use_sliding_window is false")
        return {**windows(types, window), "nope_layers": nope}

    def read_rotary(self, config: ConfigFields) -> dict[str, Any]:
        return read_rope(config, default_theta=2000000.0)

    def write_own(self, spec: ModelSpec) -> Config:
        return {
            "attention_bias": spec.attention_output_bias,
            "mlp_bias": spec.mlp_bias,
            "no_rope_layers": [int(index not in spec.nope_layers) for index in range(spec.layers)],
            "use_sliding_window": spec.sliding_window is not None,
            **write_layer_types(spec),
            **({} if spec.head_dim is None else {"head_dim": spec.head_dim}),
        }

    def _nope(self, config: ConfigFields, layers: int) -> tuple[int, ...]:
        interval = config.integer("no_rope_layer_interval", 4)
        if interval < 1:
            raise SpecError(f"config.json: no_rope_layer_interval = {interval} is not positive")
        rotates = config.take("no_rope_layers", [int((index + 1) % interval != 0) for index in range(layers)])
        if not isinstance(rotates, list) or len(rotates) < layers or not all(flag in (0, 1) for flag in rotates):
            raise SpecError(f"config.json: no_rope_layers = {shown(rotates)} is not a list of 0 and 1, one a layer")
        return tuple(index for index in range(layers) if not rotates[index])
