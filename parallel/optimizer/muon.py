"""Muon (Jordan et al., 2024): updates of the layers' matrices are orthogonalised; everything else is AdamW's.

The update of a matrix is its momentum with all singular values brought near one by five Newton-Schulz iterations, times
0.2 sqrt(max(rows, columns)), so that learning rates and weight decay of AdamW carry over (Liu et al., 2025).

Newton-Schulz needs whole matrices. Each rank of a pipeline coordinate owns some: the others send it their parts, and it
returns to each its part of the result, so that every element crosses the network once in each direction and no matrix
is orthogonalised twice.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from keepwarm.parallel.parameter import ShardedParameter, TensorSlice
from keepwarm.parallel.spec import OptimizerSpec

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SCALE = 0.2
_SMALLEST_NORM = 1e-7
MOMENTUM = "momentum"


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Return U S V^T for a matrix U D V^T, with all of S between about 0.7 and 1.2, in the matrix's own precision."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x: torch.Tensor = wide / wide.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.T


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One matrix of this pipeline coordinate, as this rank sees it."""

    sharded: ShardedParameter
    weight_decay: float
    momentum: torch.Tensor
    """Of the shape of the local part; part of the state."""
    sends: bool
    """Whether the owner takes this rank's part, and not that of another rank that holds the same."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts of a matrix that this rank owns, by rank of the group."""

    shape: tuple[int, ...]
    boxes: Sequence[TensorSlice]
    takes: Sequence[bool]
    """Whether the part comes from that rank, and not from another one that holds the same."""

    @property
    def taken(self) -> list[int]:
        """Number of elements that come from each rank."""
        return [math.prod(box.shape) if takes else 0 for box, takes in zip(self.boxes, self.takes, strict=True)]

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = parts[0].new_empty(self.shape)
        for box, takes, part in zip(self.boxes, self.takes, parts, strict=True):
            if takes:
                whole[_slices(box)] = part.view(box.shape)
        return whole

    def cut(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole[_slices(box)] for box in self.boxes]


def _slices(box: TensorSlice) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(box.offsets, box.shape, strict=True))


class Muon:
    """Updates the matrices of all stages of a rank."""

    def __init__(
        self,
        spec: OptimizerSpec,
        parameters: Iterable[tuple[ShardedParameter, float]],
        group: dist.ProcessGroup | None,
        precision: torch.dtype,
    ) -> None:
        """Allocate the momenta.

        Args:
            parameters: matrices with their weight decay, in the same order on all ranks of `group`.
            group: the ranks of this pipeline coordinate; None in a world of one.
            precision: of Newton-Schulz.
        """
        self._momentum, self._precision = spec.muon_momentum, precision
        self._group = group
        self._rank = 0 if group is None else dist.get_global_rank(group, group.rank())
        self._ranks = [self._rank] if group is None else dist.get_process_group_ranks(group)
        self._matrices = [
            _Matrix(sharded, decay, torch.zeros_like(sharded.local.data), self._is_first(sharded.replicas))
            for sharded, decay in parameters
        ]
        place, size = self._ranks.index(self._rank), len(self._ranks)
        self._owned = [self._parts(matrix.sharded) for matrix in self._matrices[place::size]] if size > 1 else []

    def step(self, lr: float) -> None:
        """Apply one update from the gradients of the local parameters."""
        size = len(self._ranks)
        for turn, first in enumerate(range(0, len(self._matrices), size)):
            some = self._matrices[first : first + size]
            owned = self._owned[turn] if turn < len(self._owned) else None
            for matrix, update in zip(some, self._exchanged(some, owned), strict=True):
                weight = matrix.sharded.local.data
                scale = SCALE * math.sqrt(max(matrix.sharded.global_shape))
                weight.mul_(1.0 - lr * matrix.weight_decay).add_(update.to(weight.dtype), alpha=-lr * scale)

    def state(self) -> Iterator[tuple[ShardedParameter, torch.Tensor]]:
        """Yield the momentum of each matrix."""
        for matrix in self._matrices:
            yield matrix.sharded, matrix.momentum

    def _exchanged(self, some: Sequence[_Matrix], owned: "_Parts | None") -> list[torch.Tensor]:
        """Return this rank's parts of the orthogonalised updates of matrices of which it owns at most one."""
        updates = [self._with_momentum(matrix) for matrix in some]
        if len(self._ranks) == 1:
            return [orthogonalised(update) for update in updates]
        sent = [update if matrix.sends else update[:0] for matrix, update in zip(some, updates, strict=True)]
        parts = self._all_to_all(sent, [] if owned is None else owned.taken)
        whole = [] if owned is None else owned.cut(orthogonalised(owned.joined(parts)))
        back = self._all_to_all(whole, [update.numel() for update in updates])
        return [part.view(update.shape) for part, update in zip(back, updates, strict=False)]

    def _parts(self, sharded: ShardedParameter) -> "_Parts":
        boxes = [sharded.box_of(rank) for rank in self._ranks]
        first = {box: place for place, box in reversed(list(enumerate(boxes)))}
        return _Parts(sharded.global_shape, boxes, [first[box] == place for place, box in enumerate(boxes)])

    def _with_momentum(self, matrix: _Matrix) -> torch.Tensor:
        """Return Nesterov's look-ahead of the momentum, in the precision of Newton-Schulz."""
        gradient = matrix.sharded.local.grad
        if gradient is None:
            gradient = torch.zeros_like(matrix.momentum)
        matrix.momentum.lerp_(gradient, 1.0 - self._momentum)
        return gradient.lerp(matrix.momentum, self._momentum).to(self._precision)

    def _all_to_all(self, sent: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Send the n-th tensor to the n-th rank, and return what each has sent here; absent ones are empty."""
        count = len(self._ranks)
        lengths = [*(each.numel() for each in sent), *[0] * (count - len(sent))]
        expected = [*sizes, *[0] * (count - len(sizes))]
        device = self._matrices[0].momentum.device
        flat = torch.cat([each.reshape(-1) for each in sent] or [torch.empty(0, dtype=self._precision, device=device)])
        received = flat.new_empty(sum(expected))
        dist.all_to_all_single(received, flat, expected, lengths, group=self._group)
        return list(torch.split(received, expected))

    def _is_first(self, replicas: Sequence[int]) -> bool:
        return self._rank == min(rank for rank in replicas if rank in self._ranks)
