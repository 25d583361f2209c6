"""The simulator against closed forms, published arithmetic and itself."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.ft.survival import loss_probability
from keepwarm.launch.errors import SimulationError
from keepwarm.launch.simulation.closed_form import daly_goodput, first_order_waste, losses_per_chain, shortage
from keepwarm.launch.simulation.cluster import Cluster, form_groups
from keepwarm.launch.simulation.failures import Failures, Kind, Renewal
from keepwarm.launch.simulation.recommend import recommend
from keepwarm.launch.simulation.scheme import Restart, Scheme, Times
from keepwarm.launch.simulation.study import (
    Question,
    ask,
    enough_spares,
    mean_error,
    scheme_of,
    schemes_for,
    with_intervals,
)
from keepwarm.launch.simulation.survival import expected_losses
from keepwarm.launch.simulation.timeline import Ledger, walk

DAY = 86400.0
LLAMA = 54 * DAY
MTBF = 3.1 * 3600
THIRTY = Restart(5.0, 25.0)
MEMORY = Times(stall=0.01, worker=THIRTY, node=THIRTY, durable=Restart(5.0, 595.0))
DISK = replace(MEMORY, stall=30.0)


def question(nodes: int = 2048, **changes: Any) -> Question:
    given: dict[str, Any] = {
        "cluster": Cluster(nodes=nodes, spares=64, repair=1.0),  # never a wait
        "failures": Renewal(mtbf=MTBF),
        "horizon": LLAMA,
        "times": MEMORY,
        "disk": DISK,
    }
    return with_intervals(Question(**given | changes))


def within_error(values: Sequence[float], expected: float, sigmas: float = 4.0) -> bool:
    """Whether `expected` lies within so many standard errors of the mean: chance fails one seed in 16,000."""
    mean, error = mean_error(values)
    return abs(mean - expected) <= sigmas * error


# -- goodput ----------------------------------------------------------------------------------------------------------


def test_simulation_young_daly_matches_published_waste() -> None:
    """The published 12.7 % and 0.40 % of waste, first order; the simulation agrees with the complete formula."""
    asked = question(trials=40)
    memory, *_, disk = ask(asked, schemes_for(asked))
    assert 1 - disk.first_order == pytest.approx(0.127, abs=5e-4)
    assert 1 - memory.first_order == pytest.approx(0.0040, abs=5e-5)
    for answer in (memory, disk):
        goodput, error = answer.goodput
        assert goodput == pytest.approx(answer.exact, abs=4 * error)
        # What the first order leaves out is of the order of the square of the waste.
        assert goodput == pytest.approx(answer.first_order, abs=4 * error + (1 - answer.first_order) ** 2)
    assert 380 < memory.per_trial("failures")[0] < 460  # 419 in 54 days


@pytest.mark.parametrize(
    ("interval", "stall", "restart"), [(100.0, 5.0, 40.0), (1000.0, 60.0, 500.0), (300.0, 0.0, 0.0)]
)
def test_simulation_goodput_equals_daly_for_frequent_failures(interval: float, stall: float, restart: float) -> None:
    times = Times(
        interval=interval, stall=stall, worker=THIRTY, node=THIRTY, durable=Restart(restart / 4, restart * 3 / 4)
    )
    asked = question(nodes=8, failures=Renewal(mtbf=1000.0), horizon=30 * DAY, disk=times, trials=10)
    (answer,) = ask(asked, [Scheme(name="disk", groups=None, times=times)])
    shares = [ledger.productive / ledger.seconds for ledger in answer.ledgers]
    assert within_error(shares, daly_goodput(interval, stall, restart, 1000.0))


@given(
    st.floats(200, 1e5),
    st.floats(1, 1e4),
    st.floats(0, 100),
    st.floats(0, 200),
    st.floats(0, 5000),
    st.integers(0, 5),
    st.integers(0, 1 << 30),
)
@settings(max_examples=60, deadline=None)
def test_simulation_every_second_is_accounted_for(
    mtbf: float, interval: float, stall: float, commit: float, rebuild: float, spares: int, seed: int
) -> None:
    times = replace(MEMORY, interval=interval, stall=stall, commit=commit, rebuild=rebuild, durable_every=3 * interval)
    cluster = Cluster(nodes=24, rack=4, spares=spares, repair=3600.0)
    scheme = Scheme(name="s", groups=form_groups(cluster, 2, 1), times=times)
    history = Renewal(mtbf=mtbf, shape=0.8, rack_share=0.1, worker_share=0.2).sample(
        24, 5 * DAY, np.random.default_rng(seed)
    )
    ledger = walk(history, 5 * DAY, cluster, scheme)
    assert ledger.seconds == pytest.approx(5 * DAY, rel=1e-9)
    assert min(ledger.productive, ledger.stall, ledger.lost, ledger.waiting, ledger.recovery) >= -1e-6
    assert ledger.failures == ledger.from_memory + ledger.from_durable <= len(history.times)
    assert ledger.losses <= ledger.from_durable


def scripted(
    *events: tuple[float, Kind, int],
    spares: int = 9,
    repair: float = 1e9,
    horizon: float = 10_000.0,
    code: tuple[int, int] = (1, 1),
    **times: float,
) -> Ledger:
    """Nodes 0-2, 1-3 protect each other under (1, 1); a snapshot every 100 s, instantly committed."""
    cluster = Cluster(nodes=4, rack=1, spares=spares, repair=repair)
    given = Times(
        **{
            "interval": 100.0,
            "stall": 0.0,
            "worker": Restart(1.0, 1.0),
            "node": Restart(5.0, 25.0),
            "durable": Restart(5.0, 595.0),
            "durable_every": 1000.0,
        }
        | times
    )
    groups = form_groups(cluster, *code)
    assert [group.members for group in groups] == [(0, 2), (1, 3)]
    failures = Failures(*(np.array(column) for column in zip(*events, strict=True)))
    return walk(failures, horizon, cluster, Scheme(name="s", groups=groups, times=given))


def test_walk_lost_node_is_decoded_and_loses_work_since_snapshot() -> None:
    ledger = scripted((2050.0, Kind.NODE, 0))
    assert ledger == Ledger(
        productive=10_000 - 50 - 30, lost=50.0, detection=5.0, recovery=25.0, failures=1, from_memory=1
    )
    assert scripted((2050.0, Kind.WORKER, 0)).recovery == 1.0


def test_walk_uncommitted_snapshot_is_not_restored() -> None:
    assert scripted((2050.0, Kind.NODE, 0), commit=60.0).lost == 150.0
    assert scripted((2065.0, Kind.NODE, 0), commit=60.0).lost == 65.0


def test_walk_second_loss_in_a_group_restores_checkpoint() -> None:
    ledger = scripted((2550.0, Kind.NODE, 0), (2560.0, Kind.NODE, 2))
    assert (ledger.losses, ledger.groups_lost, ledger.from_memory, ledger.from_durable) == (1, 1, 1, 1)
    assert ledger.lost == 550.0  # to second 2000
    assert (ledger.detection, ledger.recovery) == (10.0, 5.0 + 595.0)
    # Not in another group, not the replacement, not after the next snapshot.
    assert scripted((2550.0, Kind.NODE, 0), (2560.0, Kind.NODE, 1)).losses == 0
    assert scripted((2550.0, Kind.NODE, 0), (2560.0, Kind.NODE, 0)).losses == 0
    assert scripted((2550.0, Kind.NODE, 0), (2679.0, Kind.NODE, 2)).losses == 1
    assert scripted((2550.0, Kind.NODE, 0), (2680.0, Kind.NODE, 2)).losses == 0
    # A third death before a snapshot has been committed loses nothing more, and goes back to the checkpoint again.
    ledger = scripted((2550.0, Kind.NODE, 0), (2560.0, Kind.NODE, 2), (3165.0, Kind.NODE, 1))
    assert (ledger.losses, ledger.from_durable, ledger.lost) == (1, 2, 555.0)


def test_walk_without_a_spare_waits_for_a_repair() -> None:
    ledger = scripted((2000.0, Kind.NODE, 0), spares=0, repair=3600.0)
    assert (ledger.detection, ledger.waiting, ledger.recovery) == (5.0, 3595.0, 25.0)
    # The slot is empty: what strikes it strikes nothing.
    assert scripted((2000.0, Kind.NODE, 0), (3000.0, Kind.NODE, 0), spares=0, repair=3600.0) == ledger
    ledger = scripted((2000.0, Kind.NODE, 0), spares=0, repair=math.inf)
    assert (ledger.productive, ledger.waiting) == (2000.0, 7995.0)


# -- survival ---------------------------------------------------------------------------------------------------------

PUBLISHED = [
    (1, 1, (7.9e-3, 2.4e-2, 9.8e-4, 2.9e-3)),
    (7, 1, (5.5e-2, 0.16, 6.8e-3, 2.0e-2)),
    (6, 2, (0, 2.6e-3, 0, 4.0e-5)),
    (8, 2, (0, 5.1e-3, 0, 6.9e-5)),
    (13, 3, (0, 0, 0, 0)),
]


@pytest.mark.parametrize(("k", "m", "published"), PUBLISHED)
def test_walk_survival_matches_published_table(k: int, m: int, published: tuple[float, ...]) -> None:
    """f distinct nodes die in the same instant, in 1,000 histories: memory is lost as often as the table says."""
    cases = [(nodes, failures) for nodes in (128, 1024) for failures in (2, 3)]
    for (nodes, failures), expected in zip(cases, published, strict=True):
        cluster = Cluster(nodes=nodes, rack=1, spares=failures)
        groups = form_groups(cluster, k, m)
        scheme = Scheme(name="s", groups=groups, times=MEMORY.tuned(MTBF))
        exact = loss_probability(groups, failures)
        assert exact == pytest.approx(expected, rel=0.04)
        random, histories = np.random.default_rng(nodes + failures), 1000
        lost = []
        for _ in range(histories):
            struck = random.choice(nodes, size=failures, replace=False)
            history = Failures(np.full(failures, 1000.0), np.full(failures, Kind.NODE), struck)
            lost.append(walk(history, 2000.0, cluster, scheme).losses)
        error = math.sqrt(exact * (1 - exact) / histories)
        assert abs(np.mean(lost) - exact) <= 4 * error + 1e-12


@pytest.mark.parametrize(("k", "m"), [(1, 1), (3, 1), (1, 2), (6, 2)])
@pytest.mark.parametrize("worker_share", [0.0, 0.3])
def test_expected_losses_equal_simulated_histories(k: int, m: int, worker_share: float) -> None:
    """A cluster failing so often that plain histories see losses: the closed form says how many."""
    times = replace(MEMORY, interval=20.0, rebuild=100.0, durable=THIRTY)
    failures = Renewal(mtbf=500.0, worker_share=worker_share)
    asked = question(nodes=16, failures=failures, times=times, horizon=30 * DAY, trials=10)
    scheme = scheme_of(asked, k, m)
    (answer,) = ask(asked, [scheme])
    computed = expected_losses(asked.cluster, scheme, failures, asked.horizon, seed=0)
    assert computed.method == "closed form"
    simulated, error = answer.per_trial("losses")
    # Beyond chance: a chain that lost memory ends there, in the formula it goes on.
    assert simulated == pytest.approx(computed.expected, abs=4 * error + 0.05 * computed.expected)
    assert simulated * len(answer.ledgers) > 10


@pytest.mark.parametrize(("k", "m"), [(1, 1), (6, 2)])
def test_importance_sampling_equals_closed_form(k: int, m: int) -> None:
    """With racks of one node a rack failure is a node failure."""
    times = MEMORY.tuned(MTBF)
    cluster = Cluster(nodes=512, rack=1, spares=9)
    scheme = Scheme(name="s", groups=form_groups(cluster, k, m), times=times)
    exact = expected_losses(cluster, scheme, Renewal(mtbf=MTBF, worker_share=0.2), LLAMA, seed=1)
    sampled = expected_losses(cluster, scheme, Renewal(mtbf=MTBF, worker_share=0.2, rack_share=0.5), LLAMA, seed=1)
    assert sampled.method == "importance sampling"
    assert sampled.error < 0.05 * sampled.expected
    assert abs(sampled.expected - exact.expected) <= 4 * sampled.error
    assert exact.expected < (1e-2 if m == 1 else 1e-6)  # what plain histories would not see


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 2)])
def test_importance_sampling_equals_histories_with_rack_failures(k: int, m: int) -> None:
    times = replace(MEMORY, interval=20.0, rebuild=100.0, durable=THIRTY)
    failures = Renewal(mtbf=500.0, rack_share=0.2)
    cluster = Cluster(nodes=16, rack=4, spares=64, repair=1.0)
    asked = question(failures=failures, times=times, horizon=30 * DAY, trials=10, cluster=cluster)
    scheme = scheme_of(asked, k, m)
    (answer,) = ask(asked, [scheme])
    computed = expected_losses(asked.cluster, scheme, failures, asked.horizon, seed=0)
    simulated, error = answer.per_trial("losses")
    assert simulated * len(answer.ledgers) > 10
    assert simulated == pytest.approx(
        computed.expected, abs=4 * math.hypot(error, computed.error) + 0.05 * computed.expected
    )


@pytest.mark.parametrize(("k", "m", "adjacent_losses"), [(2, 2, 17), (1, 1, 34)])
def test_placement_adjacent_groups_lose_memory(k: int, m: int, adjacent_losses: float) -> None:
    """54 days on 2,048 nodes, 2 % of the failures take a rack of 8: groups of neighbours are lost 17 to 34 times."""
    failures = Renewal(mtbf=MTBF, rack_share=0.02)
    asked = question(failures=failures, placement="adjacent", trials=60)
    scheme = scheme_of(asked, k, m)
    (answer,) = ask(asked, [scheme])
    simulated, error = answer.per_trial("groups_lost")
    racks = 0.02 * LLAMA / MTBF
    assert racks * 8 / (k + m) == pytest.approx(adjacent_losses, abs=0.6)
    assert simulated == pytest.approx(racks * 8 / (k + m), abs=4 * error)
    assert answer.crowded == 2048 // (k + m)
    assert answer.losses.method == "simulated"

    spread = replace(asked, placement="spread")
    (answer,) = ask(spread, [scheme_of(spread, k, m)])
    assert answer.crowded == 0
    assert answer.losses.method == "importance sampling"
    assert answer.losses.expected + 4 * answer.losses.error < 0.005
    assert answer.per_trial("losses")[0] < 0.1


def test_schemes_replicas_and_codes_are_ordered_by_losses() -> None:
    asked = question(trials=2, code=(6, 2))
    code, two, three, disk = ask(asked, schemes_for(asked))
    assert [answer.scheme.memory for answer in (code, two, three, disk)] == [pytest.approx(1 / 3), 1.0, 2.0, 0.0]
    assert three.losses.expected < code.losses.expected < two.losses.expected < 1e-2
    assert disk.goodput[0] < two.goodput[0] - 0.1
    assert losses_per_chain(code.scheme.groups, 0.0, asked.failures) == 0


# -- spares, targets, seeds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rack_share", [0.0, 0.1])
def test_waiting_for_spares_equals_queue_theory(rack_share: float) -> None:
    failures = Renewal(mtbf=5 * 3600.0, rack_share=rack_share)
    base = Cluster(nodes=4096, rack=4, spares=5, repair=DAY)
    # Much longer than a repair, for the formula is that of a stationary queue.
    asked = question(failures=failures, horizon=700 * DAY, trials=12, cluster=base)
    (answer,) = ask(asked, [schemes_for(asked)[-1]])
    expected = shortage(base, failures, 700 * DAY)[5]
    assert expected > 0.1
    assert answer.shares["waiting"] == pytest.approx(expected, rel=0.06)


def test_enough_spares_equals_poisson_tail() -> None:
    asked = question(cluster=Cluster(nodes=2048, repair=DAY))
    spares = enough_spares(asked, 1e-3)
    tail = shortage(asked.cluster, asked.failures, asked.horizon)
    assert tail[spares] <= 1e-3 < tail[spares - 1]
    mean = DAY / MTBF
    poisson = 1 - sum(math.exp(-mean) * mean**n / math.factorial(n) for n in range(spares + 1))
    assert tail[spares] == pytest.approx(poisson, rel=1e-6)


def test_recommend_reaches_its_target_with_least_memory() -> None:
    cluster = Cluster(nodes=128, rack=4)
    asked = question(cluster=cluster, failures=Renewal(mtbf=MTBF, rack_share=0.02), trials=6)
    found = recommend(asked, goodput=0.985, survival=0.99999)
    goodput, error = found.answer.goodput
    assert goodput + 2 * error >= 0.985
    assert found.answer.losses.survival >= 0.99999
    chosen = found.chosen
    assert chosen.scheme.memory == min(candidate.scheme.memory for candidate in found.candidates)
    wider = scheme_of(asked, chosen.k + 1, chosen.m) if chosen.k + chosen.m < 32 else None
    if wider is not None:
        assert expected_losses(asked.cluster, wider, asked.failures, asked.horizon, 0).survival < 0.99999
    fewer = replace(asked, cluster=replace(asked.cluster, spares=0))
    assert ask(fewer, [chosen.scheme])[0].goodput[0] < 0.985


def test_recommend_target_out_of_reach_gives_the_reason() -> None:
    asked = question(trials=2)
    with pytest.raises(SimulationError, match=r"goodput of 99\.99% is out of reach.* recovery 0\.27%"):
        recommend(asked, goodput=0.9999, survival=0.99)
    with pytest.raises(SimulationError, match=r"targets must lie between 0 and 1: goodput 99"):
        recommend(asked, goodput=99, survival=0.99)
    racks = replace(asked, placement="adjacent", failures=Renewal(mtbf=MTBF, rack_share=0.5))
    with pytest.raises(SimulationError, match=r"no code up to m = 4 .* survives with probability 0\.99"):
        recommend(racks, goodput=0.5, survival=0.99)


def test_simulation_same_seed_gives_same_bits() -> None:
    asked = question(nodes=64, failures=Renewal(mtbf=MTBF, shape=0.7, rack_share=0.02), trials=3)
    first, second = (ask(asked, schemes_for(asked)) for _ in range(2))
    assert [answer.ledgers for answer in first] == [answer.ledgers for answer in second]
    assert [answer.losses for answer in first] == [answer.losses for answer in second]
    other = ask(replace(asked, seed=1), schemes_for(asked))
    assert other[0].ledgers != first[0].ledgers
    # A history does not depend on how many there are.
    assert ask(replace(asked, trials=2), schemes_for(asked))[0].ledgers == first[0].ledgers[:2]


@pytest.mark.parametrize("shape", [0.7, 1.0, 2.0])
def test_renewal_failures_have_the_stated_mean(shape: float) -> None:
    model = Renewal(mtbf=100.0, shape=shape, rack_share=0.1, worker_share=0.3)
    history = model.sample(10, 1e6, np.random.default_rng(3))
    gaps = np.diff(history.times)
    assert within_error(gaps.tolist(), 100.0)
    assert within_error((gaps < 30.0).astype(float).tolist(), model.within(30.0))
    assert within_error((history.kinds == Kind.RACK).astype(float).tolist(), 0.1)
    assert within_error((history.kinds == Kind.WORKER).astype(float).tolist(), 0.3)
    assert history.times[-1] < 1e6


def test_first_order_waste_adds_the_commit_time() -> None:
    times = Times(interval=100.0, stall=1.0, commit=20.0, worker=THIRTY, node=THIRTY, durable=THIRTY)
    assert first_order_waste(times, THIRTY, 1000.0) == pytest.approx(0.01 + 0.05 + 0.05)
