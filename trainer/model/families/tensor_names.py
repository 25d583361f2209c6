"""Tensor names and layouts of a model family, by the canonical names of the parameters. Torch-free."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from keepwarm.trainer.errors import CheckpointError
from keepwarm.trainer.model.shapes import split_layer

PROJECTIONS = ("attention.query", "attention.key", "attention.value")

_CONSTANT_NAMES = re.compile(
    r"(^|\.)(inv_freq|freqs|freqs_cis|rope_cache|(cos|sin)_cached|position_ids|masked_bias|(attention|attn)\.bias)$"
)


def is_constant(name: str, dtype: str) -> bool:
    """Return whether a tensor that the model has no parameter for is a constant that its program saved beside them.

    Masks, positions and rotary tables have known names; integers, booleans and complex numbers are never parameters.
    `dtype` is named as in the safetensors format.
    """
    return not dtype.startswith(("F", "BF")) or _CONSTANT_NAMES.search(name) is not None


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """Several modules of a layer that the family stores as one."""

    module: str
    """Name of the fused module inside a layer."""
    parts: tuple[str, ...]
    """Canonical names of the modules it holds, in order."""
    order: Literal["blocks", "groups"] = "blocks"
    """blocks: each part whole, in sequence; groups: for each group, its share of every part."""
    groups: int | None = None
    """Number of groups; None: as many as key-value heads."""


@dataclass(frozen=True, kw_only=True)
class TensorNames:
    """A family's tensors: their names by canonical name, fused modules, and transposed matrices."""

    top: Mapping[str, str]
    """Modules outside the layers by canonical name; `embedding`, `final_norm` and `head` are required."""
    layer: str
    """Prefix of a layer; `{}` stands for its index."""
    inside: Mapping[str, str]
    """Modules inside a layer by canonical name, without those in `fusions`."""
    fusions: tuple[Fusion, ...] = ()
    transposed: bool = False
    """Whether linear layers inside layers store `[inputs, outputs]`, as GPT-2's Conv1D does."""
    head_alias: str | None = None
    """Second name that files may use for the head."""

    def name(self, canonical: str) -> str:
        """Return the tensor name of a canonical parameter. Raise `CheckpointError` if the family has none."""
        module, _, kind = canonical.rpartition(".")
        index, inside = split_layer(module)
        fusion = self.fusion(canonical)
        try:
            if index is None:
                return f"{self.top[module]}.{kind}"
            theirs = fusion.module if fusion else self.inside[inside]
        except KeyError:
            raise CheckpointError(f"{canonical} has no place in a model of this type") from None
        return self.layer.format(index) + (f"{theirs}.{kind}" if theirs else kind)

    def fusion(self, canonical: str) -> Fusion | None:
        """Return the fusion that contains a canonical parameter, or None."""
        index, inside = split_layer(canonical.rpartition(".")[0])
        if index is None:
            return None
        return next((fusion for fusion in self.fusions if inside in fusion.parts), None)

    def is_transposed(self, canonical: str, dims: int) -> bool:
        """Return whether the family stores the transpose of a canonical parameter."""
        return self.transposed and canonical.startswith("layers.") and dims == 2
