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
from keepwarm.trainer.monitor import events, hang, hang_report, last_words
from keepwarm.trainer.monitor.hang import Verdict

SUSPENDED_LIMIT = 1800.0
"""Time limit of evaluations and checkpoints, in seconds, where nothing waits in a collective."""
WAIT_LIMIT = 540.0
"""Time limit of one collective in seconds: less than the timeout of the process group, after which its ranks end
without a verdict. gloo raises an error then, and NCCL's watchdog aborts the process."""
LOOK_AFTER = 60.0
"""Seconds without progress after which a rank looks for long waits and for the reports of others."""
LOOK_INTERVAL = 5.0
GRACE = (2.0, 30.0)
"""Least and most seconds that the ranks wait for each other's reports: in time, before collectives time out."""


class Watchdog:
    """Detects hangs in a thread of its own, from the first `heartbeat` or `suspend` until `close`.

    A usual step has a limit that follows from those before it. Everything else may take long for good reasons: the
    first steps, which compile, evaluations and checkpoints. A collective that takes nearly as long as its timeout is a
    hang at any time, and so is what another rank has found to be one.
    """

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
        self._restart, self._wait_limit = restart, WAIT_LIMIT
        self._seconds: deque[float] = deque(maxlen=hang.WINDOW)
        self._step = 0
        self._since = time.monotonic()
        self._limit: float | None = None
        self._usual = False
        self._looked = 0.0
        self._began = time.time()
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
        self._start(floor)

    def suspend(self) -> None:
        """Allow for work that takes longer than a step and says nothing about step times. Repeat while work goes on."""
        floor = self._spec.min_hang_timeout
        if floor is None:
            return
        self._usual = False
        self._since = time.monotonic()
        self._limit = None if self._limit is None else max(SUSPENDED_LIMIT, self._limit)
        self._start(floor)

    def _start(self, floor: float) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, args=(floor,), name="watchdog", daemon=True)
            self._thread.start()

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
            if (limit is not None and seconds > limit) or self._waits_too_long(now, seconds):
                self._report(seconds, grace=min(max(GRACE[0], (limit or self._wait_limit) / 4), GRACE[1]))
                return

    def _waits_too_long(self, now: float, seconds: float) -> bool:
        """Return whether this rank or, as its report shows, another one has waited in a collective for too long."""
        if seconds < min(LOOK_AFTER, self._wait_limit) or now - self._looked < min(LOOK_INTERVAL, self._wait_limit / 4):
            return False
        self._looked = now
        if hang_report.written(self._reports, self._earliest):
            return True
        return seconds > self._wait_limit and hang_report.longest_wait() > self._wait_limit

    @property
    def _earliest(self) -> float:
        """Seconds since 1970 from which on reports are of this start; earlier ones are of a run that was resumed."""
        return self._began + min(self._spec.min_hang_timeout or 0.0, self._wait_limit) / 2

    @property
    def _reports(self) -> Path:
        return RunFolder(self._folder).hangs / f"restart_{self._restart:03d}_step_{self._step + 1:07d}"

    def _report(self, seconds: float, grace: float) -> None:
        """Write this rank's report and wait for the others'; the lowest rank with a report publishes the verdict."""
        folder = self._reports
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine = hang_report.take(self._rank, self._step, seconds)
            hang_report.write(folder, mine)
            end = time.monotonic() + grace
            while len(reports := hang_report.read(folder, self._earliest)) < self._size and time.monotonic() < end:
                time.sleep(0.05)
            reports = reports or [mine]  # the clock of the storage is far behind
            verdict = hang.judge(reports, self._size)
            last_words.leave(last_words.Hang(verdict.at_fault))
            if min(report.rank for report in reports) == self._rank:
                self._publish(folder, verdict)
            else:
                # The lowest rank exits first, so that its launcher knows the cause before it hears of the others.
                self._closed.wait(grace)
        except OSError as error:
            print(f"error: rank {self._rank}: training hangs; cannot write to {folder}: {error}", file=sys.stderr)
        if not self._closed.is_set():
            self._end(ExitCode.HUNG)

    def _publish(self, folder: Path, verdict: Verdict) -> None:
        text = json.dumps(msgspec.to_builtins(verdict), indent=1) + "\n"
        with side_writer.attempt("verdict.json"):
            atomic_write(folder / "verdict.json", text.encode(), mode=READABLE)
        event = events.Hang(
            step=self._step, silent=verdict.silent, late=verdict.late, reason=verdict.text, reports=str(folder)
        )
        events.append(self._folder, event)
        print(f"error: rank {self._rank}: {verdict.text}; stacks in {folder}", file=sys.stderr, flush=True)
