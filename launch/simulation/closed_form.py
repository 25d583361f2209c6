"""Closed-form results for exponential times between failures, which replace simulation where they apply."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from keepwarm.ft.groups import Group
from keepwarm.ft.survival import loss_probability
from keepwarm.ft.worker.interval import waste
from keepwarm.launch.simulation.cluster import Cluster
from keepwarm.launch.simulation.failures import FailureModel
from keepwarm.launch.simulation.scheme import Restart, Times

MORE_EVENTS = 3
"""Failures of a chain to follow beyond the m + 1 needed for a loss."""

MOST_AWAY = 600
"""Limit on nodes in repair at once, beyond which no shortage is computed: e^-600 is near the smallest float."""


def daly_goodput(interval: float, stall: float, restart: float, mtbf: float) -> float:
    """Return the goodput by Daly's complete formula (2006, equation 13): failures strike stalls and restarts too.

    One interval t takes M e^(R/M) (e^((t + C)/M) - 1) seconds on average. All arguments are in seconds.
    """
    return interval / (mtbf * math.exp(restart / mtbf) * math.expm1((interval + stall) / mtbf))


def first_order_waste(times: Times, restart: Restart, mtbf: float) -> float:
    """Return C/t + t/2M + R/M, plus L/M for a commit latency L."""
    return waste(times.period, times.stall, mtbf, restart.total + times.commit)


def losses_per_chain(groups: Sequence[Group], window: float, failures: FailureModel) -> float:
    """Return the probability that a chain of failures, each within `window` of the previous one, loses memory.

    Assumes no rack failures. With p = P(next failure within the window) and D_n the number of distinct nodes lost by
    the n-th failure, a Markov chain, the result is the sum over n of p^(n-1) P(the n-th is the first fatal one), where
    losing the (f+1)-th node is fatal with probability loss_probability(f+1) - loss_probability(f).
    """
    nodes, m = sum(group.size for group in groups), groups[0].m
    follows = failures.within(window)
    lost = [loss_probability(groups, min(f, nodes)) for f in range(m + MORE_EVENTS + 2)]
    distinct = np.zeros(len(lost))
    distinct[0] = 1.0
    fresh = (1 - failures.worker_share) * np.maximum(0.0, 1 - np.arange(len(lost)) / nodes)
    total = 0.0
    for event in range(m + 1 + MORE_EVENTS):
        steps = distinct * fresh
        total += follows**event * float(np.dot(steps[:-1], np.diff(lost)))
        distinct = distinct - steps + np.concatenate(([0.0], steps[:-1]))
    return total


def shortage(cluster: Cluster, failures: FailureModel, horizon: float) -> NDArray[np.float64]:
    """Return, for 0, 1... spares, the share of time for which more nodes are in repair than there are spares.

    Nodes in repair form an M/G/infinity queue (Palm, 1943): Poisson, with rack failures arriving as batches, at their
    stationary mean. The array ends where the share falls below 1e-9, or at the number of nodes.
    """
    rate = failures.count(horizon) / horizon * min(cluster.repair, horizon)
    singles = rate * (1 - failures.rack_share - failures.worker_share)
    batches = rate * failures.rack_share
    size = min(cluster.rack, cluster.nodes)
    if singles + size * batches > MOST_AWAY:
        return np.ones(1)
    # Panjer's recursion for a compound Poisson number (1981).
    away = [math.exp(-singles - batches)]
    tail = [1 - away[0]]
    while tail[-1] > 1e-9:
        n = len(away)
        batch = size * batches * away[n - size] if n >= size else 0.0
        away.append((singles * away[n - 1] + batch) / n)
        tail.append(max(tail[-1] - away[-1], 0.0))
    return np.array(tail)
