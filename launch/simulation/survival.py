"""Expected losses of memory by closed form or importance sampling, even if no simulated history has a loss."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepwarm.launch.errors import SimulationError
from keepwarm.launch.simulation.closed_form import MORE_EVENTS, losses_per_chain
from keepwarm.launch.simulation.cluster import Cluster
from keepwarm.launch.simulation.failures import FailureModel
from keepwarm.launch.simulation.scheme import Scheme

CHAINS = 10_000
AT_ONCE = 1_280_000
"""Chains sampled per batch times the square of the nodes in a rack; bounds the memory used."""
NEAR = 0.7
"""Share of sampled failures directed at groups that have already lost a node."""
OFTEN = 0.5
"""Share of sampled failures that are rack failures, however rare those are."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Expected number of losses of memory in a run and its standard error."""

    expected: float
    error: float
    method: str

    @property
    def survival(self) -> float:
        """Return the probability that memory is never lost; losses are rare and independent, hence Poisson."""
        return math.exp(-self.expected)


def expected_losses(
    cluster: Cluster, scheme: Scheme, failures: FailureModel, horizon: float, seed: int, chains: int = CHAINS
) -> Losses:
    """Return the losses before `horizon`, in seconds, without simulating histories. Assumes that spares are available.

    A chain is a sequence of failures, each within `scheme.times.window` of the previous one; redundancy is complete
    again when it ends. There are as many chains as failures that end one. Without rack failures, uses the closed form,
    which is exact except for chains of more than m + 4 failures; with rack failures, samples `chains` chains.

    Raises:
        SimulationError: the scheme has no groups, or the trace names its nodes.
    """
    if scheme.groups is None or not failures.draws_nodes:
        raise SimulationError("losses can be computed for groups, and where failures strike nodes at random")
    window = scheme.times.window
    starts = failures.count(horizon) * (1 - failures.within(window))
    if failures.rack_share == 0:
        return Losses(starts * losses_per_chain(scheme.groups, window, failures), 0.0, "closed form")
    random = np.random.default_rng(seed)
    block = max(1, min(chains, AT_ONCE // cluster.rack**2))
    sizes = (min(block, chains - first) for first in range(0, chains, block))
    values = np.concatenate([_sample_chains(cluster, scheme, failures, random, size) for size in sizes])
    error = float(values.std(ddof=1)) / math.sqrt(chains)
    return Losses(starts * float(values.mean()), starts * error, "importance sampling")


def _sample_chains(
    cluster: Cluster, scheme: Scheme, failures: FailureModel, random: np.random.Generator, chains: int
) -> NDArray[np.float64]:
    """Return per chain the sum over n of p^(n-1) w_n [the n-th failure is the first fatal one], w the likelihood ratio.

    The next failure is forced to follow within the window, weighted by p; its kind and node are drawn from a mixture
    with the true distribution, so that the weights are bounded (failure biasing; Heidelberger, 1995).
    """
    group_of, groups = scheme.group_of, scheme.groups or ()
    m, nodes, rack = groups[0].m, cluster.nodes, cluster.rack
    size_of = np.array([group.size for group in groups])
    members = np.full((len(groups), size_of.max()), -1)
    for number, group in enumerate(groups):
        members[number, : group.size] = group.members
    follows = failures.within(scheme.times.window)
    lost = np.full((chains, 0), -1)
    weight, alive, value = np.ones(chains), np.ones(chains, bool), np.zeros(chains)
    for event in range(m + 1 + MORE_EVENTS):
        is_rack = random.random(chains) < OFTEN
        drawn = np.where(is_rack, OFTEN, 1 - OFTEN)
        weight *= np.where(is_rack, failures.rack_share, 1 - failures.rack_share) / drawn
        is_worker = ~is_rack & (random.random(chains) < failures.worker_share / (1 - failures.rack_share or 1.0))
        target = random.integers(nodes, size=chains)
        if event:
            aimed = random.random(chains) < NEAR
            target = np.where(aimed, _near(lost, group_of, size_of, members, random, target), target)
        first = target // rack * rack
        struck = np.where(is_rack[:, None], first[:, None] + np.arange(rack), -1)
        struck[~is_rack & ~is_worker, 0] = target[~is_rack & ~is_worker]
        struck[struck >= nodes] = -1
        if event:
            weight *= _ratio(lost, struck, group_of, size_of, nodes, is_worker)
        lost = np.concatenate((lost, struck), axis=1)
        fatal = alive & _fatal(lost, group_of, m)
        value[fatal] += follows**event * weight[fatal]
        alive &= ~fatal
    return value


def _near(
    lost: NDArray[np.int64],
    group_of: NDArray[np.int64],
    size_of: NDArray[np.int64],
    members: NDArray[np.int64],
    random: np.random.Generator,
    otherwise: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Draw in each row a uniform member of the group of a uniformly drawn lost node."""
    gone = lost >= 0
    counts = gone.sum(axis=1)
    pick = np.minimum((random.random(len(lost)) * counts).astype(np.int64), np.maximum(counts - 1, 0))
    column = np.argmax(np.cumsum(gone, axis=1) > pick[:, None], axis=1)
    group = group_of[lost[np.arange(len(lost)), column]]
    member = (random.random(len(lost)) * size_of[group]).astype(np.int64)
    return np.where(counts > 0, members[group, member], otherwise)


def _ratio(
    lost: NDArray[np.int64],
    struck: NDArray[np.int64],
    group_of: NDArray[np.int64],
    size_of: NDArray[np.int64],
    nodes: int,
    is_worker: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Return per row the uniform probability of the failed nodes over that of the mixture they were drawn from.

    A rack can be drawn through any of its nodes, so both probabilities are sums over the failed nodes.
    """
    gone = lost >= 0
    counts = gone.sum(axis=1)
    lost_groups = np.where(gone, group_of[lost], -1)
    hit = struck >= 0
    groups = np.where(hit, group_of[struck], -2)
    together = (lost_groups[:, None, :] == groups[:, :, None]).sum(axis=2)
    near = (together / np.where(hit, size_of[np.maximum(groups, 0)], 1)).sum(axis=1) / np.maximum(counts, 1)
    uniform = hit.sum(axis=1) / nodes
    near = np.where(counts > 0, near, uniform)
    mixture = NEAR * near + (1 - NEAR) * uniform
    return np.where(is_worker, 1.0, np.divide(uniform, mixture, out=np.ones_like(mixture), where=mixture > 0))


def _fatal(lost: NDArray[np.int64], group_of: NDArray[np.int64], m: int) -> NDArray[np.bool_]:
    """Return whether each row of nodes, with -1 for none and repetitions, holds more than m of some group."""
    ordered = np.sort(lost, axis=1)
    repeated = np.zeros(ordered.shape, bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    # Nodes that do not count each get a distinct number below all group numbers.
    own = -1 - np.arange(ordered.shape[1])
    numbers = np.where(repeated | (ordered < 0), own, group_of[ordered])
    numbers.sort(axis=1)
    if numbers.shape[1] <= m:
        return np.zeros(len(lost), bool)
    full = numbers[:, m:] == numbers[:, : numbers.shape[1] - m]
    return np.asarray(full.any(axis=1), dtype=np.bool_)
