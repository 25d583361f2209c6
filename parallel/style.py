"""Tensor-parallel styles of modules. Torch-free, so that planning counts exactly what the engine will hold."""

from collections.abc import Iterator, Mapping
from typing import Literal

TensorStyle = Literal[
    "column",
    "key_value",
    "row",
    "vocabulary",
    "head",
    "sequence",
    "column_norm",
    "key_value_norm",
    "per_head",
    "heads",
    "positions",
]
"""Style in which tensor parallelism splits a module (its weight as `[outputs, inputs]`):

column      a linear layer whose output features are split (query, gate, up); input replicated
key_value   the same for keys and values: where there are fewer heads than ranks, neighbouring ranks hold copies of one
row         a linear layer whose input features are split (attention output, down); outputs are summed
vocabulary  the token embedding, split over the vocabulary, of which the last ranks may have fewer tokens
head        the output projection and loss, split likewise
sequence    a norm between the matrices: replicated weights, activations split along the sequence if
            `parallel.sequence` is on (the weights' gradients are then summed over the tensor axis)
column_norm a norm over all features that column layers have split (OLMo 2's QK norm): weights split likewise, the
            mean of squares summed over the tensor axis (`reduce_group` of the module)
key_value_norm  the same over the keys, copied with their heads
per_head    a norm of each head separately (Qwen3's QK norm), or what all heads are made from (the low-rank projections
            of latent attention): replicated weights; each rank sees only its own heads, so gradients are summed over
            the tensor axis
heads       numbers that belong to the heads (attention sinks), owned by the attention itself: split likewise
positions   the table of learned positions: replicated; its output is added to that of the token embedding and
            therefore split along the sequence if that one is
"""

SPLIT_DIM: Mapping[TensorStyle, int] = {
    "column": 0,
    "key_value": 0,
    "row": 1,
    "vocabulary": 0,
    "head": 0,
    "column_norm": 0,
    "key_value_norm": 0,
    "heads": 0,
}
"""Dim along which a style splits its parameters; a parameter without that dim (the bias of `row`) stays whole."""
COPIED = ("key_value", "key_value_norm")
"""Styles of which ranks hold copies where there are fewer key-value heads than ranks."""


def copies_of(style: TensorStyle | None, kv_heads: int, tensor: int) -> int:
    """Return how many neighbouring ranks of the tensor axis hold the same part of a module's parameters."""
    return tensor // kv_heads if style in COPIED and kv_heads < tensor else 1


def misfits(heads: int, kv_heads: int, vocabulary_size: int, tensor: int) -> Iterator[str]:
    """Yield a line for each size of a model that cannot be laid over `tensor` ranks."""
    if heads % tensor:
        yield f"model.heads = {heads} does not divide by parallel.tensor = {tensor}"
    elif kv_heads % tensor and tensor % kv_heads:
        yield f"model.kv_heads = {kv_heads} neither divides by parallel.tensor = {tensor} nor divides it"
    if (tensor - 1) * -(-vocabulary_size // tensor) >= vocabulary_size:
        yield f"model.vocabulary_size = {vocabulary_size} leaves a rank of parallel.tensor = {tensor} without a token"


def unequal(kv_heads: int, vocabulary_size: int, tensor: int) -> Iterator[str]:
    """Yield a line for each size whose parts would be copies or of unequal size, for engines that have equal ones."""
    if kv_heads % tensor:
        yield f"model.kv_heads = {kv_heads} does not divide by parallel.tensor = {tensor}, and only torch copies heads"
    if vocabulary_size % tensor:
        yield (
            f"model.vocabulary_size = {vocabulary_size} does not divide by parallel.tensor = {tensor}, and only torch "
            "splits it all the same"
        )
