"""Losses over a vocabulary split by the tensor axis; Megatron Core's cross-entropy accepts no process group."""

import torch
import torch.distributed as dist

from keepwarm.parallel.engine import Batch
from keepwarm.parallel.loss import MAIN, Z_LOSS
from keepwarm.parallel.mesh.collective import reduce_from
from keepwarm.parallel.targets import IGNORED

NAMES = (MAIN, Z_LOSS)
"""Names of the losses that `losses_of` returns."""


def losses_of(logits: torch.Tensor, micro: Batch, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """Return the losses of a micro-batch by name, fp32 `[micro, sequence]`, zero where the target is ignored.

    `logits` are this rank's part, as in `cross_entropy`.
    """
    entropy, partition = cross_entropy(logits, micro.targets, group)
    kept = micro.targets != IGNORED
    return {MAIN: entropy.where(kept, 0), Z_LOSS: partition.where(kept, 0).square()}


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cross-entropy and log-partition of every target, each fp32 `[micro, sequence]`.

    `logits` are `[micro, sequence, tokens of this rank]`; the ranks of `group` hold consecutive equal parts of the
    vocabulary. If a target is not a token id, its cross-entropy is the log-partition.
    """
    logits = logits.float()
    largest = logits.detach().amax(-1)
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    shifted = logits - largest[..., None]
    index = targets - group.rank() * logits.shape[-1]
    here = (index >= 0) & (index < logits.shape[-1])
    found = shifted.gather(-1, index.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0].where(here, 0)
    total = shifted.exp().sum(-1)
    if group.size() > 1:
        total, found = reduce_from(total, group), reduce_from(found, group)
    partition = total.log()
    return partition - found, partition + largest
