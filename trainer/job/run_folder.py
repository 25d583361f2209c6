"""The folder of a run: the paths of its files, and readers of its metrics. Torch-free."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepwarm.files import lines_from_end

RUN_FILE = "run.json"
PROPOSED_FILE = "run.proposed.json"
"""Changed spec of a run that is being resumed here, until its ranks accept it."""
SUBMITTED_FILE = "run.submitted.json"
"""Changed spec of a run that a batch job is to resume, until that job's ranks accept it."""
METRICS_FILE = "metrics.jsonl"
_TAIL_BYTES = 64 << 10
_HASH = "[0-9a-f]" * 32
WRITTEN = (
    METRICS_FILE, "events.jsonl", "goodput.jsonl", "goodput.json", "report.html", "submission.json", "job.sbatch",
    "job.sh", "cancelled-[0-9]*", "secret", "secret-after-[0-9a-f]*", "place.json",
    "code", "tensorboard", "nodes", "agents", "hangs", "profile", "parent", "wandb",
    "checkpoints/iter_[0-9]*", "checkpoints/tmp-*", "checkpoints/latest", "checkpoints/.publishing", "checkpoints",
    f"data/*-{_HASH}.*", "data", "logs/*.log", "logs/*.log.*", "logs/pids.json", "logs",
    ".[a-z]*.[0-9]*.[0-9a-f]*.tmp", PROPOSED_FILE, SUBMITTED_FILE, RUN_FILE,
)  # fmt: skip
"""Patterns of all that keepwarm writes to a run folder, a folder after its contents and `run.json` last."""
_SHARED = ("checkpoints", "data", "logs")
"""Folders that may hold the files of others."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths and readers of one run folder; none of its files need to exist.

    Readers of metrics skip a line that is still being written or was torn by a crash.
    """

    path: Path

    @property
    def run_file(self) -> Path:
        """The resolved job spec that the run executes."""
        return self.path / RUN_FILE

    @property
    def proposed_file(self) -> Path:
        """Changed spec of a start by `keepwarm train`, until its ranks accept it."""
        return self.path / PROPOSED_FILE

    @property
    def submitted_file(self) -> Path:
        """Changed spec of a batch job's start, until its ranks accept it."""
        return self.path / SUBMITTED_FILE

    @property
    def metrics_file(self) -> Path:
        """One JSON object per step and evaluation, in order."""
        return self.path / METRICS_FILE

    @property
    def events_file(self) -> Path:
        """Log of the run's events; read and written by `keepwarm.trainer.monitor.events`."""
        return self.path / "events.jsonl"

    @property
    def timeline_file(self) -> Path:
        """End times of each kind of work; read and written by `keepwarm.trainer.monitor.goodput`."""
        return self.path / "goodput.jsonl"

    @property
    def goodput_file(self) -> Path:
        """Breakdown of the run's time as JSON, written when the run ends with its state saved."""
        return self.path / "goodput.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of durable checkpoints."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Folder of the output of ranks, batch jobs and nodes."""
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def nodes(self) -> Path:
        """Folder of the records that supervisors keep of their nodes."""
        return self.path / "nodes"

    @property
    def hangs(self) -> Path:
        """Folder of the reports that ranks write when training hangs."""
        return self.path / "hangs"

    @property
    def exists(self) -> bool:
        """Whether the folder contains a run, possibly one that has not begun."""
        return self.run_file.is_file()

    @property
    def has_begun(self) -> bool:
        """Whether anything was recorded, that is, the first evaluation or step is complete."""
        return self.metrics_file.is_file() and self.metrics_file.stat().st_size > 0

    def clear(self) -> list[Path]:
        """Delete what keepwarm wrote, `run.json` last, so that an interrupted clearing can be repeated; return what is
        left: the files of others.

        Raises OSError.
        """
        for pattern in WRITTEN:
            for path in self.path.glob(pattern):
                if path.is_symlink() or not path.is_dir():
                    path.unlink()
                elif pattern not in _SHARED:
                    shutil.rmtree(path)
                elif not any(path.iterdir()):
                    path.rmdir()
        return sorted(self.path.iterdir())

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of all steps and evaluations in order; empty if there is no file."""
        return [record for _, record in self._records(tail=False)]

    def recent_metrics(self) -> list[dict[str, Any]]:
        """Return the newest records: those in the last 64 KiB of the file. Fast for a file of any size."""
        return [record for _, record in self._records(tail=True)]

    def last_step(self) -> int:
        """Return the number of recorded steps; 0 before the first."""
        records = self.recent_metrics() or self.metrics()
        return max((int(record["step"]) for record in records), default=0)

    def evaluations(self) -> list[dict[str, float]]:
        """Return validation losses by domain, in the order of recording."""
        with contextlib.suppress(FileNotFoundError), self.metrics_file.open("rb") as file:
            found = (_record(line) for line in file if b'"eval"' in line)  # few of many lines
            return [record["eval"] for record in found if record is not None and "eval" in record]
        return []

    def drop_metrics_after(self, step: int, *, evaluation: bool = False) -> None:
        """Truncate the metrics to their state after `step`; with `evaluation`, drop that of `step` as well.

        Reads what it drops and no more: a restart takes as long after a million steps as after ten.

        Raises OSError.
        """
        kept = 0
        try:
            for end, line in lines_from_end(self.metrics_file):
                record = _record(line)
                if record is None or record["step"] > step:
                    continue
                if record["step"] < step or not (evaluation and "eval" in record):
                    kept = end + 1  # with its newline
                    break
            os.truncate(self.metrics_file, min(kept, self.metrics_file.stat().st_size))
        except FileNotFoundError:
            return

    def _records(self, *, tail: bool) -> Iterator[tuple[bytes, dict[str, Any]]]:
        try:
            with self.metrics_file.open("rb") as file:
                start = max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES) if tail else 0
                file.seek(start)
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return
        # The first line of a tail may be cut off at its start, and then need not be valid JSON or an object.
        for line in lines:
            if (record := _record(line)) is not None:
                yield line, record


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line of metrics; None if the line is torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None
