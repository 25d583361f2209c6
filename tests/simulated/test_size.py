"""What commits and epochs of large jobs take: connections, messages and bytes, counted in virtual time."""

import math

import pytest

from keepwarm.ft.agent.recovery_election import CHOOSERS
from tests.simulated.size import GROUP, Size, of_agents, of_protocol

NEAR = GROUP - 1 + 3
"""The other members of a group, and parent and children in the tree."""


def check(size: Size) -> None:
    """Check that a job's figures grow as its tree and its groups do, and never with the number of pairs."""
    print(size)
    assert size.at_rest <= NEAR
    assert size.deciding <= NEAR + CHOOSERS
    coding = {name: count for name, count in size.messages.items() if name != "Known"}
    each = GROUP - 1  # one stripe of parity a member, three sources of it, and three others to tell
    assert coding == {"Want": each, "Bucket": each, "ChunkEnd": each, "Stored": each}
    assert size.messages["Known"] <= math.log2(size.members) + 1  # on its way to the root, a group passes each level
    # What is PREPARED is told as a list of groups, which near the root grows with each of them.
    assert size.control_bytes <= 1600 + 50 * math.log2(size.members) + size.members
    votes = 3  # a member is asked for its vote, gives it, and is told what stands
    assert size.epoch_messages <= 4 * (NEAR + 2 * CHOOSERS) + votes
    latencies = 40 + 2 * math.log2(size.members)
    assert size.commit_s <= 1e-3 + latencies * 50e-6
    assert size.rebuild_s <= size.settle_s < 2.0  # `peer_timeout` is 5 s


def test_protocol_of_1024_members_commits_restores_and_settles_along_tree_and_groups() -> None:
    check(of_protocol(1024))


def test_agents_of_64_nodes_commit_restore_and_settle_along_tree_and_groups() -> None:
    size = of_agents(64)
    check(size)
    pure = of_protocol(64)
    assert size.messages == pure.messages
    assert size.control_bytes == pure.control_bytes


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_protocol_of_4096_members_commits_restores_and_settles_along_tree_and_groups() -> None:
    check(of_protocol(4096))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_agents_of_256_nodes_commit_restore_and_settle_along_tree_and_groups() -> None:
    check(of_agents(256))
