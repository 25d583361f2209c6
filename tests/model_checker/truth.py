"""What the promises demand, judged by the bytes in the world's memory and by nothing that an agent says of them.

The expectation is the newest snapshot that was committed and whole. It changes when a newer one is, and at nothing
else: no choice resets it, unless more was lost than the code can carry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.model_checker import port
from tests.model_checker.port import events
from tests.model_checker.simulated.content import FLIPS, NOTHING, WRONG, Age, Bytes, Chunk, Parity, written

if TYPE_CHECKING:
    from tests.model_checker.simulated.node import Node
    from tests.model_checker.simulated.world import World

PROMISES = {
    "I0": "no message, worker or disk can make an agent fail",
    "I1": "the newest committed whole snapshot survives the loss of m of each group until a newer one is whole",
    "I2": "what is chosen and decoded is what workers wrote",
    "I3": "there is one choice an epoch",
    "I4": "no buffer is given to a snapshot while another one in it is needed",
    "I5": "after faults stop, an offered snapshot commits within a bounded number of messages",
    "I6": "a snapshot is committed only when every agent has stored its chunks",
    "I7": "a choice frees nothing, and a minority discards nothing",
    "I8": "nothing changes while the disk reads it",
    "I9": "what was found wrong is not chosen again",
}


class Violation(Exception):
    """A promise that a history breaks."""

    def __init__(self, promise: str, text: str) -> None:
        super().__init__(f"{promise}: {text}")
        self.promise, self.text = promise, text


class Truth:
    """The expectation, what faults have taken, and the checks."""

    def __init__(self, world: World, ignored: frozenset[str] = frozenset()) -> None:
        self.world, self.ignored = world, ignored
        self.newest: Age | None = None
        """The newest snapshot that was committed and whole."""
        self.taken: dict[Age, set[int]] = {}
        """Slots whose chunks of a snapshot a fault has taken and that do not have them again."""
        self.held: dict[Age, set[int]] = {}
        """Slots that had all chunks of a snapshot when a fault took some."""
        self.unwhole: set[Age] = set()
        """Snapshots that were chosen and are not known to be whole."""
        self.commits = 0
        self.fallen: dict[int, int] = {}
        """The epoch of each agent that has died when it did, by its incarnation."""
        self._parity: dict[tuple[Age, int, int], list[Parity]] = {}

    def fail(self, promise: str, text: str) -> None:
        if promise not in self.ignored:
            raise Violation(promise, text)

    # ---- what is in memory

    def right(self, node: Node, copy: port.Copy, stripe: int) -> bool:
        """Return whether the memory of a copy's chunk holds what it should."""
        chunk = node.memory.chunk(copy, stripe)
        return chunk is not None and chunk == self._expected(node, copy.snapshot.age, stripe, chunk)

    def _expected(self, node: Node, age: Age, stripe: int, chunk: Chunk) -> list[Bytes]:
        """Return the right content of a chunk. The rest after the end of the workers' parts does not matter."""
        memory = node.memory
        if stripe in memory.stripes:
            first = memory.stripes.index(stripe) * memory.buckets
            total = self.world.totals[node.slot]
            return [
                written(age, node.slot, first + index) if first + index < total else chunk[index]
                for index in range(memory.buckets)
            ]
        return list(self._expected_parity(age, node.state.group, stripe))

    def _expected_parity(self, age: Age, group: port.StripeGroup, stripe: int) -> list[Parity]:
        key = age, group.index, stripe
        found = self._parity.get(key)
        if found is None:
            found, buckets = [NOTHING] * self.world.setting.chunk, self.world.setting.chunk
            for slot in group.sources(stripe):
                first = group.data_stripes(slot).index(stripe) * buckets
                for index in range(buckets):
                    if first + index < self.world.totals[slot]:
                        found[index] = found[index] | {(slot, written(age, slot, first + index))}
            self._parity[key] = found
        return found

    def holds(self, node: Node, age: Age) -> bool:
        """Return whether a slot has all its chunks of a snapshot in memory and knows it."""
        copy = copy_of(node.state, age) if node.alive else None
        if copy is None or len(copy.good) < copy.group.size:
            return False
        return all(self.right(node, copy, stripe) for stripe in range(copy.group.size))

    def stored(self, node: Node, age: Age) -> bool:
        """Return whether a slot has stored all its chunks of a snapshot, whatever bits have flipped since."""
        copy = copy_of(node.state, age) if node.alive else None
        if copy is None:
            return False
        for stripe in range(copy.group.size):
            chunk = node.memory.chunk(copy, stripe)
            if chunk is None:
                return False
            expected = self._expected(node, age, stripe, chunk)
            if any(a != b and not is_flipped(a, b) for a, b in zip(chunk, expected, strict=True)):
                return False
        return True

    def whole(self, age: Age) -> bool:
        return all(self.holds(node, age) for node in self.world.nodes)

    def restorable(self, age: Age) -> bool:
        """Return whether every stripe has k right chunks that the agents would report."""
        reported: dict[int, dict[int, set[int]]] = {}
        for node in self.world.nodes:
            copy = copy_of(node.state, age) if node.alive else None
            if copy is None:
                continue
            for holding in port.inventory(node.state).holdings:
                if holding.snapshot.age == age:
                    right = {record.stripe for record in holding.chunks if self.right(node, copy, record.stripe)}
                    for stripe in right:
                        reported.setdefault(copy.group.index, {}).setdefault(stripe, set()).add(node.slot)
        return all(
            len(reported.get(group.index, {}).get(stripe, ())) >= group.data
            for group in self.world.setting.topology.groups
            for stripe in range(group.size)
        )

    # ---- faults

    def may_take(self, slot: int) -> bool:
        """Return whether a fault on the slot leaves every group with no more than m losses."""
        group = self.world.setting.topology.group_of(slot)
        dead = {node.slot for node in self.world.nodes if not node.alive}
        sets = [dead, *(slots for age, slots in self.taken.items() if self.newest is None or age >= self.newest)]
        return all(len((slots | {slot}) & set(group.members)) <= group.parity for slots in sets)

    def before_fault(self, node: Node, only: Age | None = None) -> None:
        """Record what a slot is about to lose: everything, or chunks of one snapshot."""
        for copy in node.state.copies:
            age = copy.snapshot.age
            if only in (None, age):
                if self.stored(node, age):
                    self.held.setdefault(age, set()).add(node.slot)
                self.taken.setdefault(age, set()).add(node.slot)
        if only is None:
            self.fallen[node.state.incarnation] = node.state.epoch
            if self.newest is not None:
                self.taken.setdefault(self.newest, set()).add(node.slot)

    def before_crash(self, node: Node) -> None:
        """Record what a slot holds whose agent is about to die. Its memory is kept, so nothing is lost."""
        for copy in node.state.copies:
            if self.stored(node, copy.snapshot.age):
                self.held.setdefault(copy.snapshot.age, set()).add(node.slot)
        self.fallen[node.state.incarnation] = node.state.epoch

    def disaster(self) -> None:
        """More is lost than the code can carry: nothing is promised until the next commit."""
        self.newest = None
        self.unwhole.clear()

    def after_fault(self, what: str) -> None:
        self._survives(what)

    def _survives(self, what: str) -> None:
        newest = self.newest
        if newest is None or self.restorable(newest):
            return
        newer = {copy.snapshot.age for node in self.world.nodes if node.alive for copy in node.state.copies}
        if not any(self.restorable(age) for age in newer if age > newest):
            losses = sorted(self.taken.get(newest, ()))
            self.fail(
                "I1", f"{name(newest)} was committed and whole, and is lost: {what}; faults took it from {losses}"
            )

    # ---- what agents do

    def stepped(self, node: Node, before: port.State, event: Any, effects: tuple[Any, ...]) -> None:
        """Judge one event of an agent, before its effects are carried out."""
        for effect in effects:
            if isinstance(effect, events.Commit):
                self._committed(effect.snapshot.age)
            elif isinstance(effect, events.Decided):
                self._decided(node, effect)
        if before.copies is not node.state.copies and self.newest is not None:
            self._kept(node, before, event)
        if isinstance(event, events.ChunkRebuilt):
            self._rebuilt(node, event)
        elif isinstance(event, events.DurableStarted):
            copy = node.state.copy(event.snapshot)
            if copy is not None and copy.held and copy.data is not None:
                node.disk = event.snapshot, copy.data, list(node.memory.data[copy.data])

    def _committed(self, age: Age) -> None:
        if self.newest is not None and age <= self.newest:
            return
        for node in self.world.nodes:
            if node.slot not in self.held.get(age, ()) and not self.stored(node, age):
                self.fail("I6", f"{name(age)} is committed, and slot {node.slot} has not stored all its chunks of it")
        self._expect(age)

    def _expect(self, age: Age) -> None:
        self.newest = age if self._within_code(self.taken.get(age, set())) else None
        self.commits += 1
        self.taken = {each: slots for each, slots in self.taken.items() if each >= age}
        self.held = {each: slots for each, slots in self.held.items() if each >= age}
        self.unwhole = {each for each in self.unwhole if each > age}

    def chose(self, node: Node, decision: port.Decision) -> None:
        """Judge a choice when it is made.

        Who has answered and died before the chooser could know counts towards a majority, though not as memory that is
        left: the chooser would have chosen the same a moment earlier.
        """
        age = decision.snapshot.age if decision.snapshot is not None else None
        if self.newest is None or (age is not None and age >= self.newest):
            return
        living = {each.slot for each in self.world.nodes if each.alive}
        heard = {slot for slot in living if decision.incarnations[slot] == self.world.nodes[slot].state.incarnation}
        text = (
            f"epoch {decision.epoch} chooses {name(age)} although {name(self.newest)} was committed and whole; "
            f"it was made by slot {node.slot} without the living slots {sorted(living - heard)}"
        )
        if self._is_minority(heard | self._fell_unnoticed(node, decision)):
            self.fail("I7", text)
        lost = set(range(self.world.slots)) - heard | self.taken.get(self.newest, set())
        if self._within_code(lost):
            self.fail("I1", text)
        elif (living | {each.slot for each in self.world.nodes if each.kept}) - heard:
            self.disaster()  # a majority has gone on without more silent members than the code can carry

    def _fell_unnoticed(self, chooser: Node, decision: port.Decision) -> set[int]:
        """Return the slots whose agents took part in the epoch and are dead, while the chooser believes in the link."""
        return {
            slot
            for slot, link in chooser.links.items()
            if link.open[chooser.slot]
            and not link.alive
            and self.fallen.get(decision.incarnations[slot], -1) >= decision.epoch
        }

    def _within_code(self, lost: set[int]) -> bool:
        """Return whether no group has lost more slots than it has parity."""
        groups = self.world.setting.topology.groups
        return all(len(lost.intersection(group.members)) <= group.parity for group in groups)

    def _is_minority(self, heard: set[int]) -> bool:
        """Return whether others have more slots than these. Of two halves, the one with the lowest slot decides."""
        return (2 * len(heard), 0 in heard) < (self.world.slots, True)

    def _decided(self, node: Node, effect: Any) -> None:
        age = effect.snapshot.age if effect.snapshot is not None else None
        chosen = self.world.chosen.setdefault(effect.epoch, age)
        if chosen != age:
            self.fail("I3", f"epoch {effect.epoch} chose {name(chosen)}, and slot {node.slot} follows {name(age)}")
        if age is None:
            return
        copy = copy_of(node.state, age)
        if effect.whole and copy is not None and copy.data is not None:
            total = self.world.totals[node.slot]
            data = node.memory.data[copy.data]
            for bucket in range(total):
                right = written(age, node.slot, bucket)
                if data[bucket] != right and not is_flipped(data[bucket], right):
                    self.fail("I2", f"slot {node.slot} is to restore {name(age)} and has other bytes in it")
        self._maybe_whole(age)

    def _maybe_whole(self, age: Age) -> None:
        if self.newest is not None and age <= self.newest:
            return
        if self.whole(age):
            self._expect(age)
        else:
            self.unwhole.add(age)

    def _kept(self, node: Node, before: port.State, event: Any) -> None:
        """Check that a slot that had chunks of the newest whole snapshot still has them."""
        was, now = copy_of(before, self.newest), copy_of(node.state, self.newest)
        if was is None or was is now:
            return
        freed = [stripe for stripe in was.good if now is None or stripe not in now.good]
        if any(self.right(node, was, stripe) for stripe in freed):
            what = f"slot {node.slot} frees {name(self.newest)} at {type(event).__name__}, and nothing newer is whole"
            self.fail("I7", what)
        if freed:
            self._survives(what=f"slot {node.slot} has let go of stripes {freed}")

    def _rebuilt(self, node: Node, event: Any) -> None:
        age, stripe = event.snapshot.age, event.record.stripe
        copy = copy_of(node.state, age)
        if copy is None or stripe not in copy.good:
            return
        if not self.right(node, copy, stripe):
            self.fail("I2", f"slot {node.slot} takes garbage for stripe {stripe} of {name(age)}")
        if node.slot in self.taken.get(age, ()) and self.holds(node, age):
            self.taken[age].discard(node.slot)
        if age in self.unwhole:
            self._maybe_whole(age)

    # ---- buffers

    def granted(self, node: Node, effect: Any) -> None:
        self.claimed(node, "data", effect.buffer, effect.snapshot.age)
        for worker in self.world.trainer.writers(node.slot, effect.buffer):
            if worker.snapshot.age != effect.snapshot.age:
                what = f"slot {node.slot} grants buffer {effect.buffer} to {name(effect.snapshot.age)}"
                self.fail("I4", f"{what} while worker {worker.number} writes {worker.snapshot} to it")

    def claimed(self, node: Node, kind: str, buffer: int, age: Age) -> None:
        """Judge that a buffer is given to a snapshot."""
        before = node.memory.owners.get((kind, buffer))
        node.memory.owners[kind, buffer] = age
        if before is None or before == age:
            return
        what = f"slot {node.slot} gives {kind} buffer {buffer} of {name(before)} to {name(age)}"
        if before == self.newest and node.slot not in self.taken.get(before, ()):
            self.fail("I4", f"{what}, and nothing newer is whole")
        if kind == "data" and node.disk is not None and node.disk[1] == buffer:
            self.fail("I8", f"{what} while the disk reads it")

    def disk_ended(self, node: Node) -> None:
        assert node.disk is not None
        snapshot, buffer, content = node.disk
        for bucket, (now, then) in enumerate(zip(node.memory.data[buffer], content, strict=True)):
            right = written(snapshot.age, node.slot, bucket)
            if now == then or (now == right and is_flipped(then, right)):
                continue  # the same, or a flipped bit that was repaired
            self.fail("I8", f"slot {node.slot}: {snapshot} has changed while the disk read it")

    def restored(self, node: Node, snapshot: port.SnapshotId) -> None:
        """Judge the checksums that workers are given with what they restore."""
        copy = node.state.copy(snapshot)
        if copy is None:
            return
        sums = [value for stripe in copy.group.data_stripes(node.slot) for value in copy.chunk_sums(node.slot, stripe)]
        wanted = [written(snapshot.age, node.slot, bucket) for bucket in range(self.world.totals[node.slot])]
        if sums != wanted:
            self.fail("I2", f"slot {node.slot} restores {snapshot} with checksums of other bytes")


def copy_of(state: port.State, age: Age | None) -> port.Copy | None:
    return next((copy for copy in state.copies if copy.snapshot.age == age), None)


def is_flipped(content: Bytes, expected: Bytes) -> bool:
    """Return whether the content is what is expected but for bits that flipped."""
    if isinstance(content, frozenset):
        return frozenset(each for each in content if each[0] >= 0) == expected
    return WRONG <= content < WRONG + FLIPS


def name(age: Age | None) -> str:
    return "nothing" if age is None else f"snapshot {age[0]}.{age[1]}"
