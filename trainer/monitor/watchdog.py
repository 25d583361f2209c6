"""A thread of each rank that sees when training hangs: it writes down where the rank stands, and ends it.

A rank that is frozen writes nothing, which is how the others know it. A rank that ends with `ExitCode.HUNG` is started
again by its launcher like any worker that failed, and with it all other ranks.
"""

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from keepwarm.exit_code import ExitCode
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.sections import HealthSpec
from keepwarm.trainer.monitor import events, hang, hang_report
from keepwarm.trainer.monitor.hang import Report

RELAXED = 1800.0
"""Seconds for what takes its own time: evaluation, checkpoints. Collectives have a deadline of their own."""


class Watchdog:
    """Owns its thread from `heartbeat` on, until `close`."""

    def __init__(
        self,
        spec: HealthSpec,
        folder: Path,
        *,
        rank: int,
        size: int,
        restart: int,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._spec, self._folder, self._rank, self._size, self._end = spec, folder, rank, size, end
        self._restart = restart
        self._seconds: deque[float] = deque(maxlen=hang.WINDOW)
        self._step = 0
        self._since = time.monotonic()
        self._limit: float | None = None
        self._usual = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def heartbeat(self, step: int) -> None:
        """Step number `step`, from 0, begins."""
        floor = self._spec.min_hang_timeout
        if floor is None:
            return
        now = time.monotonic()
        if self._usual:
            self._seconds.append(now - self._since)
        limit = hang.deadline(tuple(self._seconds), floor=floor, factor=self._spec.hang_factor)
        self._step, self._usual = step, True
        self._since, self._limit = now, limit
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, args=(floor,), name="watchdog", daemon=True)
            self._thread.start()

    def suspend(self) -> None:
        """Something begins that takes longer than a step, and whose duration says nothing about steps."""
        self._usual = False
        self._limit = None if self._limit is None else max(RELAXED, self._limit)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(10)

    def _watch(self, floor: float) -> None:
        every = min(1.0, floor / 8)
        before = time.monotonic()
        while not self._closed.wait(every):
            now = time.monotonic()
            if hang.was_frozen(now - before, asked=every, floor=floor):
                self._since = now
            before = now
            limit, seconds = self._limit, now - self._since
            if limit is not None and seconds > limit:
                self._found(seconds, grace=max(2.0, limit / 4))
                return

    def _found(self, seconds: float, grace: float) -> None:
        """Write this rank's report, wait for those of the others, let the lowest rank that wrote one say what it is."""
        folder = RunFolder(self._folder).hangs / f"restart_{self._restart:03d}_step_{self._step + 1:07d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            hang_report.write(folder, hang_report.take(self._rank, self._step, seconds))
            end = time.monotonic() + grace
            while len(found := hang_report.read(folder)) < self._size and time.monotonic() < end:
                time.sleep(0.05)
            if min(one.rank for one in found) == self._rank:
                self._say(folder, found)
            else:
                # The lowest rank ends first: its launcher knows why before it hears of the others.
                self._closed.wait(grace)
        except OSError as error:
            print(f"error: rank {self._rank}: training hangs, and {folder} cannot be written: {error}", file=sys.stderr)
        if not self._closed.is_set():
            self._end(ExitCode.HUNG)

    def _say(self, folder: Path, found: list[Report]) -> None:
        verdict = hang.judge(found, self._size)
        (folder / "verdict.json").write_text(json.dumps(msgspec.to_builtins(verdict), indent=1) + "\n")
        found_hanging = events.Hang(
            step=self._step, silent=verdict.silent, late=verdict.late, reason=verdict.text, reports=str(folder)
        )
        events.append(self._folder, found_hanging)
        print(f"error: rank {self._rank}: {verdict.text}; stacks in {folder}", file=sys.stderr, flush=True)
