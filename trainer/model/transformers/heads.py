"""How many heads a layer's attention has: from its config, checked against its projections, and on one rank."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.collective import local

LATENT = (
    "attention.query_down",
    "attention.query_down_norm",
    "attention.key_value_down",
    "attention.key_value_down_norm",
)
"""What multi-head latent attention (DeepSeek-V2) computes once for all heads: low-rank queries, keys and values.

From these `attention.query` and `attention.key_value` make the heads.
"""

ATTENTION = "attention"
SINKS = "sinks"
"""The only parameter that an attention may own beside those of its modules: a number for each head."""

Shapes = Mapping[str, tuple[int, ...]]


class Heads(NamedTuple):
    """Number of heads, of key-value heads, and the size of a head's query and key, the largest of all layers."""

    heads: int
    kv_heads: int
    head_dim: int


def head_size(attention: Any, config: Any) -> int:
    """Return the features of each head in an attention that is not latent; they may differ between layers."""
    own = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    size: int = own or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def heads_of(config: Any, layers: Sequence[Shapes], sizes: Sequence[int]) -> Heads:
    """Return the heads that a config says; `sizes` are `head_size` of every layer.

    Raises:
        SpecError: a layer has others.
    """
    latent = getattr(config, "kv_lora_rank", None) is not None
    found = _latent_heads(config) if latent else _plain_heads(config, max(sizes))
    for index, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        rows = _latent_rows(config, found) if latent else _plain_rows(found, size)
        for part, expected in rows:
            shape = layer.get(f"{part}.weight")
            if shape is None or shape[0] != expected:
                raise SpecError(f"layer {index} has another number of heads than its config, or none at {part}")
        if "attention.output.weight" not in layer or "mlp.down.weight" not in layer:
            raise SpecError(f"layer {index} has other matrices than those of an attention and an MLP")
    return found


def check_own(layer: nn.Module, attention: nn.Module, where: str) -> None:
    """Raise SpecError if a layer or its attention owns parameters that no module computes with, but for sinks."""
    owned = [name for name, _ in layer.named_parameters(recurse=False)]
    owned += [name for name, _ in attention.named_parameters(recurse=False) if name != SINKS]
    if owned:
        raise SpecError(
            f"{where} computes with parameters of its own ({', '.join(owned)}), which keepwarm does not know"
        )


def _plain_heads(config: Any, size: int) -> Heads:
    heads = config.num_attention_heads
    return Heads(heads, getattr(config, "num_key_value_heads", None) or heads, size)


def _plain_rows(found: Heads, size: int) -> Iterator[tuple[str, int]]:
    yield "attention.query", found.heads * size
    yield "attention.key", found.kv_heads * size
    yield "attention.value", found.kv_heads * size


def _latent_heads(config: Any) -> Heads:
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    if keys != heads:
        raise SpecError(f"num_key_value_heads = {keys}: latent attention has as many as heads, which are {heads}")
    return Heads(heads, heads, config.qk_nope_head_dim + config.qk_rope_head_dim)


def _latent_rows(config: Any, found: Heads) -> Iterator[tuple[str, int]]:
    yield "attention.query", found.heads * found.head_dim
    yield "attention.key_value", found.heads * (config.qk_nope_head_dim + config.v_head_dim)


def count_heads(attention: Any, _: object) -> None:
    """Set what an attention module knows of its number of heads to that of this rank."""
    config = attention.config
    heads, keys, size = _local_heads(attention)
    if heads == config.num_attention_heads:
        return
    attention.config = copy.copy(config)
    here = {
        "num_heads": heads,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "num_key_value_groups": heads // keys,
        "embed_dim": heads * size,
    }
    for owner in (attention, attention.config):
        for name, value in here.items():
            if isinstance(vars(owner).get(name), int):
                setattr(owner, name, value)


def _local_heads(attention: Any) -> Heads:
    rows = local(attention.query.weight).shape[0]
    if "key_value" in attention._modules:
        size = attention.qk_head_dim
        return Heads(rows // size, rows // size, size)
    size = head_size(attention, attention.config)
    return Heads(rows // size, local(attention.key.weight).shape[0] // size, size)
