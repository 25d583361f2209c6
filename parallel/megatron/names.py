"""Map Megatron Core's parameters to canonical names, and to the part of each tensor that they hold.

One of its parameters may hold several canonical tensors in sequence: query, key and value, or gate and up.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import nn

from keepwarm.parallel.architecture import native
from keepwarm.parallel.model import ModelParts, is_tied_across
from keepwarm.parallel.parameter import ShardingSpec, Split, TensorSlice


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One canonical tensor inside the memory of a Megatron Core parameter."""

    name: str
    """Canonical name."""
    global_shape: tuple[int, ...]
    box: TensorSlice
    """The part of the tensor that this rank holds."""
    replicas: tuple[int, ...]
    """Ranks that hold the same box if every data-parallel rank holds the whole parameter, ascending."""
    start: int
    """Index of the piece's first element in the parameter, in row-major order."""

    @property
    def stop(self) -> int:
        """Index just past the piece's last element."""
        return self.start + prod(self.box.shape)


def pieces_of(
    gpt: nn.Module, layers: range, model: ModelParts, sharding: ShardingSpec
) -> Iterator[tuple[nn.Parameter, list[Piece]]]:
    """Yield every parameter of a stage with the canonical tensors in it, in the order of registration."""
    for name, parameter in gpt.named_parameters():
        dim = _split_dim(name)
        start, pieces = 0, []
        for ours, rows in _parts(name, layers, model, parameter.shape[0], sharding):
            piece = _piece(ours, (rows, *parameter.shape[1:]), dim, start, model, sharding)
            pieces.append(piece)
            start = piece.stop
        if start != parameter.numel():
            raise AssertionError(f"{name}: {start} of {parameter.numel()} elements have a name")
        yield parameter, pieces


def _split_dim(name: str) -> int | None:
    """Return the dim that the tensor axis splits; Megatron Core records it only on parameters that it initialises."""
    module, kind = name.rsplit(".", 2)[-2:]
    if module in ("word_embeddings", "linear_qkv", "linear_fc1", "output_layer"):
        return 0
    return 1 if module in ("linear_proj", "linear_fc2") and kind == "weight" else None


def _piece(
    name: str, shape: tuple[int, ...], dim: int | None, start: int, model: ModelParts, sharding: ShardingSpec
) -> Piece:
    """Return the piece of `shape` on this rank, split over the tensor axis along `dim`."""
    tensor = sharding.layout.tensor
    whole = tuple(size * tensor if at == dim else size for at, size in enumerate(shape))
    box = TensorSlice.whole(whole) if dim is None else TensorSlice.whole(whole).cut(dim, tensor, sharding.at.tensor)
    tied = is_tied_across(name, model, sharding.layout.pipeline)
    holders = (0, sharding.layout.pipeline - 1) if tied else (sharding.at.pipeline,)
    placed = ShardingSpec(
        layout=sharding.layout, at=sharding.at, split={} if dim is None else {name: Split(dim)}, shard_size=1
    )
    return Piece(name=name, global_shape=whole, box=box, replicas=placed.replicas(name, holders), start=start)


def _parts(name: str, layers: range, model: ModelParts, rows: int, sharding: ShardingSpec) -> Iterator[tuple[str, int]]:
    """Yield the canonical names of the tensors in a parameter, with the rows of each on this rank."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found is None:
        yield model.canonical(_OUTSIDE[name]), rows
        return
    module, kind = f"layers.{layers[int(found[1])]}", found[3]
    if found[2] == "self_attention.linear_qkv":
        tensor, size = sharding.layout.tensor, model.spec.size_per_head
        for part, heads in (("query", model.heads), ("key", model.kv_heads), ("value", model.kv_heads)):
            yield f"{module}.attention.{part}.{kind}", heads * size // tensor
    elif found[2] == "mlp.linear_fc1" and native(model.spec).activation == "swiglu":
        for part in ("gate", "up"):
            yield f"{module}.mlp.{part}.{kind}", rows // 2
    else:
        yield f"{module}.{_INSIDE[found[2]]}.{kind}", rows


_OUTSIDE = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "embedding.position_embeddings.weight": "positions.weight",
    "decoder.final_layernorm.weight": "final_norm.weight",
    "decoder.final_layernorm.bias": "final_norm.bias",
    "output_layer.weight": "head.weight",
}

_INSIDE = {
    "input_layernorm": "attention_norm",
    "self_attention.q_layernorm": "attention.query_norm",
    "self_attention.k_layernorm": "attention.key_norm",
    "self_attention.linear_proj": "attention.output",
    "pre_mlp_layernorm": "mlp_norm",
    "mlp.linear_fc1": "mlp.up",
    "mlp.linear_fc2": "mlp.down",
}
