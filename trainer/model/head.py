"""Output projection fused with the loss, computed one chunk of tokens at a time."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from keepwarm.parallel.loss import MAIN, Z_LOSS
from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.model.collective import local
from keepwarm.trainer.model.shapes import LOGITS_AT_ONCE


class Head(nn.Module):
    """Projects onto the vocabulary and, given targets, returns the losses instead of the logits.

    Vocabulary parallelism: the engine makes `weight` and `bias` this rank's rows (a tensor, or a DTensor sharded on
    dim 0; the last ranks may have fewer), and sets `vocabulary_group` to the ranks that share the vocabulary and
    `vocabulary_start` to this rank's first token. The input must be equal on all of them; its gradient is partial, and
    the engine must sum it over the group. The result is equal on all of them, and their gradients are complete for
    the local rows.
    """

    def __init__(self, hidden_size: int, vocabulary_size: int, *, cap: float | None = None, bias: bool = False) -> None:
        """With a `cap`, the logits are `cap * tanh(logits / cap)` (Gemma 2)."""
        super().__init__()
        self.cap = cap
        self.vocabulary_size = vocabulary_size
        self.weight = nn.Parameter(torch.empty(vocabulary_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(vocabulary_size)) if bias else None
        self.chunk = LOGITS_AT_ONCE
        self.vocabulary_group: dist.ProcessGroup | None = None
        self.vocabulary_start = 0

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return logits `[micro, sequence, vocabulary]`; given `targets` `[micro, sequence]`, losses, float `[micro]`.

        `main` is the cross-entropy and `z_loss` the squared log-partition (Chowdhery et al., 2022), both summed over
        the targets of a sample other than `IGNORED`, in at least fp32. Logits gathered over a vocabulary group carry no
        gradient.
        """
        weight, bias = local(self.weight), None if self.bias is None else local(self.bias)
        if targets is None:
            return self._gather(_capped(F.linear(x, weight, bias), self.cap))
        vocabulary = _Vocabulary(
            max(1, self.chunk // self._widest), self.vocabulary_group, self.vocabulary_start, self.cap
        )
        loss, partition = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, 1), weight, bias, targets.flatten(), vocabulary
        )
        loss, partition = loss.view_as(targets), partition.view_as(targets)
        return {MAIN: loss.sum(1), Z_LOSS: partition.square().sum(1)}

    @property
    def _widest(self) -> int:
        """Rows of every rank but the last ones, which may have fewer; all must cut the tokens into equal chunks."""
        ranks = 1 if self.vocabulary_group is None else dist.get_world_size(self.vocabulary_group)
        return -(-self.vocabulary_size // ranks)

    def _gather(self, logits: torch.Tensor) -> torch.Tensor:
        if self.vocabulary_group is None:
            return logits
        logits = F.pad(logits.detach(), (0, self._widest - logits.shape[-1])).contiguous()
        parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(self.vocabulary_group))]
        dist.all_gather(parts, logits, group=self.vocabulary_group)
        return torch.cat(parts, dim=-1)[..., : self.vocabulary_size]


class _Vocabulary(NamedTuple):
    """This rank's part of the vocabulary, and the chunk size."""

    chunk: int
    """Number of tokens whose logits exist at the same time."""
    group: dist.ProcessGroup | None
    """Ranks that share the vocabulary."""
    start: int
    """First token of this rank."""
    cap: float | None
    """Soft cap of the logits."""


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy and log-partition of each token, `[tokens]`; both are zero where the target is ignored.

    A single chunk keeps its logits for backward. With several chunks none does: backward projects again, so memory is
    that of one chunk at any length.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        vocabulary: _Vocabulary,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunk, group, start, cap = vocabulary
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = torch.empty(len(x), dtype=wide, device=x.device)
        partition = torch.empty_like(loss)
        logits = None
        for part in _chunks(len(x), chunk):
            logits = _capped(F.linear(x[part], weight, bias), cap)
            partition[part] = _log_partition(logits.to(wide), group)
            loss[part] = partition[part] - _at_targets(logits.to(wide), targets[part] - start, group)
        kept = targets != IGNORED
        ctx.save_for_backward(x, weight, bias, targets, partition, logits if len(x) <= chunk else None)
        ctx.chunk, ctx.start, ctx.cap = chunk, start, cap
        return loss.where(kept, 0), partition.where(kept, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, targets, partition, logits = ctx.saved_tensors
        kept = targets != IGNORED
        of_loss, of_partition = (gradient.where(kept, 0) for gradient in gradients)
        grad_x = torch.empty_like(x)
        # Accumulate chunks in fp32: in bf16 every addition would round away part of the sum.
        grad_weight = torch.zeros_like(weight, dtype=partition.dtype) if logits is None else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=partition.dtype)
        for part in _chunks(len(x), ctx.chunk):
            again = _capped(F.linear(x[part], weight, bias), ctx.cap) if logits is None else logits
            slope = (again - partition[part, None]).exp_()
            slope *= (of_loss + of_partition)[part, None]
            _subtract_at(slope, targets[part] - ctx.start, of_loss[part])
            if ctx.cap is not None:
                slope *= 1 - (again / ctx.cap).square()
            if grad_bias is not None:
                grad_bias += slope.sum(0)
            slope = slope.to(x.dtype)
            torch.mm(slope, weight, out=grad_x[part])
            product = slope.t() @ x[part]
            grad_weight = product if grad_weight is None else grad_weight.add_(product)
            del product  # or the next one would live beside it, each as large as the weight
        assert grad_weight is not None
        of_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_x, grad_weight.to(weight.dtype), of_bias, None, None


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(at, min(at + chunk, tokens)) for at in range(0, tokens, chunk)]


def _log_partition(logits: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    if group is None:
        return logits.logsumexp(1)
    largest = logits.amax(1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = (logits - largest[:, None]).exp_().sum(1)
    dist.all_reduce(total, group=group)
    return largest + total.log_()


def _local(index: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row-wise column indices `[tokens, 1]` clamped to the local slice, and which are inside it `[tokens]`."""
    return index.clamp(0, size - 1)[:, None], (index >= 0) & (index < size)


def _at_targets(logits: torch.Tensor, index: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    column, here = _local(index, logits.shape[1])
    found = logits.gather(1, column)[:, 0].where(here, 0)
    if group is not None:
        dist.all_reduce(found, group=group)
    return found


def _subtract_at(slope: torch.Tensor, index: torch.Tensor, amount: torch.Tensor) -> None:
    column, here = _local(index, slope.shape[1])
    slope.scatter_add_(1, column, -amount.where(here, 0)[:, None])
