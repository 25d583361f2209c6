"""Draws moves: mostly progress, now and then a fault of the kinds that the history has."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.model_checker.simulated.world import Move, World

PROGRESS = {"deliver": 46, "work": 24, "worker": 12, "train": 4, "epoch": 10}
AT_ONCE = (1, 1, 2, 4, 16)
"""Messages of a link, or pieces of work of a strand, that one move handles."""
RATES = {
    "network": {"drop": 4, "double": 4, "reorder": 4, "damage": 4},
    "flaps": {"down": 4, "up": 6, "notice": 6, "away": 3, "absent": 1},
    "agents": {"kill": 3, "start": 3, "strike": 12},
    "ranks": {"rank": 3, "advance": 1},
    "rot": {"rot": 4, "scrub": 4, "spoil": 2},
    "flips": {"flip": 4},
    "late": {"late": 12, "advance": 2, "down": 2, "up": 2, "notice": 2},
    "deadlines": {"timeout": 5},
    "disasters": {"disaster": 2},
    "bursts": {"burst": 2},
    "crashes": {"crash": 5, "lose": 1, "reboot": 1, "start": 6, "up": 6, "notice": 3},
}
ALWAYS = {"write_disk": 5, "up": 6, "reset": 6, "start": 2, "notice": 2}
SCALE = 5
"""Units of progress for one of faults."""


class Scheduler:
    """The source of one history's moves."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng = world, random.Random(seed)
        weights = {name: weight * SCALE for name, weight in PROGRESS.items()}
        for rates in (ALWAYS, *(RATES[fault] for fault in sorted(world.setting.faults))):
            for name, weight in rates.items():
                weights[name] = weights.get(name, 0) + weight
        self._table = [name for name, weight in weights.items() for _ in range(weight)]
        self._draws: dict[str, Callable[[], Move | None]] = {
            "deliver": self._deliver, "work": self._work, "worker": self._worker, "epoch": self._epoch,
            "drop": self._message, "double": self._message, "reorder": self._message, "damage": self._message,
            "down": self._pair, "up": self._lost_pair, "notice": self._lost_pair, "away": self._lost_pair,
            "reset": self._lossy_pair, "rank": self._worker, "timeout": self._worker, "rot": self._place,
            "flip": self._place, "scrub": self._slot_and_number, "spoil": self._slot_and_number, "train": tuple,
            "strike": self._strike, "burst": self._burst,
        }  # fmt: skip

    def draw(self) -> Move:
        """Return the next move. It may turn out not to be possible."""
        for _ in range(20):
            name = self._table[int(self.rng.random() * len(self._table))]
            move = self._draws.get(name, self._slot)()
            if move is not None:
                return move if name in ("deliver", "work", "epoch") else (NAMES.get(name, name), *move)
        return ("act", 0, 0)

    def _number(self, below: int) -> int:
        return int(self.rng.random() * below)

    def _deliver(self) -> Move | None:
        if not len(self.world.flows):
            return None
        return ("deliver", *self.world.flows.draw(self.rng), AT_ONCE[self._number(len(AT_ONCE))])

    def _work(self) -> Move | None:
        if not len(self.world.strands):
            return None
        slot, key = self.world.strands.draw(self.rng)
        return ("work", slot, key, AT_ONCE[self._number(len(AT_ONCE))])

    def _worker(self) -> Move:
        return self._number(self.world.slots), self._number(self.world.setting.workers)

    def _epoch(self) -> Move | None:
        found = epoch_moves(self.world)
        return found[self._number(len(found))] if found else None

    def _message(self) -> Move | None:
        return (*self.world.flows.draw(self.rng), self._number(8)) if len(self.world.flows) else None

    def _slot(self) -> Move:
        return (self._number(self.world.slots),)

    def _pair(self) -> Move:
        a = self._number(self.world.slots)
        return a, (a + 1 + self._number(self.world.slots - 1)) % self.world.slots

    def _lost_pair(self) -> Move | None:
        """Return two slots without a link, in any order."""
        found = [pair for pair, link in self.world.links.items() if not link.alive]
        if not found:
            return None
        a, b = found[self._number(len(found))]
        return (a, b) if self.rng.random() < 0.5 else (b, a)

    def _lossy_pair(self) -> Move | None:
        found = [pair for pair, link in self.world.links.items() if link.alive and link.lossy]
        return found[self._number(len(found))] if found else None

    def _slot_and_number(self) -> Move:
        return self._number(self.world.slots), self._number(64)

    def _place(self) -> Move:
        return self._number(self.world.slots), self._number(64), self._number(4)

    def _strike(self) -> Move | None:
        """Return a slot to lose while what was chosen is not whole: failures seldom come alone."""
        return self._slot() if self.world.truth.unwhole else None

    def _burst(self) -> Move:
        return (8 + self._number(16),)


NAMES = {"worker": "act", "strike": "kill"}


def epoch_moves(world: World) -> list[Move]:
    """Return what agents could do now for the choice of their epoch."""
    found: list[Move] = []
    for node in world.nodes:
        if not node.alive:
            continue
        election, slot = node.election, node.slot
        if election.verifying:
            found.append(("verify", slot))
        if election.wanted and election.wants_epoch:
            found.append(("tick", slot))
        if not election.read:
            if election.may_read:
                found.append(("poll", slot))
            elif election.ready and election.chooses and election.complete:
                found.append(("choose", slot))
        if not node.repair.idle:
            found.append(("retry", slot))
    return found
