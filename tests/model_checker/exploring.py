"""Many histories on a few processes, and a report of what they broke.

python -m tests.model_checker.exploring --histories 20000 --processes 2
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.model_checker.history import MOVES, Outcome, run
from tests.model_checker.shrinking import shortest, told

AT_ONCE = 25
"""Histories that a process is given at once."""


@dataclass
class Report:
    """What a number of histories came to."""

    histories: int = 0
    moves: int = 0
    healing: int = 0
    commits: int = 0
    epochs: int = 0
    seconds: float = 0.0
    broken: Counter[str] = field(default_factory=Counter)
    first: list[Outcome] = field(default_factory=list)
    """The first history that breaks each promise."""

    def add(self, outcome: Outcome) -> None:
        self.histories += 1
        self.moves += len(outcome.moves)
        self.healing += outcome.healing
        self.commits += outcome.commits
        self.epochs += outcome.epochs
        if outcome.promise:
            self.broken[outcome.promise] += 1
            if self.broken[outcome.promise] == 1:
                self.first.append(outcome)

    def __str__(self) -> str:
        rate = self.histories / max(self.seconds, 1e-9)
        found = ", ".join(f"{name} in {count}" for name, count in sorted(self.broken.items())) or "none"
        return (
            f"{self.histories} histories, {self.moves} moves and {self.healing} after faults, {self.epochs} epochs, "
            f"{self.commits} commits, {self.seconds:.0f} s ({rate:.1f} histories/s): broken promises: {found}"
        )


def explore(
    seeds: Iterable[int], moves: int = MOVES, processes: int = 1, seconds: float | None = None,
    ignored: frozenset[str] = frozenset(),
) -> Report:  # fmt: skip
    """Run the histories of the seeds, or as many as fit in `seconds`."""
    report, began = Report(), time.monotonic()
    for outcomes in _batches(seeds, moves, processes, ignored):
        for outcome in outcomes:
            report.add(outcome)
        report.seconds = time.monotonic() - began
        if seconds is not None and report.seconds > seconds:
            break
    return report


def _batches(seeds: Iterable[int], moves: int, processes: int, ignored: frozenset[str]) -> Iterator[list[Outcome]]:
    every = list(seeds)
    tasks = [(every[at : at + AT_ONCE], moves, ignored) for at in range(0, len(every), AT_ONCE)]
    if processes == 1:
        yield from map(_batch, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_batch, tasks)


def _batch(task: tuple[list[int], int, frozenset[str]]) -> list[Outcome]:
    seeds, moves, ignored = task
    return [run(seed, moves, ignored) for seed in seeds]


def explained(report: Report, ignored: frozenset[str] = frozenset(), seconds: float = 30.0) -> str:
    """Return the report with the shortest history found for every broken promise."""
    return "\n\n".join([str(report), *(told(shortest(each, ignored, seconds)) for each in report.first)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--histories", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--moves", type=int, default=MOVES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ignore", default="", help="promises that may be broken, such as I5,I7")
    options = parser.parse_args()
    ignored = frozenset(filter(None, options.ignore.split(",")))
    seeds = range(options.first, options.first + options.histories)
    report = explore(seeds, options.moves, options.processes, ignored=ignored)
    print(explained(report, ignored))
    return bool(report.broken)


if __name__ == "__main__":
    raise SystemExit(main())
