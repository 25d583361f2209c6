"""The `model` of a job that leaves it to the folder in `init_from`. Torch-free."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.registry import FAMILIES
from keepwarm.trainer.model.huggingface_config import model_spec_from_hf_config
from keepwarm.trainer.model.transformers.resolve import CONFIG, read_config, resolved


def model_of(folder: Path, ignored: Collection[str] = ()) -> dict[str, Any] | None:
    """Return the section for a Hugging Face folder: keepwarm's own decoder if it computes the model, else the class of
    transformers; None if the folder has no config.

    Raises:
        SpecError: neither can; says why of both.
    """
    if not (folder / CONFIG).is_file():
        return None
    fields = read_config(folder / CONFIG)
    if fields.get("model_type") not in FAMILIES:
        return resolved({"transformers": str(folder)})
    try:
        return model_spec_from_hf_config(fields, ignored).model_dump(mode="json")
    except SpecError as error:
        why = str(error).removeprefix("config.json: ")
    try:
        return resolved({"transformers": str(folder)})
    except SpecError as error:
        raise SpecError(f"{folder / CONFIG}: {why}; nor as model.transformers: {error}") from error
