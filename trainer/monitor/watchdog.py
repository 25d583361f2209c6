"""Watchdog: a thread per rank that detects hanging training, writes a report of where the rank stands, and exits.

A frozen rank writes no report, which is how the others identify it. A rank that exits with `ExitCode.HUNG` is restarted
by its launcher like any failed worker, together with all other ranks.
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

from keepwarm import side_writer
from keepwarm.exit_code import ExitCode
from keepwarm.files import READABLE, atomic_write
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.sections import HealthSpec
from keepwarm.trainer.monitor import events, hang, hang_report
from keepwarm.trainer.monitor.hang import Report

SUSPENDED_LIMIT = 1800.0
"""Time limit of evaluations and checkpoints, in seconds. Collectives have a deadline of their own."""


class Watchdog:
    """Detects hangs in a thread of its own, from the first `heartbeat` until `close`."""

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
        """Mark the beginning of step `step`, counted from 0."""
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
        """Allow for work that takes longer than a step and says nothing about step times. Repeat while work goes on."""
        self._usual = False
        self._since = time.monotonic()
        self._limit = None if self._limit is None else max(SUSPENDED_LIMIT, self._limit)

    def close(self) -> None:
        """Stop the thread."""
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
                self._report(seconds, grace=max(2.0, limit / 4))
                return

    def _report(self, seconds: float, grace: float) -> None:
        """Write this rank's report and wait for the others'; the lowest rank with a report publishes the verdict."""
        folder = RunFolder(self._folder).hangs / f"restart_{self._restart:03d}_step_{self._step + 1:07d}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            hang_report.write(folder, hang_report.take(self._rank, self._step, seconds))
            end = time.monotonic() + grace
            while len(reports := hang_report.read(folder)) < self._size and time.monotonic() < end:
                time.sleep(0.05)
            if min(report.rank for report in reports) == self._rank:
                self._publish(folder, reports)
            else:
                # The lowest rank exits first, so that its launcher knows the cause before it hears of the others.
                self._closed.wait(grace)
        except OSError as error:
            print(f"error: rank {self._rank}: training hangs; cannot write to {folder}: {error}", file=sys.stderr)
        if not self._closed.is_set():
            self._end(ExitCode.HUNG)

    def _publish(self, folder: Path, reports: list[Report]) -> None:
        verdict = hang.judge(reports, self._size)
        text = json.dumps(msgspec.to_builtins(verdict), indent=1) + "\n"
        with side_writer.attempt("verdict.json"):
            atomic_write(folder / "verdict.json", text.encode(), mode=READABLE)
        event = events.Hang(
            step=self._step, silent=verdict.silent, late=verdict.late, reason=verdict.text, reports=str(folder)
        )
        events.append(self._folder, event)
        print(f"error: rank {self._rank}: {verdict.text}; stacks in {folder}", file=sys.stderr, flush=True)
