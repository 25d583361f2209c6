"""A causal model of transformers as `keepwarm.parallel.model.ModelParts`, built in stages."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch

from keepwarm.parallel.loss import MAIN, Z_LOSS
from keepwarm.parallel.style import TensorStyle
from keepwarm.trainer.model.families.tensor_names import TensorNames
from keepwarm.trainer.model.transformers.classes import build
from keepwarm.trainer.model.transformers.describe import renamed
from keepwarm.trainer.model.transformers.facts import Facts, facts_of
from keepwarm.trainer.model.transformers.initial import Rule, recorded
from keepwarm.trainer.model.transformers.stage import TransformersStage
from keepwarm.trainer.model.transformers.tensors import tensor_names
from keepwarm.trainer.model.transformers_spec import TransformersSpec


class TransformersDecoder:
    """See `keepwarm.trainer.model.decoder.Decoder`, whose layers are keepwarm's own."""

    def __init__(self, spec: TransformersSpec, seed: int) -> None:
        self.spec = spec
        self.seed = seed
        self.layers = spec.layers
        self.hidden_size = spec.hidden_size
        self.heads = spec.heads
        self.kv_heads = spec.key_value_heads
        self.vocabulary_size = spec.vocabulary_size
        self.tied_embeddings = spec.tied_embeddings
        self.loss_weights: Mapping[str, float] = {MAIN: 1.0, Z_LOSS: spec.z_loss}

    def build_stage(self, layers: range, *, embed: bool, head: bool) -> TransformersStage:
        """See `keepwarm.parallel.model.ModelParts`; weights are not those of `initial` until copied in."""
        model = build(self.spec.config)
        renamed(model)
        return TransformersStage(model, self._found.facts, layers, embed=embed, head=head)

    def tensor_plan(self) -> Mapping[str, TensorStyle]:
        """See `keepwarm.parallel.model.ModelParts`."""
        return self.spec.description.styles

    def canonical(self, name: str) -> str:
        """Return the canonical name of a stage's parameter."""
        return "embedding.weight" if name == "head.weight" and self.tied_embeddings else name

    def initial(
        self, name: str, global_shape: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """See `keepwarm.parallel.model.ModelParts`; the distributions are those of the model's class."""
        name = self.canonical(name)
        return self._found.rules[self._names.name(name)].draw(self.seed, name, global_shape, offsets, shape)

    def decays(self, name: str) -> bool:
        """Return whether the parameter is a matrix."""
        return len(self._shapes[self.canonical(name)]) > 1

    def is_embedding(self, name: str) -> bool:
        """Return whether the parameter is the token embedding (or the tied head)."""
        return self.canonical(name) == "embedding.weight"

    @cached_property
    def _found(self) -> "_Found":
        with torch.device("cpu"):
            model: Any = build(self.spec.config)
            rules = recorded(model)
            return _Found(rules, facts_of(model))

    @cached_property
    def _names(self) -> TensorNames:
        return tensor_names(self.spec)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.spec.shapes(range(self.layers), embed=True, head=True)


class _Found(NamedTuple):
    """What is found out about a class once."""

    rules: Mapping[str, Rule]
    facts: Facts
