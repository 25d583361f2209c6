"""Compare schemes under the same failures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from keepwarm.ft.groups import MAX_GROUP
from keepwarm.launch.errors import SimulationError
from keepwarm.launch.simulation.closed_form import daly_goodput, first_order_waste, shortage
from keepwarm.launch.simulation.cluster import Cluster, Placement, form_groups
from keepwarm.launch.simulation.failures import FailureModel
from keepwarm.launch.simulation.scheme import Scheme, Times, crowded
from keepwarm.launch.simulation.survival import Losses, expected_losses
from keepwarm.launch.simulation.timeline import SECONDS, Ledger, walk

AUTO_WAITING = 1e-3
"""Maximum share of time that a run may wait for a node if the number of spares is not given."""
SEEN = 30
"""Number of simulated losses from which counting them is accurate enough: a relative error below a fifth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A simulation of one cluster size."""

    cluster: Cluster
    failures: FailureModel
    horizon: float
    """Seconds of cluster time in each trial."""
    times: Times
    """Times of snapshots in memory."""
    disk: Times
    code: tuple[int, int] = (4, 2)
    placement: Placement = "spread"
    trials: int = 20
    seed: int = 0

    @property
    def mtbf(self) -> float:
        return self.horizon / max(self.failures.count(self.horizon), 1e-12)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Answer to a question for one scheme."""

    scheme: Scheme
    ledgers: tuple[Ledger, ...]
    """One ledger per trial."""
    losses: Losses
    first_order: float
    """Goodput by Young/Daly's first-order formula, without waiting for spares."""
    exact: float | None
    """Goodput by Daly's complete formula; None where its assumptions do not hold."""

    @property
    def goodput(self) -> tuple[float, float]:
        """Return the productive share of time: mean over trials and its standard error."""
        return mean_error([ledger.productive / ledger.seconds for ledger in self.ledgers])

    @property
    def shares(self) -> dict[str, float]:
        """Return the time by cause, as shares that add up to 1."""
        total = math.fsum(ledger.seconds for ledger in self.ledgers)
        return {name: math.fsum(getattr(ledger, name) for ledger in self.ledgers) / total for name in SECONDS}

    def per_trial(self, name: str) -> tuple[float, float]:
        """Return the mean and standard error of a ledger field."""
        return mean_error([float(getattr(ledger, name)) for ledger in self.ledgers])

    @property
    def crowded(self) -> int:
        return crowded(self.scheme.groups or ())


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is unknown for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def schemes_for(question: Question) -> tuple[Scheme, ...]:
    """Return snapshots under the question's code, two and three replicas if nodes suffice, and checkpoints on disk."""
    found = [scheme_of(question, *question.code)]
    for replicas in (2, 3):
        if (1, replicas - 1) != question.code and question.cluster.nodes >= replicas:
            found.append(scheme_of(question, 1, replicas - 1))
    return (*found, Scheme(name="disk", groups=None, times=question.disk))


def scheme_of(question: Question, k: int, m: int) -> Scheme:
    """Return the scheme of a code (k, m). Raises SimulationError if the code does not fit the nodes."""
    groups = form_groups(question.cluster, k, m, question.placement)
    alone, replicas = question.cluster.nodes == 1, k == 1
    name = "one node" if alone else f"{m + 1} replicas" if replicas else f"code ({k}, {m})"
    return Scheme(name=name, groups=groups, times=question.times, replicas=replicas)


def fitting_code(nodes: int, k: int, m: int) -> tuple[int, int]:
    """Return (k, m), or the strongest such code that the nodes allow; (1, 1) for one node, which has no parity."""
    if nodes >= k + m or nodes == 1 or k < 1 or m < 0 or k + m > MAX_GROUP:
        return k, m
    m = min(m, nodes - 1)
    return min(k, nodes - m), m


def ask(question: Question, schemes: Sequence[Scheme], progress: Callable[[], None] = lambda: None) -> list[Answer]:
    """Walk every scheme through the same `trials` histories, calling `progress` after each history.

    Trial i depends only on the seed and i. Errors of `progress` propagate.
    """
    ledgers: list[list[Ledger]] = [[] for _ in schemes]
    for sequence in np.random.SeedSequence(question.seed).spawn(question.trials):
        history = question.failures.sample(question.cluster.nodes, question.horizon, np.random.default_rng(sequence))
        for scheme, walked in zip(schemes, ledgers, strict=True):
            walked.append(walk(history, question.horizon, question.cluster, scheme))
            progress()
    return [_answer(question, scheme, tuple(walked)) for scheme, walked in zip(schemes, ledgers, strict=True)]


def enough_spares(question: Question, share: float) -> int | None:
    """Return the fewest spares with which the run waits for at most `share` of the time; None if no number does."""
    tail = shortage(question.cluster, question.failures, question.horizon)
    fits = np.flatnonzero(tail <= share)
    return int(fits[0]) if len(fits) else None


def with_intervals(question: Question) -> Question:
    """Return the question with Young/Daly intervals where none are given."""
    return replace(question, times=question.times.tuned(question.mtbf), disk=question.disk.tuned(question.mtbf))


def with_spares(question: Question, spares: int | None) -> Question:
    """Return the question with this many spares; None for enough to wait at most a thousandth of the time."""
    if spares is None and (spares := enough_spares(question, AUTO_WAITING)) is None:
        raise SimulationError(
            "too many nodes are in repair at once for a sensible number of spares: give --spares, or a shorter --repair"
        )
    return replace(question, cluster=replace(question.cluster, spares=spares))


def _answer(question: Question, scheme: Scheme, ledgers: tuple[Ledger, ...]) -> Answer:
    times = scheme.times
    restart = times.durable if scheme.groups is None else times.node
    mtbf = question.mtbf
    plain = question.failures.worker_share == 0 and getattr(question.failures, "shape", None) == 1
    return Answer(
        scheme=scheme,
        ledgers=ledgers,
        losses=_losses(question, scheme, ledgers),
        first_order=1 - first_order_waste(times, restart, mtbf),
        exact=daly_goodput(times.period, times.stall, restart.total, mtbf) if plain and not times.commit else None,
    )


def _losses(question: Question, scheme: Scheme, ledgers: tuple[Ledger, ...]) -> Losses:
    """Return the losses, counted if the histories contain enough of them, else computed if possible."""
    if scheme.groups is None:
        return Losses(0.0, 0.0, "none to lose")
    counted = [float(ledger.losses) for ledger in ledgers]
    if sum(counted) >= SEEN or not question.failures.draws_nodes:
        return Losses(*mean_error(counted), "simulated")
    return expected_losses(question.cluster, scheme, question.failures, question.horizon, question.seed)
