"""Workers killed at every moment of the protocol, agents with their memory, rotten chunks: training goes on to the bit.

Four nodes of two ranks each; what they end with is compared with a run of the same job that nothing happens to.
"""

import itertools
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keepwarm.ft.format import publication
from keepwarm.ft.groups import place
from keepwarm.ft.protocol.parity_placement import StripeGroup
from tests.support.runs import warm
from tests.support.runs.node_run import ROOT, Run, assert_equal, assert_nothing_left, command, runs

CODES = [(2, 2), (3, 1), (1, 1)]
STEPS, LONG = 60, 110
RANKS_PER_NODE = 2
JOB = ("parallel={tensor: 2, data: 4}", f"cluster.ranks_per_node={RANKS_PER_NODE}")
MOMENTS = ("granted", "copying", "sealed", "coding", "stored", "prepared", "committed")
"""On the way of a copy. In a single group, what is prepared is committed with the same event."""
CAMPAIGNS, IN_A_ROW = 100, 10
pytestmark = [pytest.mark.dist, pytest.mark.long, pytest.mark.timeout(1800)]


def uninterrupted(folder: Path, steps: int) -> Path:
    """The run that nothing happens to; without snapshots, so that it depends on no code."""
    job = command(folder, *JOB, tokens(steps), "snapshot=off")
    done = warm.run(job, timeout=1500)
    assert done.returncode == 0, done.stdout
    return folder


def tokens(steps: int) -> str:
    return f"stages.0.tokens={steps * 512}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory.mktemp("whole") / "run", STEPS)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory.mktemp("long") / "run", LONG)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    with runs(tmp_path) as begin:

        def protected(code: tuple[int, int], steps: int = STEPS, *, cold: bool = False) -> Run:
            spelled = f"snapshot.code={{data: {code[0]}, parity: {code[1]}}}"
            patient = ("snapshot.when_busy=wait", "cluster.max_restarts=50")
            return begin("--nodes", "4", *JOB, tokens(steps), spelled, *patient, cold=cold)

        yield protected


def groups_of(code: tuple[int, int]) -> list[StripeGroup]:
    return [StripeGroup(index, placed.members, placed.m) for index, placed in enumerate(place(4, *code))]


def bearable(code: tuple[int, int]) -> list[tuple[int, ...]]:
    """Every set of slots of which no group loses more than its parity, but the empty one."""
    groups = groups_of(code)
    sets = (slots for count in range(1, 5) for slots in itertools.combinations(range(4), count))
    return [slots for slots in sets if all(len({*slots} & {*group.members}) <= group.parity for group in groups)]


def assert_from_memory(run: Run, count: int, newest: int) -> None:
    """A copy is granted its slot once the one before is committed: at worst, the newest but two is restored."""
    recovery = run.recovered(count)
    assert recovery["source"] == "memory", recovery
    assert recovery["step"] >= newest - 2, (recovery, newest)


@pytest.mark.parametrize("code", CODES)
def test_worker_killed_at_every_moment_recovers_bitwise(
    whole: Path, tmp_path: Path, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, code: tuple[int, int]
) -> None:
    names = [name for name in MOMENTS if name != "prepared" or len(groups_of(code)) > 1]
    moments = tmp_path / "moments"
    moments.mkdir()
    for number, name in enumerate(names):
        (moments / f"{name}@{3 + 4 * number}").touch()
    # The restore after the last of them is hit as well.
    (moments / f"restore@{4 * len(names) - 3}").touch()
    monkeypatch.setenv("KEEPWARM_TEST_MOMENTS", str(moments))
    monkeypatch.setenv("KEEPWARM_TEST_RANK", "3")
    monkeypatch.setenv("KEEPWARM_TEST_RANKS_PER_NODE", str(RANKS_PER_NODE))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/support/moments"), prepend=os.pathsep)
    run = start(code, cold=True)
    run.done()
    told = [re.fullmatch(r"done (\w+)@\d+ of step (\d+)", path.name) for path in sorted(moments.iterdir())]
    assert all(told), list(moments.iterdir())
    struck = {match[1]: int(match[2]) for match in told if match is not None}
    recoveries = run.events("recovery")
    assert [event["source"] for event in recoveries] == ["memory"] * len(names), recoveries
    # Parity may be incomplete when a worker dies. That is no loss of memory.
    assert [(event["level"], event["bytes_decoded"]) for event in recoveries] == [("local", 0)] * len(names)
    for name, event in zip(names, recoveries, strict=True):
        # What all groups have prepared is never lost; a copy begins when the one before it but one is committed.
        newest = struck[name] - {"committed": 0, "prepared": 1}.get(name, 2)
        assert event["step"] >= newest, (name, struck[name], event)
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.parametrize("code", CODES)
def test_agents_lost_in_every_combination_recover_from_memory(
    whole: Path, start: Callable[..., Run], code: tuple[int, int]
) -> None:
    run = start(code)
    for count, slots in enumerate(bearable(code), 1):
        run.after(run.newest() + 3)
        newest = run.newest()
        run.lose_agents(slots)
        run.lose_worker(count % 8, RANKS_PER_NODE)
        assert_from_memory(run, count, newest)
    run.done()
    assert len(run.events("recovery")) == len(bearable(code))
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.parametrize("code", CODES)
def test_rotten_data_and_parity_chunks_recover_from_memory(
    whole: Path, start: Callable[..., Run], code: tuple[int, int]
) -> None:
    run = start(code)
    run.after(5)
    group = groups_of(code)[0]
    first, *_ = group.members
    holder, stripe = next(
        (slot, stripe)
        for slot in group.members
        for stripe in group.parity_stripes(slot)
        if stripe != group.data_stripes(first)[0]
    )
    agents = {slot: run.owner(slot).agent for slot in (first, holder)}
    # A rank that stands still lets no other snapshot be committed; what is to rot is what will be restored.
    victim = run.owner(1).workers[2]
    os.kill(victim, signal.SIGSTOP)
    step = run.settled(1)
    rot(agents[first], "data", group.data, 0)
    rot(agents[holder], "parity", group.parity, group.parity_stripes(holder).index(stripe))
    os.kill(victim, signal.SIGKILL)
    recovery = run.recovered(1)
    assert (recovery["source"], recovery["step"]) == ("memory", step), recovery
    run.done()
    assert run.events("recovery")[0]["bytes_decoded"] > 0
    assert run.events("recovery")[0]["level"] == "decoded"  # though no node was lost
    assert len(run.events("recovery")) == 1
    assert_equal(run, whole)
    assert_nothing_left(run)


def rot(pid: int | None, kind: str, chunks: int, index: int) -> None:
    """Change the first byte of one chunk in every slot of a kind in an agent's memory."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    # One memory may have several descriptors there.
    slots = {name: link for link in links if re.match(rf"/memfd:keepwarm:{kind}\d+", name := str(link.readlink()))}
    assert len(slots) >= 2, slots
    for link in slots.values():
        memory = os.open(link, os.O_RDWR)
        place = os.fstat(memory).st_size // chunks * index
        os.pwrite(memory, bytes([os.pread(memory, 1, place)[0] ^ 255]), place)
        os.close(memory)


@pytest.mark.parametrize("code", CODES)
def test_agents_lost_beyond_parity_recover_from_disk(
    whole: Path, start: Callable[..., Run], code: tuple[int, int]
) -> None:
    run = start(code)
    run.until(lambda: publication.latest(run.folder / "checkpoints"), "a durable checkpoint")
    run.after(run.newest() + 2)
    group = groups_of(code)[0]
    run.lose_agents(group.members[: group.parity + 1])
    run.lose_worker(0, RANKS_PER_NODE)
    recovery = run.recovered(1)
    assert (recovery["source"], recovery["step"] % 10) == ("disk", 0), recovery
    run.done()
    assert f"needs {group.data} good chunks" in recovery["why"] or "alone cannot change that" in recovery["why"], (
        recovery
    )
    assert_equal(run, whole)
    assert_nothing_left(run)


@pytest.mark.parametrize("first", range(0, CAMPAIGNS, IN_A_ROW))
def test_random_campaigns_in_a_row_recover_from_memory(long: Path, start: Callable[..., Run], first: int) -> None:
    """In each, up to three times, at random steps, a rank dies, and with it no agents or some that the code can bear.

    Several of them strike one run, so that a start is paid once.
    """
    code = CODES[first // IN_A_ROW % len(CODES)]
    run, count = start(code, LONG), 0
    for seed in range(first, first + IN_A_ROW):
        rng = random.Random(seed)
        for _ in range(rng.randint(1, 3)):
            run.after(run.newest() + rng.randint(3, 5))
            newest, slots, rank = run.newest(), rng.choice([(), *bearable(code)]), rng.randrange(8)
            print(f"seed {seed}: code {code}, step {newest}: agents {slots}, rank {rank}", flush=True)
            run.lose_agents(slots)
            run.lose_worker(rank, RANKS_PER_NODE)
            count += 1
            assert_from_memory(run, count, newest)
    run.done()
    assert len(run.events("recovery")) == count
    assert_equal(run, long)
    assert_nothing_left(run)
