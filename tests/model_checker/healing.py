"""What comes after the faults: links come up, dead agents are replaced, and everything that is on its way arrives.

Then training offers a few more snapshots, and the last of them has to commit on all agents.
"""

from __future__ import annotations

import random

from tests.model_checker.scheduler import epoch_moves
from tests.model_checker.simulated.world import World

ROUNDS = 3
"""Snapshots that are offered. The first may be refused for what came before, the last has to commit."""
MOVES_A_SLOT = 2500
EPOCHS = 10
"""Epochs after the last fault, from which there is no excuse."""


class Healing:
    """The end of one history."""

    def __init__(self, world: World, seed: int = 0) -> None:
        self.world, self.rng = world, random.Random(f"healing {seed}")
        self.moves = 0
        self._tried: object = None
        self._tries = 0
        self._epoch = max(node.state.epoch for node in world.nodes)

    def run(self) -> None:
        """Heal the world and check that it goes on. Raise `Violation` if it does not."""
        world, trainer = self.world, self.world.trainer
        self.mend()
        trainer.limit = max(worker.step for worker in trainer.all)
        self.settle()
        for _ in range(ROUNDS):
            for worker in trainer.all:
                trainer.give_up(worker)  # nothing moves any more, so a real worker's deadline passes
            self.settle()
            if trainer.restarting:
                world.truth.fail("I5", f"ranks wait for what epoch {trainer.target} restores\n{self._state()}")
                return
            trainer.limit = max(worker.step for worker in trainer.all) + 1
            self.settle()
        wanted = trainer.all[0].snapshot.age
        lacking = [
            node.slot for node in world.nodes if node.state.committed is None or node.state.committed.age < wanted
        ]
        if lacking:
            text = f"snapshot {wanted[0]}.{wanted[1]} is offered to all and never committed on slots {lacking}"
            world.truth.fail("I5", f"{text}\n{self._state()}")

    def mend(self) -> None:
        """Replace dead agents and connect all pairs. A link that has lost something breaks and comes up again."""
        world = self.world
        for slot in range(world.slots):
            world.start(slot)
        for a, b in world.links:
            if world.link(a, b).lossy:
                world.down(a, b)
            world.up(a, b)

    def settle(self) -> None:
        """Do everything that can be done, in random order, until nothing is left."""
        world, rng, limit = self.world, self.rng, MOVES_A_SLOT * self.world.slots
        while True:
            moves = [("deliver", *flow) for flow in world.flows]
            moves += [("work", slot, key) for slot, key in world.strands]
            epochs = epoch_moves(world)
            retries = [move for move in epochs if move[0] == "retry"]
            moves += [move for move in epochs if move[0] != "retry"]
            rng.shuffle(moves)
            done = sum(world.do(move) for move in moves)
            done += sum(world.trainer.act(worker) for worker in world.trainer.all)
            if not done and retries:
                done = sum(world.do(move) for move in retries) if self._retries(retries) else 0
            self.moves += done
            if not done:
                return
            if max(node.state.epoch for node in world.nodes) > self._epoch + EPOCHS:
                world.truth.fail("I9", f"{EPOCHS} epochs have begun since the last fault\n{self._state()}")
                return
            if self.moves > limit:
                world.truth.fail("I5", f"{self.moves} moves after the last fault and no end\n{self._state()}")
                return

    def _retries(self, retries: list[tuple[object, ...]]) -> bool:
        """Return whether repairs may ask once more: they get a few tries without any other progress."""
        key = tuple(retries), max(node.state.epoch for node in self.world.nodes)
        self._tries = self._tries + 1 if self._tried == key else 0
        self._tried = key
        return self._tries < 3

    def _state(self) -> str:
        """Return what every agent holds, for people."""
        lines = []
        for node in self.world.nodes:
            state = node.state
            copies = ", ".join(f"{c.snapshot} {c.phase.value}" for c in state.copies) or "nothing"
            waiting = ", ".join(f"{snapshot}" for _, snapshot in state.waiting)
            mode = f"epoch {state.epoch} {state.mode.value}"
            wants = f", needs an epoch: {node.election.wanted}" if node.election.wanted else ""
            lines.append(f"  slot {node.slot}: {mode}, holds {copies}; waiting: {waiting or 'nobody'}{wants}")
        return "\n".join(lines)
