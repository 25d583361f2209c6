"""What an engine must be told about a model. `parallel` never imports one; `trainer.build` hands it in."""

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import nn

TensorStyle = Literal["column", "row", "vocabulary", "head", "sequence", "column_norm", "per_head", "positions"]
"""How tensor parallelism treats a module:

column      a linear layer whose output features are split (query, key, value, gate, up); input replicated
row         a linear layer whose input features are split (attention output, down); outputs are summed
vocabulary  the token embedding, split over the vocabulary
head        the output projection and loss, split over the vocabulary
sequence    a norm between the matrices: replicated weights, activations split along the sequence when
            `parallel.sequence` is on (their gradients are then summed over the tensor axis)
column_norm a norm over all features that column layers have split (OLMo 2's QK norm): weights split likewise, the
            mean of squares summed over the tensor axis (`reduce_group` of the module)
per_head    a norm of each head by itself (Qwen3's QK norm): replicated weights, each rank sees its own heads only,
            so gradients are summed over the tensor axis
positions   the table of learned positions: replicated, its output added to the token embedding's and therefore
            split along the sequence when that one is
"""


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

    def part(self, layers: range, *, embed: bool, head: bool) -> nn.Module:
        """Layers `layers` (global indices), with the embedding and/or the head, under the current device.

        Parameter names are canonical whatever the part: layers live in a ModuleDict keyed by global index.
        The module's forward is `forward(x, documents=None, targets=None)`:

        - `x`: token ids int64 `[micro, sequence]` if `embed`, else hidden states `[micro, sequence, hidden]`.
        - `documents`: int32 `[micro, sequence]` or None: index of the document each token belongs to, for
          attention that stays inside documents and positions that restart.
        - returns hidden states, or with `head`: logits `[micro, sequence, vocabulary]` when `targets` is None,
          else float `[micro, 2]`: per sample the summed cross-entropy of its unmasked targets, and the
          summed z-loss term already multiplied by its weight.
        """
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
