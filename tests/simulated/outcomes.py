"""What came of campaigns, kept in a file, so that many can be run little by little and by several processes."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import msgspec


class Outcome(msgspec.Struct, frozen=True):
    """What came of a campaign. `failure` is empty if it kept its promises."""

    seed: int
    faults: tuple[str, ...]
    failure: str
    virtual_s: float
    commits: int
    restores: int


def told(outcome: Outcome) -> str:
    """Return a campaign's faults and its failure, for people."""
    return "\n".join([f"seed {outcome.seed}", *outcome.faults, outcome.failure])


class Book:
    """The outcomes of `count` seeds from `first` on, and the file that has a line for each, if there is one."""

    def __init__(self, first: int, count: int, file: Path | None) -> None:
        self._seeds, self._file = range(first, first + count), file
        found = _read(file) if file is not None and file.exists() else []
        self._outcomes = {outcome.seed: outcome for outcome in found if outcome.seed in self._seeds}

    def add(self, outcome: Outcome) -> None:
        self._outcomes[outcome.seed] = outcome
        if self._file is not None:
            with self._file.open("ab") as file:
                file.write(msgspec.json.encode(outcome) + b"\n")

    def missing(self) -> list[int]:
        return [seed for seed in self._seeds if seed not in self._outcomes]

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for _, outcome in sorted(self._outcomes.items()) if outcome.failure]

    def words(self) -> str:
        outcomes, failed = self._outcomes.values(), [str(outcome.seed) for outcome in self.failed]
        commits, seconds = sum(each.commits for each in outcomes), sum(each.virtual_s for each in outcomes)
        following = next(seed for seed in itertools.count(self._seeds.start) if seed not in self._outcomes)
        return (
            f"{len(outcomes)} of {len(self._seeds)} campaigns, {len(failed)} failed"
            f"{': seeds ' * bool(failed)}{', '.join(failed)}; {commits} commits, {seconds:.0f} s of virtual time; "
            f"go on with --first {following}"
        )


def _read(file: Path) -> list[Outcome]:
    """Return the outcomes in a file. Cut off a last line that was not written whole."""
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        file.write_bytes(whole)
    return [msgspec.json.decode(line, type=Outcome) for line in whole.splitlines()]


def run_all(run: Callable[[int], Outcome], seeds: Iterable[int], processes: int) -> Iterator[Outcome]:
    """Yield the outcomes of seeds as they come. The next seed is taken when there is a process for it."""
    gc.freeze()
    if processes == 1:
        yield from (_one(run, seed) for seed in seeds)
        return
    left, running = iter(seeds), set[Future[Outcome]]()
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        while True:
            running |= {pool.submit(_one, run, seed) for seed in itertools.islice(left, processes - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def _one(run: Callable[[int], Outcome], seed: int) -> Outcome:
    """Collect garbage once, after the campaign: what it makes lives about as long as it does."""
    gc.disable()
    outcome = run(seed)
    gc.collect()
    return outcome


__all__ = ["Book", "Outcome", "run_all", "told"]
