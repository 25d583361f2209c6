"""Names of a described model's tensors in a folder of transformers. Torch-free."""

from dataclasses import replace

from keepwarm.trainer.model.families.registry import FAMILIES, family_of
from keepwarm.trainer.model.families.tensor_names import Fusion, TensorNames
from keepwarm.trainer.model.transformers_spec import TransformersSpec


def class_names(spec: TransformersSpec) -> TensorNames:
    """Return the names that the model's class gives its tensors, by canonical name."""
    found = spec.description
    return TensorNames(
        top=found.top,
        layer=found.layer,
        inside=found.inside,
        fusions=tuple(
            Fusion(module=name, parts=parts, order="groups", groups=found.fused_groups.get(name, 1))
            for name, parts in found.fused.items()
        ),
    )


def tensor_names(spec: TransformersSpec) -> TensorNames:
    """Return the names that tensors have in published folders; a head may have another one than in the class."""
    names, kind = class_names(spec), spec.model_type
    if kind not in FAMILIES:
        return names
    head = family_of(kind).tensors.top["head"]
    return replace(names, top={**names.top, "head": head}, head_alias=names.top["head"])
