"""Make the model that a job's `model` section describes."""

from typing import Literal

from keepwarm.parallel.model import ModelParts
from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.decoder import Decoder
from keepwarm.trainer.model.spec import ModelSpec


def make_model(spec: AnyModelSpec, seed: int, *, norms: Literal["torch", "apex"] = "torch") -> ModelParts:
    """Return the model as parts for an engine; `norms` chooses the kernels of keepwarm's own layers."""
    if isinstance(spec, ModelSpec):
        return Decoder(spec, seed, norms=norms)
    # Imports transformers, which takes seconds and is optional.
    from keepwarm.trainer.model.transformers.parts import TransformersDecoder

    return TransformersDecoder(spec, seed)
