"""One history: a world, its moves from a seed or from a list, the healing, and what came of it."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tests.model_checker.healing import Healing
from tests.model_checker.scheduler import Scheduler
from tests.model_checker.setting import Setting, drawn
from tests.model_checker.simulated.world import Move, World
from tests.model_checker.truth import Violation

MOVES = 400


@dataclass
class Outcome:
    """What came of a history. `promise` is empty if it kept all."""

    setting: Setting
    moves: list[Move]
    promise: str = ""
    text: str = ""
    commits: int = 0
    epochs: int = 0
    healing: int = 0
    """Moves of the healing."""


def run(seed: int, moves: int = MOVES, ignored: frozenset[str] = frozenset()) -> Outcome:
    """Run the history of a seed. `ignored` promises may be broken."""
    setting, done = drawn(seed), list[Move]()
    outcome = Outcome(setting, done)
    try:
        world = begin(setting, ignored)
    except Violation as violation:
        outcome.promise, outcome.text = violation.promise, violation.text
        return outcome
    scheduler = Scheduler(world, seed)

    def go() -> None:
        for _ in range(moves):
            move = scheduler.draw()
            done.append(move)
            world.do(move)

    return _finish(world, outcome, go)


def replay(setting: Setting, moves: Sequence[Move], ignored: frozenset[str] = frozenset()) -> Outcome:
    """Run a history from its moves. Those that are not possible any more do nothing."""
    world = begin(setting, ignored)
    outcome = Outcome(setting, [])

    def go() -> None:
        for move in moves:
            outcome.moves.append(move)
            if not world.do(move):
                outcome.moves.pop()

    return _finish(world, outcome, go)


def _finish(world: World, outcome: Outcome, go: Callable[[], None]) -> Outcome:
    healing = Healing(world)
    try:
        go()
        healing = Healing(world)
        healing.run()
    except Violation as violation:
        outcome.promise, outcome.text = violation.promise, violation.text
    outcome.commits, outcome.epochs, outcome.healing = world.truth.commits, len(world.choices), healing.moves
    return outcome


def begin(setting: Setting, ignored: frozenset[str] = frozenset()) -> World:
    """Return the world of a setting before its first move."""
    if not setting.warm:
        world = World(setting, ignored)
    else:
        same = replace(setting, seed=0, faults=frozenset())
        world = pickle.loads(_warm(same))  # noqa: S301
        world.setting, world.truth.ignored = setting, ignored
    return world


def forget() -> None:
    """Forget the worlds that histories begin with: the protocol has changed."""
    _warm.cache_clear()


@functools.cache
def _warm(setting: Setting) -> bytes:
    """Return a pickled world whose agents have decided their first epoch, and whose workers are about to train."""
    world = World(setting)
    world.trainer.limit = 0
    Healing(world).settle()
    world.trainer.limit = None
    return pickle.dumps(world)
