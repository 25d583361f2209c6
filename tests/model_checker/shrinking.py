"""Delta debugging: find a short history that breaks the same promise, and print it line by line."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tests.model_checker.history import Outcome, replay
from tests.model_checker.setting import Setting
from tests.model_checker.simulated.world import Move

Test = Callable[[list[Move]], bool]


def shrunk(moves: Sequence[Move], breaks: Test, seconds: float = 60.0) -> list[Move]:
    """Return a sublist of `moves` that still `breaks` (ddmin, Zeller and Hildebrandt 2002)."""
    now, parts, end = list(moves), 2, time.monotonic() + seconds
    while len(now) > 1 and time.monotonic() < end:
        size = -(-len(now) // parts)
        for start in range(0, len(now), size):
            rest = now[:start] + now[start + size :]
            if time.monotonic() > end:
                break
            if breaks(rest):
                now, parts = rest, max(parts - 1, 2)
                break
        else:
            if size == 1:
                break
            parts = min(parts * 2, len(now))
    return now


def shortest(outcome: Outcome, ignored: frozenset[str] = frozenset(), seconds: float = 60.0) -> Outcome:
    """Return the shortest history found that breaks the promise that `outcome` breaks."""

    def breaks(moves: list[Move]) -> bool:
        return replay(outcome.setting, moves, ignored).promise == outcome.promise

    if not breaks(outcome.moves):
        return outcome
    moves = shrunk(outcome.moves, breaks, seconds)
    singles = [tuple(simple(move)) for move in moves]
    if breaks(singles):
        moves = shrunk(singles, breaks, seconds / 4)
    return replay(outcome.setting, moves, ignored)


def simple(move: Move) -> Move:
    """Return the move with all that it handles at once, so that fewer moves are needed."""
    return (*move[:-1], 64) if move[0] in ("deliver", "work") else move


def told(outcome: Outcome) -> str:
    """Return a broken history for people: the seed, every move on a line, and what it breaks."""
    lines = [str(outcome.setting), *(f"  {number:3} {line(move)}" for number, move in enumerate(outcome.moves, 1))]
    return "\n".join([*lines, f"breaks {outcome.promise}: {outcome.text}"])


SENTENCES = {
    "deliver": "messages from {0} reach {1} (at most {2})",
    "work": "slot {0} works on {1} (at most {2} pieces)",
    "train": "every worker does the next thing",
    "act": "worker {1} of slot {0} does the next thing",
    "verify": "slot {0} verifies its memory and tells what it holds",
    "tick": "slot {0} begins the epoch that it needs",
    "choose": "slot {0} chooses what to restore",
    "poll": "slot {0} reads the choice",
    "retry": "slot {0} asks again for what its repairs lack",
    "write_disk": "the disk of slot {0} is done",
    "scrub": "slot {0} scrubs a chunk",
    "burst": "{0} steps pass before any message arrives",
    "up": "a link comes up, {0} sees it first, {1} later",
    "down": "the link of {0} and {1} breaks",
    "reset": "the link of {0} and {1} breaks after a loss",
    "notice": "slot {0} notices that its link to {1} is gone",
    "away": "slot {0} finds {1} away for long",
    "absent": "slot {0} finds somebody away whom a repair needs",
    "drop": "a message from {0} to {1} is lost",
    "double": "a message from {0} to {1} is repeated",
    "reorder": "a message from {0} to {1} is overtaken",
    "damage": "a payload from {0} to {1} is damaged",
    "kill": "the agent of slot {0} dies",
    "disaster": "the agent of slot {0} dies, one more than the code can carry",
    "start": "an agent starts in slot {0}, with the memory of the last one if that was kept",
    "crash": "the agent of slot {0} dies, its memory is kept",
    "lose": "the memory that a dead agent of slot {0} has left is lost",
    "reboot": "all agents die and others go on with their memory",
    "rank": "rank {1} of slot {0} dies, so all are started again",
    "advance": "a supervisor begins an epoch at slot {0}",
    "late": "slot {0} waits no longer for silent slots and chooses",
    "timeout": "worker {1} of slot {0} gives up",
    "rot": "a bit flips in a stored chunk of slot {0}",
    "spoil": "a bit flips in sealed data of slot {0} that is not verified",
    "flip": "a bit flips in unfinished parity of slot {0}",
}


def line(move: Move) -> str:
    return SENTENCES[move[0]].format(*move[1:])


def of(setting: Setting, moves: Sequence[Move]) -> str:
    """Replay a history and return its text."""
    return told(replay(setting, moves))
