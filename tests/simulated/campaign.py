"""Drawn campaigns in virtual time: real agents that train through four faults, then have to commit and restore.

What is promised (docs/promises.md) is judged by the bytes that workers restore and by what they were told: nothing
older than what was committed is restored, to the bit, by all ranks alike, and training goes on.

python -m tests.simulated.campaign --campaigns 20000 --first 0 --jobs 2 --results campaigns.jsonl
"""

from __future__ import annotations

import argparse
import collections
import itertools
import random
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.simulated.agents import Agents, agents
from tests.simulated.outcomes import Book, Outcome, run_all, told
from tests.simulated.timeline import START
from tests.simulated.training import Training

SHAPES: tuple[Sequence[tuple[Sequence[int], int]], ...] = (
    [((0, 1), 1)],
    [((0, 1, 2), 1)],
    [((0, 2), 1), ((1, 3), 1)],
    [((0, 1, 2, 3), 2)],
    [((0, 2, 4), 1), ((1, 3, 5), 1)],
)
FAULTS = 4
BETWEEN_S = (0.1, 6.0)
"""The pause before a fault."""
LONGEST_S = 20.0
"""No fault lasts longer, unless another one follows."""
IMPOSSIBLE = "not possible now"
START_S = 60.0
PROGRESS = 20
"""Campaigns between two lines of progress."""
HEALED_S = 240.0
"""Within which training has to have committed a new snapshot after the last fault."""


class Campaign:
    """One campaign: its job, its training and the faults that are still to be mended."""

    def __init__(self, seed: int, job: Agents, rng: random.Random) -> None:
        self.seed, self.job, self.rng = seed, job, rng
        self.training = Training(job, wait=rng.random() < 0.5, step_s=rng.choice((0.3, 1.0)))
        self.told: list[str] = []
        self._lost: dict[int, set[int]] = {}
        """Slots of each group that have lost memory since the newest snapshot that all have whole."""
        self._silent: collections.Counter[int] = collections.Counter()
        """Slots that others may not hear at the moment. A majority may choose without them."""
        self._whole: tuple[int, int] = (-1, -1)
        self._mends: list[Callable[[], None]] = []

    def run(self) -> None:
        timeline, training = self.job.timeline, self.training
        training.restart()
        assert timeline.run(lambda: training.committed > (0, 0), START_S), self._words("training does not begin")
        for _ in range(FAULTS):
            timeline.rest(self.rng.uniform(*BETWEEN_S))
            kind = self.rng.choice(sorted(KINDS))
            said = KINDS[kind](self)
            self.told.append(f"{timeline.now:.2f} {kind}: {said}")
        timeline.rest(self.rng.choice((self.rng.uniform(*BETWEEN_S), LONGEST_S)))
        self._heal()
        before = training.committed
        assert timeline.run(lambda: self._goes_on(before), HEALED_S), self._words("nothing commits after the faults")
        timeline.rest(1.0)
        training.restart()
        count = len(training.restores)
        assert timeline.run(lambda: len(training.restores) > count, HEALED_S), self._words("the ranks do not restore")
        assert training.restores[-1] is not None

    def _goes_on(self, before: tuple[int, int]) -> bool:
        """Return whether a snapshot has committed on all agents that is newer than one."""
        return all(
            node.agent is not None and node.agent.state.committed is not None
            and node.agent.state.committed.age > before for node in self.job.nodes
        )  # fmt: skip

    def _words(self, what: str) -> str:
        return f"{what}: step {self.training.step}, restarting {self.training.restarting}\n{self.job.words()}"

    def _heal(self) -> None:
        for mend in self._mends:
            mend()
        self._mends.clear()

    def mend_after(self, seconds: float, mend: Callable[[], None]) -> None:
        """End a fault after a while, or when all of them end."""
        done: list[bool] = []

        def once() -> None:
            if not done:
                done.append(True)
                mend()

        self._mends.append(once)
        self.job.timeline.after(seconds, once)

    # ---- what may be lost

    def may_lose(self, slot: int) -> bool:
        """Return whether the code can carry that a slot loses memory now, and count it."""
        states = [node.agent.state if node.agent is not None else None for node in self.job.nodes]
        ages = {state.committed.age if state is not None and state.committed is not None else None for state in states}
        whole = all(
            state is not None and all(len(copy.good) == copy.group.size for copy in state.copies if copy.committed)
            for state in states
        )  # fmt: skip
        if whole and len(ages) == 1 and (age := next(iter(ages))) is not None and age > self._whole:
            self._whole = age
            self._lost.clear()
        lost, without, parity = self._missing(slot)
        if len(without | {slot}) > parity:
            return False
        lost.add(slot)
        return True

    def _missing(self, slot: int) -> tuple[set[int], set[int], int]:
        """Return what the group of a slot has lost, what it may have to do without now, and its parity."""
        index, members, m = next((i, each, m) for i, (each, m) in enumerate(self.job.groups) if slot in each)
        lost = self._lost.setdefault(index, set())
        return lost, lost | (self._silent.keys() & set(members)), m

    def silence(self, slots: Sequence[int], seconds: float, mend: Callable[[], None]) -> bool:
        """Return whether the code can carry that slots are not heard for a while, and note when that ends."""
        for slot in slots:
            lost, without, parity = self._missing(slot)
            if lost and len(without | {slot}) > parity:
                return False
        self._silent.update(slots)

        def end() -> None:
            self._silent -= collections.Counter(slots)
            mend()

        self.mend_after(seconds, end)
        return True


def _slot(campaign: Campaign) -> int:
    return campaign.rng.randrange(len(campaign.job.nodes))


def _node(campaign: Campaign) -> str:
    """A node loses its power. Another one takes its slot, and all ranks are started again."""
    slot, job = _slot(campaign), campaign.job
    seconds = campaign.rng.uniform(0.2, 8.0)
    if job.nodes[slot].agent is None or not campaign.may_lose(slot):
        return IMPOSSIBLE
    job.lose(slot)
    campaign.mend_after(seconds, lambda: job.start(slot))
    job.timeline.after(campaign.rng.uniform(0.1, 2.0), campaign.training.restart)
    return f"slot {slot}, replaced after {seconds:.1f} s"


def _kill(campaign: Campaign) -> str:
    """One agent, or all at once, die; their keepers have the memory."""
    slots = range(len(campaign.job.nodes)) if campaign.rng.random() < 0.3 else [_slot(campaign)]
    for slot in slots:
        if campaign.job.nodes[slot].agent is not None:
            campaign.job.kill(slot)
    return f"slots {list(slots)}"


def _rank(campaign: Campaign) -> str:
    campaign.training.restart()
    return "all ranks start again"


def _cut(campaign: Campaign) -> str:
    """Two nodes do not reach each other for a while."""
    nodes, wires = campaign.job.nodes, campaign.job.machine.wires
    one, other = campaign.rng.sample(range(len(nodes)), 2)
    pair, seconds = frozenset((nodes[one].host, nodes[other].host)), campaign.rng.uniform(0.1, 20.0)

    def mend() -> None:
        wires.cut.discard(pair)
        wires.heal()

    if not campaign.silence((one, other), seconds, mend):
        return IMPOSSIBLE
    wires.cut.add(pair)
    return f"slots {one} and {other} for {seconds:.1f} s"


def _alone(campaign: Campaign) -> str:
    """One node is cut off from all others for a while."""
    slot, wires, seconds = _slot(campaign), campaign.job.machine.wires, campaign.rng.uniform(0.1, 20.0)
    host = campaign.job.nodes[slot].host

    def mend() -> None:
        wires.alone.discard(host)
        wires.heal()

    if not campaign.silence((slot,), seconds, mend):
        return IMPOSSIBLE
    wires.alone.add(host)
    return f"slot {slot} for {seconds:.1f} s"


def _still(campaign: Campaign) -> str:
    """An agent stands still for a while, as one that is starved or stopped."""
    slot, seconds = _slot(campaign), campaign.rng.uniform(0.1, 15.0)
    process = campaign.job.nodes[slot].process
    if process is None or not campaign.silence((slot,), seconds, process.go_on):
        return IMPOSSIBLE
    process.stand_still()
    return f"slot {slot} for {seconds:.1f} s"


def _folder(campaign: Campaign) -> str:
    """The shared folder does not answer for a while."""
    machine, seconds = campaign.job.machine, campaign.rng.uniform(0.5, 20.0)
    machine.folder_until = machine.timeline.now + seconds
    campaign.mend_after(seconds, lambda: setattr(machine, "folder_until", 0.0))
    return f"for {seconds:.1f} s"


def _rot(campaign: Campaign) -> str:
    """A byte of a chunk that an agent holds for good changes."""
    slot = _slot(campaign)
    agent = campaign.job.nodes[slot].agent
    copy = agent.state.copy(agent.state.committed) if agent is not None else None
    if agent is None or copy is None or not copy.good or not campaign.may_lose(slot):
        return IMPOSSIBLE
    stripe = campaign.rng.choice(sorted(copy.good))
    agent.memory.chunk(copy.data, copy.parity, stripe)[campaign.rng.randrange(64)] ^= 0x20
    return f"slot {slot}, stripe {stripe} of {copy.snapshot}"


def _packet(campaign: Campaign) -> str:
    """A bit of what a node sends next changes on its way."""
    slot = _slot(campaign)
    campaign.job.machine.wires.damaged.add(campaign.job.nodes[slot].host)
    return f"from slot {slot}"


KINDS: dict[str, Callable[[Campaign], str]] = {
    "node lost": _node, "agent killed": _kill, "rank lost": _rank, "link cut": _cut, "node cut off": _alone,
    "agent stands still": _still, "folder hangs": _folder, "chunk rots": _rot, "packet damaged": _packet,
}  # fmt: skip


def run(seed: int) -> Outcome:
    """Run the campaign of a seed."""
    rng = random.Random(f"campaign {seed}")
    with agents(rng.choice(SHAPES), scrub=rng.choice((5.0, 60.0))) as job:
        campaign = Campaign(seed, job, rng)
        failure = ""
        try:
            campaign.run()
        except Exception:
            failure = traceback.format_exc()
        training = campaign.training
        virtual_s, commits = job.timeline.now - START, len(training.commit_times)
        return Outcome(seed, tuple(campaign.told), failure, virtual_s, commits, len(training.restores))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--campaigns", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed; the last line says where to go on")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further campaign after this time")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--results", type=Path, help="append one JSON object for each campaign; seeds that are there are not run again"
    )
    return parser.parse_args()


def main() -> int:
    options = _options()
    began = time.monotonic()
    book = Book(options.first, options.campaigns, options.results)
    for outcome in book.failed:
        print(told(outcome), flush=True)
    missing = itertools.takewhile(lambda _: time.monotonic() - began < options.seconds, book.missing())
    for count, outcome in enumerate(run_all(run, missing, options.jobs), 1):
        book.add(outcome)
        if outcome.failure:
            print(told(outcome), flush=True)
        if count % PROGRESS == 0:
            print(f"{book.words()}; {count} of them in {time.monotonic() - began:.0f} s", flush=True)
    print(f"{book.words()}; {time.monotonic() - began:.0f} s")
    return bool(book.failed)


if __name__ == "__main__":
    raise SystemExit(main())
