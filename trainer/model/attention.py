"""Self-attention, and the masks and document lengths that determine which tokens each query sees."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from keepwarm.trainer.model.norm import RMSNorm
from keepwarm.trainer.model.rotary import rotate
from keepwarm.trainer.model.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Context:
    """Sequence properties shared by all layers of one forward; at most one of the last three is set.

    Deliberately not a pytree: FSDP casts floating-point tensors among a layer's inputs to its compute dtype, and the
    rotation must stay fp32.
    """

    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    """Cosines and sines `[1 or micro, sequence, 1, rotating / 2]`; None with learned positions."""
    runs: tuple[int, ...] | None = None
    """Lengths of the documents, concatenated over all samples."""
    mask: torch.Tensor | None = None
    """True where a query `[sequence, 1]` may see a key `[1, sequence]`."""
    blocks: BlockMask | None = None
    """The same mask on CUDA, for FlexAttention."""


def context(
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    sequence: int,
    device: torch.device,
    documents: torch.Tensor | None,
    window: int | None,
) -> Context:
    """Return what the layers share in one forward over `sequence` tokens.

    Without documents and within the window, plain causal attention needs no mask. On the CPU, attention runs over one
    document at a time, which is cheaper than causal attention over the whole sequence; a mask would be slower.
    """
    windowed = window is not None and window < sequence
    if device.type == "cuda" and (documents is not None or windowed):
        return Context(rotation, blocks=_blocks(sequence, device, documents, window))
    if documents is not None:
        return Context(rotation, runs=_runs(documents), mask=_band(sequence, window, device) if windowed else None)
    return Context(rotation, mask=_band(sequence, window, device) if windowed else None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _runs(documents: torch.Tensor) -> tuple[int, ...]:
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    edges = [*starts.flatten().nonzero().flatten().tolist(), documents.numel()]
    return tuple(stop - start for start, stop in itertools.pairwise(edges))


def _band(sequence: int, window: int | None, device: torch.device) -> torch.Tensor:
    distance = torch.arange(sequence, device=device)[:, None] - torch.arange(sequence, device=device)
    return (distance >= 0) & (distance < (window or sequence))


def _blocks(sequence: int, device: torch.device, documents: torch.Tensor | None, window: int | None) -> BlockMask:
    def sees(sample: Any, head: Any, query: Any, key: Any) -> Any:
        allowed = query >= key
        if window is not None:
            allowed = allowed & (query - key < window)
        if documents is not None:
            allowed = allowed & (documents[sample, query] == documents[sample, key])
        return allowed

    samples = None if documents is None else documents.shape[0]
    return create_block_mask(sees, samples, None, sequence, sequence, device=device)


class Logits(NamedTuple):
    """What is done to the products of queries and keys."""

    scale: float | None = None
    """Factor; None: `1 / sqrt(head_dim)`."""
    cap: float | None = None
    """Soft cap: `cap * tanh(logits / cap)` (Gemma 2)."""
    sinks: torch.Tensor | None = None
    """A learnt logit for each head that takes part in the softmax and has no value (gpt-oss, Granite)."""


PLAIN = Logits()


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: Context, logits: Logits = PLAIN
) -> torch.Tensor:
    """Return causal attention; all are `[micro, sequence, heads, head_dim]`, with fewer key/value heads if grouped.

    Values, and with them the result, may have heads of another size than queries and keys.
    """
    if seen.blocks is not None:
        return _attend_blocks(query, key, value, seen.blocks, logits)
    if seen.runs is not None:
        mixed: torch.Tensor = _attend_documents(query, key, value, seen, logits)
        return mixed
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return _attend(query, key, value, seen.mask, logits).transpose(1, 2)


def _attend_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: BlockMask, logits: Logits
) -> torch.Tensor:
    options: dict[str, Any] = {
        "score_mod": None if logits.cap is None else _cap_of(logits.cap),
        "block_mask": blocks,
        "scale": logits.scale,
        "enable_gqa": query.shape[2] != key.shape[2],
    }
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    mixed: torch.Tensor
    if logits.sinks is None:
        mixed = _compiled_flex()(*heads_first, **options)
    else:
        alone, sums = _compiled_flex()(*heads_first, **options, return_aux=AuxRequest(lse=True))
        mixed = _beside_sinks(alone, sums.lse, logits.sinks)
    return mixed.transpose(1, 2)


def _beside_sinks(mixed: torch.Tensor, sums: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Leave to each head's sink its share of a result, given the logarithm of the sum of the softmax."""
    return mixed * torch.sigmoid(sums - sinks[:, None].to(sums.dtype))[..., None].to(mixed.dtype)


@cache
def _cap_of(cap: float) -> Callable[..., torch.Tensor]:
    def capped(score: torch.Tensor, *_: Any) -> torch.Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


# Compiled code would be specialised for each new list of lengths.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: Context, logits: Logits
) -> torch.Tensor:
    runs, mask = list(seen.runs or ()), seen.mask
    # `split` instead of slices: its backward is one concatenation, while that of a slice fills a whole zero tensor.
    heads_first = (torch.split(x.flatten(0, 1).transpose(0, 1)[None], runs, dim=2) for x in (query, key, value))
    parts = [
        _attend(q, k, v, None if mask is None else mask[: q.shape[2], : q.shape[2]], logits)
        for q, k, v in zip(*heads_first, strict=True)
    ]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).view(*query.shape[:3], -1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, logits: Logits
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if logits.cap is not None or logits.sinks is not None:
        return _unfused(query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), mask, logits)
    if groups > 1 and query.is_cuda and query.dtype not in (torch.bfloat16, torch.float16):
        # Only the flash kernels share keys among queries; the others would fall back to unfused attention.
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        groups = 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=logits.scale, enable_gqa=groups > 1
    )


def _unfused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, logits: Logits
) -> torch.Tensor:
    """Return attention with capped logits or sinks, which the fused kernels do not have."""
    scale = query.shape[-1] ** -0.5 if logits.scale is None else logits.scale
    scores = query @ key.transpose(2, 3) * scale
    if logits.cap is not None:
        scores = logits.cap * torch.tanh(scores / logits.cap)
    if mask is None:
        mask = _band(query.shape[2], None, query.device)
    scores = scores.masked_fill(~mask, -torch.inf).to(torch.promote_types(scores.dtype, torch.float32))
    mixed = scores.softmax(-1).to(query.dtype) @ value
    return mixed if logits.sinks is None else _beside_sinks(mixed, scores.logsumexp(-1), logits.sinks)


class Attention(nn.Module):
    """Multi-head or grouped-query self-attention.

    The number of heads follows from the width of the projections, so the module works with any share of the heads that
    tensor parallelism leaves on this rank.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.size_per_head
        queries, keys = spec.heads * self.head_dim, spec.key_value_heads * self.head_dim
        self.query = nn.Linear(spec.hidden_size, queries, bias=spec.qkv_bias)
        self.key = nn.Linear(spec.hidden_size, keys, bias=spec.qkv_bias)
        self.value = nn.Linear(spec.hidden_size, keys, bias=spec.qkv_bias)
        self.output = nn.Linear(queries, spec.hidden_size, bias=spec.attention_output_bias)
        self.qk_norm = spec.qk_norm
        if spec.qk_norm != "none":
            per_head = spec.qk_norm == "head"
            self.query_norm = RMSNorm(self.head_dim if per_head else queries, spec.norm_eps)
            self.key_norm = RMSNorm(self.head_dim if per_head else keys, spec.norm_eps)

    def forward(self, x: torch.Tensor, seen: Context) -> torch.Tensor:
        """Attend within `x`; input and result are `[micro, sequence, hidden]`."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.qk_norm == "projection":
            query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, key, value))
        if self.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        if seen.rotation is not None:
            query, key = rotate(query, *seen.rotation), rotate(key, *seen.rotation)
        mixed: torch.Tensor = self.output(attend(query, key, value, seen).flatten(-2))
        return mixed
