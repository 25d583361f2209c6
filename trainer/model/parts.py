"""What decoders of every origin share as `keepwarm.parallel.model.ModelParts`."""

from collections.abc import Mapping
from typing import Generic, TypeVar

from keepwarm.parallel.loss import MAIN, Z_LOSS
from keepwarm.parallel.style import TensorStyle
from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.shapes import tensor_plan

SpecT = TypeVar("SpecT", bound=AnyModelSpec)


class DecoderParts(Generic[SpecT]):
    """Sizes, canonical names and tensor-parallel styles, as the spec says them.

    A stage with a head but no embedding owns the head's weight as `head.weight` even if embeddings are tied; its
    canonical name, given by `canonical`, is then `embedding.weight`, and the two are replicas.
    """

    def __init__(self, spec: SpecT, seed: int) -> None:
        self.spec = spec
        self.seed = seed
        self.layers = spec.layers
        self.hidden_size = spec.hidden_size
        self.heads = spec.heads
        self.kv_heads = spec.key_value_heads
        self.vocabulary_size = spec.vocabulary_size
        self.tied_embeddings = spec.tied_embeddings
        self.loss_weights: Mapping[str, float] = {MAIN: 1.0, Z_LOSS: spec.z_loss}

    def tensor_plan(self) -> Mapping[str, TensorStyle]:
        """See `keepwarm.parallel.model.ModelParts`."""
        return tensor_plan(self.spec)

    def canonical(self, name: str) -> str:
        """Return the canonical name of a stage's parameter."""
        return "embedding.weight" if name == "head.weight" and self.tied_embeddings else name

    def is_embedding(self, name: str) -> bool:
        """Return whether the parameter is the token embedding (or the tied head) or the learned positions."""
        return self.canonical(name) in ("embedding.weight", "positions.weight")
