"""When an agent asks its workers for a snapshot at once: what was committed has lost its redundancy."""

import pytest

from keepwarm.ft.protocol import events as ev
from keepwarm.ft.protocol.messages import Undecodable
from keepwarm.ft.protocol.state import Geometry, State, initial
from keepwarm.ft.protocol.step import step as protocol_step
from tests.support.ft.cluster import Cluster


def exposed(cluster: Cluster) -> list[bool]:
    return [node.state.exposed for node in cluster.nodes]


@pytest.mark.parametrize(("sizes", "m"), [((3,), 1), ((2, 2), 1), ((1,), 0)])
def test_agents_ask_until_a_snapshot_is_committed_and_not_while_one_is_under_way(
    sizes: tuple[int, ...], m: int
) -> None:
    cluster = Cluster(sizes, m)
    assert all(exposed(cluster))
    for slot in range(cluster.topology.slots):
        for worker in range(2):
            cluster.offer(slot, worker, wait=True)
    assert not any(exposed(cluster))
    for slot in range(cluster.topology.slots):
        for worker in range(2):
            cluster.write(slot, worker)
    cluster.drain()
    assert cluster.committed == cluster.topology.slots
    assert not any(exposed(cluster))


def test_agents_of_a_member_with_empty_memory_ask_until_it_is_whole_again() -> None:
    cluster = Cluster((3,), 1)
    cluster.round()
    cluster.crash(1)
    assert exposed(cluster) == [False, True, False]
    cluster.recover(())
    assert all(exposed(cluster))
    cluster.drain()
    assert not any(exposed(cluster))


def test_agents_ask_if_more_members_than_the_parity_bears_came_back_empty() -> None:
    cluster = Cluster((3,), 1)
    cluster.round()
    cluster.crash(0)
    cluster.crash(1)
    assert cluster.recover(()) is None
    cluster.drain()
    assert all(exposed(cluster))
    cluster.round()
    assert not any(exposed(cluster))


def test_agents_ask_again_after_the_snapshot_was_given_up() -> None:
    cluster = Cluster((3,), 1)
    cluster.offer(0, 0, wait=True)
    assert not cluster.nodes[0].state.exposed
    cluster.write(0, 0, cancel=True)
    cluster.drain()
    assert all(exposed(cluster))


def test_agent_without_a_peer_does_not_ask_because_nothing_can_be_committed() -> None:
    cluster = Cluster((3,), 1)
    cluster.away(0, 2)
    assert exposed(cluster) == [False, True, True]
    cluster.reconnect(0, 2)
    assert all(exposed(cluster))


def test_agent_asks_if_what_was_committed_does_not_decode() -> None:
    cluster = Cluster((3,), 1)
    cluster.round()
    committed = cluster.nodes[0].state.committed
    assert committed is not None
    cluster.dispatch(0, ev.DecodeFailed(committed, 0, (1, 2)))
    assert cluster.nodes[0].state.undecodable == {Undecodable(committed, 0, (1, 2))}
    assert exposed(cluster) == [True, False, False]


def test_agent_without_workers_asks_nobody() -> None:
    cluster = Cluster((1,), 0)
    state: State = initial("run", 0, 7, cluster.topology)
    assert not state.exposed
    asked, _ = protocol_step(state, ev.Configured(Geometry("layout", (1,), 1)))
    assert asked.exposed
