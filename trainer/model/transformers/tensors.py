"""Names of a described model's tensors in a folder of transformers. Torch-free."""

from keepwarm.trainer.model.families.tensor_names import Fusion, TensorNames
from keepwarm.trainer.model.transformers_spec import TransformersSpec


def tensor_names(spec: TransformersSpec) -> TensorNames:
    """Return the names that the model's class gives its tensors, by canonical name."""
    return TensorNames(
        top={"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"},
        layer="model.layers.{}.",
        inside=spec.description.inside,
        fusions=tuple(Fusion(module=name, parts=parts) for name, parts in spec.description.fused.items()),
    )
