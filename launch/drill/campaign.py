"""Run a whole drill: an uninterrupted run, a run with faults, their comparison and a check for leftover processes."""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepwarm.exit_code import ExitCode
from keepwarm.launch.drill.compare import differences
from keepwarm.launch.drill.faults import Fault
from keepwarm.launch.drill.outcome import Outcome, Struck, outcomes
from keepwarm.launch.drill.processes import TOKEN, Found, living, wait_until_gone
from keepwarm.launch.drill.strike import Undo, strike
from keepwarm.launch.errors import DrillError, RanksFailed
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.stages import plan_stages
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.goodput import Goodput, of_run, read_marks

UNINTERRUPTED, WITH_FAULTS = "uninterrupted", "faults"
RESIDUE_GRACE_S = 20.0
"""Seconds after the end of a run before a process of it counts as left behind. An agent whose node has died gets its
lease in addition."""
RUN_POLL_INTERVAL_S = 0.02
STEPS_LEFT = 2
"""Steps before the end of the job at which a fault strikes that was to come some seconds after its step."""
LOG_LINES = 20

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of a drill."""

    outcomes: Sequence[Outcome]
    differences: Sequence[str]
    residue: Sequence[str]
    """Command lines of processes that outlived the run and were killed."""
    goodput: Goodput

    @property
    def bitwise_equal(self) -> bool:
        return not self.differences

    def data(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "bitwise_equal": self.bitwise_equal,
            "differences": list(self.differences),
            "residue": list(self.residue),
            "faults": [outcome.data() for outcome in self.outcomes],
            "goodput": self.goodput.data(),
        }


@dataclass(frozen=True, kw_only=True)
class Drill:
    """Specification of a drill."""

    job: JobSpec
    source: Path
    """Job file."""
    overrides: Sequence[str]
    faults: Sequence[Fault]
    launch: Sequence[str] = ()
    """Additional arguments of `keepwarm train` for the run with faults."""
    timeout: float
    """Maximum duration of each of the two runs, in seconds."""
    stopped: Callable[[], bool] = lambda: False
    """Whether the drill was asked to end."""

    @property
    def folder(self) -> Path:
        return Path(self.job.output)


def run(drill: Drill, *, fresh: bool, say: Say) -> Result:
    """Run the job with and without faults and compare the results.

    Raises:
        DrillError: a fault could not be injected, or a run took too long.
        RanksFailed: one of the runs failed, or the drill was asked to end.
    """
    with _held(drill.folder):
        return _run(drill, fresh=fresh, say=say)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock the folder for this process inside the block."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DrillError(f"{folder}: another drill runs in this folder; choose another with output=PATH") from error
        yield
    finally:
        os.close(handle)


def _run(drill: Drill, *, fresh: bool, say: Say) -> Result:
    whole, faulty = drill.folder / UNINTERRUPTED, drill.folder / WITH_FAULTS
    _uninterrupted(drill, whole, fresh=fresh, say=say)
    say(f"run with {len(drill.faults)} {'fault' if len(drill.faults) == 1 else 'faults'} in {faulty}")
    cluster, more = drill.job.cluster, 2 * len(drill.faults)
    endured = [
        f"cluster.max_restarts={cluster.max_restarts + more}",
        f"cluster.max_node_failures={cluster.max_node_failures + more}",
    ]
    with _Trial(drill, faulty, [*endured, *drill.launch]) as trial:
        struck = trial.suffer(drill.faults, say)
    found = outcomes(struck, list(read_marks(faulty)), events.read(faulty))
    return Result(
        outcomes=found,
        differences=differences(whole, faulty),
        residue=[" ".join(left.command) for left in trial.residue],
        goodput=of_run(faulty),
    )


def _uninterrupted(drill: Drill, folder: Path, *, fresh: bool, say: Say) -> None:
    """Make the uninterrupted run, unless the folder already holds that of the same job.

    It takes no snapshots, so the comparison also shows that snapshots do not change the results.
    """
    stored, key = folder.with_suffix(".json"), _key(drill.job)
    if not fresh and stored.is_file() and stored.read_text(encoding="utf-8") == key and folder.is_dir():
        say(f"uninterrupted run: the one in {folder} is of the same job")
        return
    say(f"uninterrupted run in {folder}")
    stored.unlink(missing_ok=True)
    with _Trial(drill, folder, ["snapshot=off"]) as trial:
        trial.wait()
    stored.write_text(key, encoding="utf-8")


def _key(job: JobSpec) -> str:
    """Return a key that is equal for jobs that compute the same with the same libraries."""
    from importlib.metadata import version

    spec = job.model_dump(mode="json", exclude={"output", "snapshot", "cluster", "log"})
    files = [path for source in (*job.data.sources.values(), *job.data.validation.values()) for path in _files(source)]
    data = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    versions = {name: version(name) for name in ("keepwarm", "torch", "numpy")}
    return json.dumps({"spec": spec, "data": data, "versions": versions})


def _files(source: str) -> list[Path]:
    """Return the files of a data source: a text file, or a pair of Megatron files."""
    return [path for path in map(Path, (source, f"{source}.bin", f"{source}.idx")) if path.is_file()]


@dataclass
class _Trial:
    """A monitored run of the job by `keepwarm train`. Leaving the context ends all of its processes."""

    drill: Drill
    folder: Path
    arguments: Sequence[str]
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    residue: list[Found] = field(default_factory=list)
    undo: list[tuple[Fault, Undo]] = field(default_factory=list)

    def __enter__(self) -> "_Trial":
        self.log = self.folder.with_suffix(".log")
        command = [sys.executable, "-P", "-m", "keepwarm", "train", str(self.drill.source), *self.drill.overrides]
        if RunFolder(self.folder).exists:
            shutil.rmtree(self.folder)  # before polling starts: metrics of an earlier drill must not count
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"output={self.folder}", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, TOKEN: self.token},
                start_new_session=True,
            )
        self.end = time.monotonic() + self.drill.timeout
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._undo_all()
        if kind is not None:
            for found in living(self.token):
                found.send(signal.SIGKILL)
        lease = 0.0 if self.drill.job.snapshot == "off" else self.drill.job.snapshot.lease
        self.residue = wait_until_gone(self.token, RESIDUE_GRACE_S + lease)
        for found in self.residue:
            found.send(signal.SIGKILL)
        self.process.wait()

    def suffer(self, faults: Sequence[Fault], say: Say) -> list[Struck]:
        """Inject every fault at its step and wait for the end of the run."""
        struck: list[Struck] = []
        for fault in sorted(faults, key=lambda fault: (fault.step, fault.after)):
            self._until_step(fault)
            self._undo_recovered(struck)
            struck.append(self._strike(fault))
            say(f"step {self._step()}: {fault}")
        while self.undo and self.process.poll() is None:
            self._pause()
            self._undo_recovered(struck)
        self.wait()
        return struck

    def _strike(self, fault: Fault) -> Struck:
        """Inject the fault as soon as its target exists."""
        end = min(self.end, time.monotonic() + RESIDUE_GRACE_S)
        while True:
            try:
                moment, undo = strike(fault, self.folder, self.token)
            except DrillError as error:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise DrillError(f"{fault.option}: {error}") from error
                self._pause()
            else:
                if undo is not None:
                    self.undo.append((fault, undo))
                return Struck(fault=fault, time=moment)

    def _until_step(self, fault: Fault) -> None:
        while self._step() < fault.step:
            self._pause()
        later, last = time.monotonic() + fault.after, plan_stages(self.drill.job)[-1].end_step
        while time.monotonic() < later and self._step() < last - STEPS_LEFT:
            self._pause(min(RUN_POLL_INTERVAL_S, max(0.0, later - time.monotonic())))

    def _undo_recovered(self, struck: Sequence[Struck]) -> None:
        """Resume frozen nodes and restore disks once the run has continued without them for some steps."""
        marks = list(read_marks(self.folder))
        for fault, undo in list(self.undo):
            since = next(each.time for each in struck if each.fault == fault)
            steps = sum(mark.mark == "step" and mark.time > since for mark in marks)
            session = {mark.session for mark in marks if mark.time > since and mark.mark == "step"}
            replaced = fault.action != "freeze" or max(session, default=0) > _session_at(marks, since)
            if steps >= 2 and replaced:
                undo()
                self.undo.remove((fault, undo))

    def _undo_all(self) -> None:
        for _, undo in self.undo:
            undo()
        self.undo.clear()

    def wait(self) -> None:
        """Wait until the run ends successfully; raise if it fails."""
        while self.process.poll() is None:
            self._pause(0.2)
        self._judge()

    def _pause(self, seconds: float = RUN_POLL_INTERVAL_S) -> None:
        """Sleep; raise if the run ends or takes too long, or the drill was asked to end."""
        if self.drill.stopped():
            raise RanksFailed("interrupted", ExitCode.INTERRUPTED)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            if time.monotonic() > self.end:
                raise DrillError(
                    f"the run in {self.folder} did not end within {self.drill.timeout:g} s (--timeout), it is at step "
                    f"{self._step()}; its output is in {self.log}"
                ) from None
            return
        self._judge()

    def _judge(self) -> None:
        code = self.process.returncode
        if code:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            shown = "".join(f"\n    {line}" for line in lines)
            raise RanksFailed(
                f"the run in {self.folder} ended with exit code {code}; end of {self.log}:{shown}",
                ExitCode.UNRECOVERABLE,
            )

    def _step(self) -> int:
        """Return the number of completed steps from the newest line of metrics.jsonl."""
        return RunFolder(self.folder).last_step()


def _session_at(marks: Sequence[Any], moment: float) -> int:
    return max((mark.session for mark in marks if mark.time <= moment), default=0)
