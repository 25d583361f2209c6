"""The interface of a model to engines. `parallel` never imports a model; `trainer.loop.build` passes it in."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from keepwarm.parallel.architecture import Architecture
from keepwarm.parallel.style import TensorStyle as TensorStyle


class ModelParts(Protocol):
    """A decoder-only model that can be built in consecutive stages."""

    layers: int
    hidden_size: int
    heads: int
    """Number of attention heads, which must be divisible by the tensor axis."""
    kv_heads: int
    """Number of key-value heads; where it is smaller, it must divide the tensor axis, whose ranks then hold copies."""
    vocabulary_size: int
    tied_embeddings: bool
    """Whether the head shares the embedding's weight; its only canonical name is then the embedding's."""
    loss_weights: Mapping[str, float]
    """Weight in the objective of every loss that stages return, by name; losses of weight 0 are left out.

    `main`, the cross-entropy of the targets, is always present.
    """

    @property
    def spec(self) -> Architecture:
        """The model's shape, for engines that bring their own layers instead of calling `build_stage`."""
        ...

    def build_stage(self, layers: range, *, embed: bool, head: bool) -> nn.Module:
        """Build `layers` (global indices) on the current device, with the embedding and/or the head.

        Parameter names are canonical in every stage (but see `canonical`): layers live in a ModuleDict `layers`
        keyed by global index, each with a child `attention`. Buffers are constants that are saved with the weights,
        whole and equal on all ranks of the stage, and named like parameters. If hidden states arrive split along
        the sequence, the engine sets the attribute `sequence_shards` to the number of parts.
        The module's forward is `forward(x, documents=None, targets=None, **extra)`:

        - `x`: token ids int64 `[micro, sequence]` if `embed`, else hidden states `[micro, sequence, hidden]`.
        - `documents`: int32 `[micro, sequence]` or None: index of the document each token belongs to, for
          attention that stays inside documents and positions that restart.
        - `extra`: the named tensors of `Batch.extra`, if the batch has any.
        - returns hidden states; a stage that adds its own losses (for example, to balance experts) returns hidden
          states and a dict of losses. With `head`: logits `[micro, sequence, vocabulary]` if `targets` is None, else a
          dict with `main` and the others. Losses are float `[micro]`, unweighted, summed over the unmasked targets of
          each sample; `keepwarm.parallel.loss.Losses` states their contract.
        """
        ...

    def canonical(self, name: str) -> str:
        """Return the canonical name of a stage's parameter; for the tied head it is the embedding's."""
        ...

    def tensor_plan(self) -> Mapping[str, TensorStyle]:
        """Map fnmatch patterns of module names to tensor-parallel styles; modules that match none are replicated."""
        ...

    def initial(
        self, name: str, global_shape: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Return initial values (fp32, CPU) of a box of a parameter or buffer: a function of (seed, name, index)."""
        ...

    def decays(self, name: str) -> bool:
        """Return whether weight decay may apply to this parameter (not to norms and biases)."""
        ...

    def is_embedding(self, name: str) -> bool:
        """Return whether the parameter is a token or position embedding (see `OptimizerSpec.decay_embeddings`)."""
        ...


def is_tied_across(name: str, model: ModelParts, pipeline: int) -> bool:
    """Return whether the parameter with this canonical name exists on both the first and the last pipeline rank."""
    return pipeline > 1 and model.tied_embeddings and model.canonical("head.weight") == name
