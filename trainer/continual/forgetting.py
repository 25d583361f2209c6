"""Measures of forgetting and transfer, from losses alone. Pure; higher loss and positive forgetting are worse.

A loss matrix P has the shape `[stages + 1, domains]`: P[i, j] is the loss on domain j after training through stage i,
and row 0 is before all stages. Where a measure refers to the stage of a domain, domain j belongs to stage j + 1, and
the matrix has one more row than columns. Definitions as in Yildiz et al. (2024), forms of Lopez-Paz and Ranzato (2017).
Torch-free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Matrix: TypeAlias = Sequence[Sequence[float]] | Floats


def forgetting(losses: Sequence[float]) -> float:
    """Return FG = P[N] - min_i P[i] of one domain's column: the distance from its best loss; never negative."""
    return losses[-1] - min(losses)


def backward_transfer(matrix: Matrix) -> float:
    """Return BWT = mean over j < N of P[j, j] - P[N, j]: positive if later stages helped earlier domains."""
    losses = _aligned(matrix)
    own = np.diagonal(losses[1:])
    return float((own - losses[-1])[:-1].mean())


def forward_transfer(matrix: Matrix) -> float:
    """Return FWT = mean over j > 1 of P[0, j] - P[j - 1, j]: positive if earlier stages helped later domains."""
    losses = _aligned(matrix)
    before_own = np.diagonal(losses[:-1])
    return float((losses[0] - before_own)[1:].mean())


@dataclass(frozen=True, slots=True)
class StabilityGap:
    """The temporary rise of a domain's loss after a stage begins."""

    depth: float
    """Worst loss minus final loss, in nats per token."""
    worst_step: int
    recovery_step: int | None
    """First step after the worst one with a loss at or below the final one; None: only the final step."""


def stability_gap(steps: Sequence[int], losses: Sequence[float], tolerance: float = 0.0) -> StabilityGap:
    """Return depth and recovery of one domain's loss within one stage.

    Args:
        steps: ascending, the first at the start of the stage.
        tolerance: nats above the final loss that count as recovered.
    """
    if len(steps) != len(losses) or not steps:
        raise ValueError(f"{len(steps)} steps and {len(losses)} losses")
    values = np.asarray(losses, np.float64)
    worst = int(values.argmax())
    back = np.flatnonzero(values[worst:] <= values[-1] + tolerance) + worst
    recovered = int(back[0]) if back.size and back[0] < len(values) - 1 else None
    return StabilityGap(
        depth=float(values[worst] - values[-1]),
        worst_step=steps[worst],
        recovery_step=None if recovered is None else steps[recovered],
    )


def _aligned(matrix: Matrix) -> Floats:
    losses = np.asarray(matrix, np.float64)
    if losses.ndim != 2 or losses.shape[0] != losses.shape[1] + 1 or losses.shape[1] < 2:
        raise ValueError(f"needs one domain for each of two or more stages, got a matrix of {losses.shape}")
    return losses
