"""Tensor-parallel styles of modules. Torch-free, so that planning counts exactly what the engine will hold."""

from collections.abc import Mapping
from typing import Literal

TensorStyle = Literal["column", "row", "vocabulary", "head", "sequence", "column_norm", "per_head", "positions"]
"""Style in which tensor parallelism splits a module (its weight as `[outputs, inputs]`):

column      a linear layer whose output features are split (query, key, value, gate, up); input replicated
row         a linear layer whose input features are split (attention output, down); outputs are summed
vocabulary  the token embedding, split over the vocabulary
head        the output projection and loss, split over the vocabulary
sequence    a norm between the matrices: replicated weights, activations split along the sequence if
            `parallel.sequence` is on (the weights' gradients are then summed over the tensor axis)
column_norm a norm over all features that column layers have split (OLMo 2's QK norm): weights split likewise, the
            mean of squares summed over the tensor axis (`reduce_group` of the module)
per_head    a norm of each head separately (Qwen3's QK norm): replicated weights; each rank sees only its own heads,
            so gradients are summed over the tensor axis
positions   the table of learned positions: replicated; its output is added to that of the token embedding and
            therefore split along the sequence if that one is
"""

SPLIT_DIM: Mapping[TensorStyle, int] = {"column": 0, "row": 1, "vocabulary": 0, "head": 0, "column_norm": 0}
"""Dim along which a style splits its parameters; a parameter without that dim (the bias of `row`) stays whole."""
