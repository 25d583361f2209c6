"""Building blocks for Megatron Core's layers where its own do not fit."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from keepwarm.parallel.megatron.core import SelfAttention
from keepwarm.parallel.optimizer import apex

HALF = (torch.bfloat16, torch.float16)


class QueryKeyValueAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention whose fused projection holds all query rows, then all key rows, then all value rows.

    Megatron Core interleaves them by head group. With one block per projection, each is contiguous memory and can be a
    shard of its own: the state stores the projections unfused.
    """

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, key_value_states: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split `[sequence, micro, hidden]` into three tensors `[sequence, micro, heads of this rank, head_dim]`."""
        mixed, _ = self.linear_qkv(hidden_states)
        size = self.hidden_size_per_attention_head
        heads, groups = self.num_attention_heads_per_partition, self.num_query_groups_per_partition
        query, key, value = (
            part.unflatten(-1, (-1, size)) for part in mixed.split((heads * size, groups * size, groups * size), dim=-1)
        )
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value


class ScaledDotProductAttention(nn.Module):
    """Causal attention through PyTorch's fused kernels; Megatron Core's fused attention needs Transformer Engine."""

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__()

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **_: Any
    ) -> torch.Tensor:
        """Attend; inputs are `[sequence, micro, heads, head_dim]`, and the result merges the last two dims.

        `attention_mask` is bool `[micro, 1, sequence, sequence]`, True where a query may see a key; None: causal.
        """
        groups = query.shape[2] // key.shape[2]
        if groups > 1 and query.is_cuda and (attention_mask is not None or query.dtype not in HALF):
            # Kernels that take a mask or fp32 do not share keys among queries: attention would be unfused, and its
            # scores, `[micro, heads, sequence, sequence]`, kept for backward.
            key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
            groups = 1
        mixed = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            enable_gqa=groups > 1,
        )
        return mixed.permute(2, 0, 1, 3).flatten(2)


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm, marked for sequence parallelism as Megatron Core expects."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **options: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


class ApexRMSNorm(RMSNorm):
    """RMSNorm through Apex's fused kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.eps is not None
        return apex.rms_norm()(x, self.normalized_shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm, marked like `RMSNorm`."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **options: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


class ApexLayerNorm(LayerNorm):
    """LayerNorm through Apex's fused kernel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return apex.layer_norm()(x, self.normalized_shape, self.weight, self.bias, self.eps)


def _mark(norm: nn.Module, config: Any) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
