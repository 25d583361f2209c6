"""Recommend the least memory and the fewest spares that reach a target."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from keepwarm.ft.groups import MAX_GROUP
from keepwarm.launch.errors import SimulationError
from keepwarm.launch.simulation.closed_form import first_order_waste
from keepwarm.launch.simulation.scheme import Scheme
from keepwarm.launch.simulation.study import Answer, Question, ask, enough_spares, scheme_of
from keepwarm.launch.simulation.survival import Losses, expected_losses

LARGEST_M = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """The widest code with `m` parity chunks that reaches the survival target."""

    scheme: Scheme
    k: int
    m: int
    losses: Losses


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """Recommended configuration and its simulation."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    """One candidate for each m that can reach the target."""
    spares: int
    answer: Answer
    """Simulation of the recommended configuration."""


def recommend(
    question: Question, goodput: float, survival: float, progress: Callable[[], None] = lambda: None
) -> Recommendation:
    """Return the code of least memory with P(no loss of memory in the run) >= `survival`, and the spares for `goodput`.

    The interval is the question's. Half of the time that the goodput target leaves beyond the first-order waste may go
    to waiting for spares; the other half covers chance and what the formula omits. Among codes of equal memory, the
    one with smaller m sends less data.

    Raises:
        SimulationError: no code or no number of spares reaches the target; names the obstacle.
    """
    if not (0 < goodput < 1 and 0 < survival < 1):
        raise SimulationError(f"targets must lie between 0 and 1: goodput {goodput}, survival {survival}")
    if not question.failures.draws_nodes:
        raise SimulationError("a trace that names its nodes says nothing about other groups: leave `node` out of it")
    candidates = tuple(
        found for m in range(1, LARGEST_M + 1) if (found := _widest(question, m, survival, progress)) is not None
    )
    if not candidates:
        raise SimulationError(
            f"no code up to m = {LARGEST_M} on {question.cluster.nodes} nodes survives with probability {survival:g}: "
            "shorten the repair window, spread groups over more racks, or lower --target-survival"
        )
    chosen = min(candidates, key=lambda candidate: (candidate.scheme.memory, candidate.m))
    spares = _spares(question, goodput)
    cluster = replace(question.cluster, spares=spares)
    (answer,) = ask(replace(question, cluster=cluster), [chosen.scheme], progress)
    return Recommendation(chosen=chosen, candidates=candidates, spares=spares, answer=answer)


def _spares(question: Question, goodput: float) -> int:
    wasted = first_order_waste(question.times, question.times.node, question.mtbf)
    left = 1 - goodput - wasted
    if left <= 0:
        raise SimulationError(
            f"a goodput of {goodput:.2%} is out of reach: snapshots, lost work and recovery alone take {wasted:.2%} of "
            f"the time, recovery {question.times.node.total / question.mtbf:.2%}; a faster recovery helps most"
        )
    spares = enough_spares(question, left / 2)
    if spares is None:
        raise SimulationError(f"no number of spares reaches a goodput of {goodput:.2%}: repair nodes faster (--repair)")
    return spares


def _widest(question: Question, m: int, survival: float, progress: Callable[[], None]) -> Candidate | None:
    """Find the widest code by bisection: survival falls with the width of the groups."""

    def try_k(k: int) -> Candidate:
        scheme = scheme_of(question, k, m)
        losses = expected_losses(question.cluster, scheme, question.failures, question.horizon, question.seed)
        progress()
        return Candidate(scheme=scheme, k=k, m=m, losses=losses)

    low, high = 1, min(MAX_GROUP, question.cluster.nodes) - m
    if high < 1 or (best := try_k(low)).losses.survival < survival:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if (tried := try_k(middle)).losses.survival >= survival:
            low, best = middle, tried
        else:
            high = middle - 1
    return best
