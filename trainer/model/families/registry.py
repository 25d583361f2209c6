"""Registry of built-in and third-party model families by `model_type`. Torch-free."""

from keepwarm.registry import Registry, UnusableComponent
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.base import ModelFamily

FAMILIES: Registry[type[ModelFamily]] = Registry(
    "model family",
    "keepwarm.model_families",
    {
        "llama": "keepwarm.trainer.model.families.llama:LlamaFamily",
        "mistral": "keepwarm.trainer.model.families.mistral:MistralFamily",
        "qwen2": "keepwarm.trainer.model.families.qwen2:Qwen2Family",
        "qwen3": "keepwarm.trainer.model.families.qwen3:Qwen3Family",
        "olmo2": "keepwarm.trainer.model.families.olmo2:Olmo2Family",
        "olmo3": "keepwarm.trainer.model.families.olmo3:Olmo3Family",
        "smollm3": "keepwarm.trainer.model.families.smollm3:SmolLM3Family",
        "gpt_neox": "keepwarm.trainer.model.families.gpt_neox:GptNeoxFamily",
        "gpt2": "keepwarm.trainer.model.families.gpt2:Gpt2Family",
    },
    ModelFamily,
)
"""Model families; an export without a `model_type` uses the first one that fits."""


def family_of(model_type: str, key: str = "model type") -> ModelFamily:
    """Return the family with this `model_type`; `key` names the setting it comes from.

    Raise `SpecError` if there is none, or if a third-party family cannot be imported.
    """
    if model_type not in FAMILIES:
        raise SpecError(f"{key} {model_type!r} is not supported; it may be {', '.join(FAMILIES.names())}")
    try:
        family = FAMILIES.get(model_type)()
    except UnusableComponent as error:
        raise SpecError(str(error)) from error
    if family.model_type != model_type:
        raise SpecError(f"the model family registered as {model_type!r} is of model_type {family.model_type!r}")
    return family
