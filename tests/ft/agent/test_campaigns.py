"""Agents with real sockets, memory and threads lose memory, links and chunks, and restore to the bit."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from keepwarm.ft.agent import recovery_election, repair
from tests.support.ft.team import Team, team

LOST = [slots for count in range(3) for slots in itertools.combinations(range(4), count)]
QUICK = [(0, 1), (1, 3)]
LAYOUTS: dict[str, Sequence[tuple[Sequence[int], int]]] = {
    "(2,2)": [(range(4), 2)],
    "(3,1)": [(range(4), 1)],
    "2 x (1,1)": [((0, 2), 1), ((1, 3), 1)],
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair, "RETRY", 0.1)
    monkeypatch.setattr(recovery_election, "SETTLE_POLL_INTERVAL_S", 0.05)


@pytest.mark.parametrize(
    "lost", [pytest.param(slots, marks=() if slots in QUICK else pytest.mark.long) for slots in LOST], ids=str
)
def test_agents_every_combination_of_losses_restores(tmp_path: Path, lost: tuple[int, ...]) -> None:
    """Code (2,2): what came back is as good as what was there, so the others may be lost next."""
    with team(tmp_path, 4, 2) as world:
        others = [slot for slot in range(4) if slot not in lost][:2]
        for epoch, gone in ((2, lost), (3, others)):
            for slot in gone:
                world.kill(slot)
            for slot in gone:
                world.start(slot)
            world.recover(epoch)
            world.check(2)
        world.take(3)


@pytest.mark.parametrize("kind", ["data", "parity"])
def test_agents_rot_in_every_stripe_is_repaired(tmp_path: Path, kind: str) -> None:
    """Code (3,1): each agent has a damaged chunk, no stripe two; the repaired ones then rebuild a lost agent."""
    with team(tmp_path, 4, 1) as world:
        for slot, agent in world.agents.items():
            group = agent.state.group
            world.rot(slot, (group.data_stripes if kind == "data" else group.parity_stripes)(slot)[0])
        world.recover(2)
        world.check(2)
        world.kill(1)
        world.start(1)
        world.recover(3)
        world.check(2)


@pytest.mark.parametrize("seed", [pytest.param(s, marks=() if s < 3 else pytest.mark.long) for s in range(100)])
def test_agents_random_campaign_restores(tmp_path: Path, seed: int) -> None:
    """Snapshots that end or not, up to m lost agents or rotten chunks a group, broken links, another epoch."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    name = rng.choice(sorted(LAYOUTS))
    world = Team(tmp_path, LAYOUTS[name])
    try:
        world.until(world.connected, "all links")
        world.recover(1)
        world.take(1)
        step = 1
        for _ in range(5):
            allowed = {step}
            if rng.random() < 0.6:
                world.take(step := step + 1)
                allowed = {step}
            if rng.random() < 0.6:  # a snapshot that is interrupted somewhere between SEALED and COMMITTED
                world.write(step + 1)
                for _ in range(rng.randrange(12)):
                    world.turn()
                allowed.add(step + 1)
            step = recover(world, rng, allowed)
        world.take(step + 1)
        world.check_committed(step + 1)
    finally:
        world.close()


def recover(world: Team, rng: random.Random, allowed: set[int]) -> int:
    """Lose as much as the code bears, recover in another epoch while links break; returns the step restored."""
    everywhere = world.committed(max(allowed))
    for group in next(iter(world.agents.values())).state.topology.groups:
        faults = rng.randrange(group.parity + 1)
        gone = rng.sample(group.members, faults)
        if faults and rng.random() < 0.4:
            stripe = rng.randrange(group.size)
            for slot in gone:
                world.rot(slot, stripe)
        else:
            for slot in gone:
                world.kill(slot)
            for slot in gone:
                world.start(slot)
    epoch = max(agent.state.epoch for agent in world.agents.values()) + 1
    world.begin(epoch, rng.choice(sorted(world.agents)))
    for _ in range(rng.randrange(3)):
        for _ in range(rng.randrange(20)):
            world.turn()
        world.cut(*rng.sample(sorted(world.agents), 2))
    world.until(lambda: world.recovered(epoch), "the epoch", 200.0)
    step = world.chosen()
    assert step in ({max(allowed)} if everywhere else allowed), f"step {step} was restored, allowed are {allowed}"
    world.check(step)
    return step
