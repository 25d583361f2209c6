"""How tensor parallelism treats a module. Torch-free, so that planning counts what the engine will hold."""

from collections.abc import Mapping
from typing import Literal

TensorStyle = Literal["column", "row", "vocabulary", "head", "sequence", "column_norm", "per_head", "positions"]
"""How tensor parallelism treats a module (its weight as `[outputs, inputs]`):

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

SPLIT_DIM: Mapping[TensorStyle, int] = {"column": 0, "row": 1, "vocabulary": 0, "head": 0, "column_norm": 0}
"""Dim along which a style splits its parameters; one that lacks the dim (the bias of `row`) stays whole."""
