"""What an engine must be told about a model. `parallel` never imports one; `trainer.build` hands it in."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from parallel.architecture import Architecture
from parallel.style import TensorStyle as TensorStyle


class ModelParts(Protocol):
    """A decoder-only model that can be built in consecutive parts (one per pipeline stage)."""

    layers: int
    hidden_size: int
    heads: int
    """Attention heads; `heads` and `kv_heads` must divide by the tensor axis."""
    kv_heads: int
    vocabulary_size: int
    tied_embeddings: bool
    """The head's weight is the embedding's weight; its one canonical name is the embedding's."""

    @property
    def spec(self) -> Architecture:
        """The model's shape, for engines that bring layers of their own instead of calling `part`."""
        ...

    def part(self, layers: range, *, embed: bool, head: bool) -> nn.Module:
        """Layers `layers` (global indices), with the embedding and/or the head, under the current device.

        Parameter names are canonical whatever the part (but see `canonical`): layers live in a ModuleDict `layers`
        keyed by global index, each with a child `attention`. There are no buffers. An engine sets the attribute
        `sequence_shards` when hidden states come in split along the sequence: into how many.
        The module's forward is `forward(x, documents=None, targets=None)`:

        - `x`: token ids int64 `[micro, sequence]` if `embed`, else hidden states `[micro, sequence, hidden]`.
        - `documents`: int32 `[micro, sequence]` or None: index of the document each token belongs to, for
          attention that stays inside documents and positions that restart.
        - returns hidden states, or with `head`: logits `[micro, sequence, vocabulary]` when `targets` is None,
          else float `[micro, 2]`: per sample the summed cross-entropy of its unmasked targets, and the
          summed z-loss term already multiplied by its weight.
        """
        ...

    def canonical(self, name: str) -> str:
        """The name under which a part's parameter is known everywhere: the tied head's is the embedding's."""
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
