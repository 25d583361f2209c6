"""What continual training gained and lost, from losses alone. Pure; higher loss is worse, positive forgetting is worse.

A loss matrix P has the shape `[stages + 1, domains]`: P[i, j] is the loss on domain j after training through stage i,
and row 0 is before any of them. Where a measure speaks of the stage of a domain, domain j belongs to stage j + 1, and
the matrix has one more row than columns. Definitions as in Yildiz et al. (2024), forms of Lopez-Paz and Ranzato
(2017); retainability as in "How Do LLMs Acquire Factual Knowledge During Pretraining?" (2024); negative flips as in
MUSCLE (2024). Torch-free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Matrix: TypeAlias = Sequence[Sequence[float]] | Floats


def last_losses(matrix: Matrix) -> Floats:
    """LC_j = P[N, j]: the last checkpoint on every domain."""
    last: Floats = _matrix(matrix)[-1]
    return last


def forgetting(matrix: Matrix) -> Floats:
    """FG_j = P[N, j] - min_i P[i, j]: how far each domain is from the best it ever was; never negative."""
    losses = _matrix(matrix)
    lost: Floats = losses[-1] - losses.min(axis=0)
    return lost


def forgetting_since(matrix: Matrix, stage: int = 0) -> Floats:
    """P[N, j] - P[stage, j]: against the state after `stage`, by default the parent's; negative where it improved."""
    losses = _matrix(matrix)
    lost: Floats = losses[-1] - losses[stage]
    return lost


def backward_transfer(matrix: Matrix) -> float:
    """BWT = mean over j < N of P[j, j] - P[N, j]: positive when later stages helped earlier domains."""
    losses = _aligned(matrix)
    own = np.diagonal(losses[1:])
    return float((own - losses[-1])[:-1].mean())


def forward_transfer(matrix: Matrix) -> float:
    """FWT = mean over j > 1 of P[0, j] - P[j - 1, j]: positive when earlier stages helped domains still to come."""
    losses = _aligned(matrix)
    before_own = np.diagonal(losses[:-1])
    return float((losses[0] - before_own)[1:].mean())


def learned_losses(matrix: Matrix) -> Floats:
    """CPT_j = P[j, j]: each domain right after its own stage."""
    return np.diagonal(_aligned(matrix)[1:]).copy()


def gain_over_standalone(matrix: Matrix, standalone: Sequence[float]) -> Floats:
    """P*[j] - P[j, j], with P* from models adapted to one domain alone: positive when the history helped."""
    return np.asarray(standalone, np.float64) - learned_losses(matrix)


def negative_flips(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Share of the items that the old model got right and the new one gets wrong."""
    old, new = np.asarray(before, np.bool_), np.asarray(after, np.bool_)
    if old.shape != new.shape or not old.size:
        raise ValueError(f"the same items are needed before and after, got {old.shape} and {new.shape}")
    return float((old & ~new).mean())


@dataclass(frozen=True, slots=True)
class StabilityGap:
    """The V that a domain's loss makes after a stage begins."""

    depth: float
    """Worst loss minus final loss, in nats per token."""
    worst_step: int
    recovery_step: int | None
    """First step after the worst one at which the loss is back at the final one or below; None: never before it."""


def stability_gap(steps: Sequence[int], losses: Sequence[float], tolerance: float = 0.0) -> StabilityGap:
    """Depth and recovery of one domain's loss within one stage.

    Args:
        steps: ascending, the first at the beginning of the stage.
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


@dataclass(frozen=True, slots=True)
class Retainability:
    """Fit of retainability = intercept - decay * ln(steps since the peak)."""

    decay: float
    intercept: float
    rmse: float
    exponential_rmse: float
    """Of a fit of the form a * exp(-b * steps) in log space, to tell which law holds."""


def retainability(log_likelihoods: Sequence[float], injected: int, steps: Sequence[int], window: int) -> Floats:
    """(l(t_max + delta) - l(s)) / (l(t_max) - l(s)) for each delta in `steps`.

    Args:
        log_likelihoods: l of the injected knowledge by training step.
        injected: the step s of the injection.
        window: steps after s in which the peak t_max is looked for.
    """
    values = np.asarray(log_likelihoods, np.float64)
    peak = injected + int(values[injected : injected + window + 1].argmax())
    gained = values[peak] - values[injected]
    if not gained > 0:
        raise ValueError(f"nothing was learned in the {window} steps after {injected}")
    kept: Floats = (values[peak + np.asarray(steps)] - values[injected]) / gained
    return kept


def fit_retainability(steps: Sequence[int], kept: Sequence[float]) -> Retainability:
    """Least squares over values within 2 interquartile ranges of the quartiles; steps are at least 1."""
    x, y = np.asarray(steps, np.float64), np.asarray(kept, np.float64)
    low, high = np.percentile(y, [25, 75])
    inside = (y >= low - 2 * (high - low)) & (y <= high + 2 * (high - low))
    x, y = x[inside], y[inside]
    slope, intercept = np.polyfit(np.log(x), y, 1)
    rmse = _rms(y - (slope * np.log(x) + intercept))
    positive = y > 0
    exponent, scale = np.polyfit(x[positive], np.log(y[positive]), 1)
    return Retainability(-float(slope), float(intercept), rmse, _rms(y - np.exp(exponent * x + scale)))


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _matrix(matrix: Matrix) -> Floats:
    losses = np.asarray(matrix, np.float64)
    if losses.ndim != 2 or losses.shape[0] < 2 or not losses.shape[1]:
        raise ValueError(f"a loss matrix has the shape [stages + 1, domains], got {losses.shape}")
    return losses


def _aligned(matrix: Matrix) -> Floats:
    losses = _matrix(matrix)
    if losses.shape[0] != losses.shape[1] + 1 or losses.shape[1] < 2:
        raise ValueError(f"needs one domain for each of two or more stages, got a matrix of {losses.shape}")
    return losses
