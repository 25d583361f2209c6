"""The record in a run folder of how the run was submitted to a batch system."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from keepwarm.files import atomic_write

RECORD_FILE = "submission.json"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The last submission of a run."""

    batch_system: str
    submitted: float
    """Unix time."""
    resume: bool
    """Whether the run existed before and is continued."""
    jobs: tuple[str, ...] = ()
    """IDs of its jobs, first to last; none while they are being submitted."""

    def with_job(self, job_id: str) -> Self:
        """The same with one more job."""
        return replace(self, jobs=(*self.jobs, job_id))

    def write(self, folder: Path) -> None:
        """Replace the record of a run folder. Raises OSError."""
        atomic_write(folder / RECORD_FILE, (json.dumps(asdict(self)) + "\n").encode(), mode=0o644)


def read_submission(folder: Path) -> Submission | None:
    """The record of a run folder; None if the run was never submitted."""
    try:
        values = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Submission(**values | {"jobs": tuple(values["jobs"])})
