"""What an engine must be told about a model. `parallel` never imports one; `trainer.loop.build` hands it in."""

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
    """Attention heads; `heads` and `kv_heads` must divide by the tensor axis."""
    kv_heads: int
    vocabulary_size: int
    tied_embeddings: bool
    """The head's weight is the embedding's weight; its one canonical name is the embedding's."""
    loss_weights: Mapping[str, float]
    """Every loss that stages return, by name, and its weight in what is optimised; one of weight 0 is left out.

    `main`, the cross-entropy of the targets, is always one of them.
    """

    @property
    def spec(self) -> Architecture:
        """The model's shape, for engines that bring layers of their own instead of calling `build_stage`."""
        ...

    def build_stage(self, layers: range, *, embed: bool, head: bool) -> nn.Module:
        """Layers `layers` (global indices), with the embedding and/or the head, under the current device.

        Parameter names are canonical whatever the stage (but see `canonical`): layers live in a ModuleDict `layers`
        keyed by global index, each with a child `attention`. There are no buffers. An engine sets the attribute
        `sequence_shards` when hidden states come in split along the sequence: into how many.
        The module's forward is `forward(x, documents=None, targets=None, **extra)`:

        - `x`: token ids int64 `[micro, sequence]` if `embed`, else hidden states `[micro, sequence, hidden]`.
        - `documents`: int32 `[micro, sequence]` or None: index of the document each token belongs to, for
          attention that stays inside documents and positions that restart.
        - `extra`: the named tensors of `Batch.extra`, where the batch has any.
        - returns hidden states; a stage that adds losses of its own (say, one that balances experts) returns hidden
          states and a dict of them. With `head`: logits `[micro, sequence, vocabulary]`
          when `targets` is None, else a dict with `main` and the others. Losses are float `[micro]`, not weighted,
          summed over the unmasked targets of each sample; `keepwarm.parallel.loss.Losses` says what they have to obey.
        """
        ...

    def canonical(self, name: str) -> str:
        """The name under which a stage's parameter is known everywhere: the tied head's is the embedding's."""
        ...

    def tensor_plan(self) -> Mapping[str, TensorStyle]:
        """fnmatch patterns of module names to their tensor-parallel style; unnamed modules are replicated."""
        ...

    def initial(
        self, name: str, global_shape: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Initial values (fp32, CPU) of a box of the parameter `name`: a function of (seed, name, index) alone."""
        ...

    def decays(self, name: str) -> bool:
        """Whether weight decay may apply to this parameter (not to norms and biases)."""
        ...

    def is_embedding(self, name: str) -> bool:
        """Whether the parameter is a token or position embedding (see `OptimizerSpec.decay_embeddings`)."""
        ...


def is_tied_across(name: str, model: ModelParts, pipeline: int) -> bool:
    """Whether a parameter of this canonical name exists on the first and on the last pipeline rank."""
    return pipeline > 1 and model.tied_embeddings and model.canonical("head.weight") == name
