"""A causal model of transformers as `keepwarm.parallel.model.ModelParts`, built in stages."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch

from keepwarm.trainer.model.families.tensor_names import TensorNames
from keepwarm.trainer.model.parts import DecoderParts
from keepwarm.trainer.model.transformers.classes import build
from keepwarm.trainer.model.transformers.describe import renamed
from keepwarm.trainer.model.transformers.facts import Facts, facts_of
from keepwarm.trainer.model.transformers.initial import Rule, recorded
from keepwarm.trainer.model.transformers.stage import TransformersStage
from keepwarm.trainer.model.transformers.tensors import class_names
from keepwarm.trainer.model.transformers_spec import TransformersSpec


class TransformersDecoder(DecoderParts[TransformersSpec]):
    """See `keepwarm.trainer.model.decoder.Decoder`, whose layers are keepwarm's own."""

    def build_stage(self, layers: range, *, embed: bool, head: bool) -> TransformersStage:
        """See `keepwarm.parallel.model.ModelParts`; weights are not those of `initial` until copied in."""
        model = build(self.spec.config)
        renamed(model)
        return TransformersStage(model, self._found.facts, layers, embed=embed, head=head)

    def initial(
        self, name: str, global_shape: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """See `keepwarm.parallel.model.ModelParts`; the distributions are those of the model's class."""
        name = self.canonical(name)
        return self._found.rules[self._names.name(name)].draw(self.seed, name, global_shape, offsets, shape)

    def decays(self, name: str) -> bool:
        """Return whether the parameter is a matrix."""
        return len(self._shapes[self.canonical(name)]) > 1

    @cached_property
    def _found(self) -> "_Found":
        with torch.device("cpu"):
            model: Any = build(self.spec.config)
            rules = recorded(model)
            return _Found(rules, facts_of(model))

    @cached_property
    def _names(self) -> TensorNames:
        return class_names(self.spec)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.spec.shapes(range(self.layers), embed=True, head=True)


class _Found(NamedTuple):
    """What is found out about a class once."""

    rules: Mapping[str, Rule]
    facts: Facts
