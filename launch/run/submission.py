"""Record in a run folder of its submission to a batch system."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from keepwarm.files import READABLE, atomic_write

RECORD_FILE = "submission.json"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Latest submission of a run."""

    batch_system: str
    submitted: float
    """Unix time."""
    resume: bool
    """Whether the submission resumes an existing run."""
    jobs: tuple[str, ...] = ()
    """IDs of its jobs in order of submission; empty until the first one is known."""

    def with_job(self, job_id: str) -> Self:
        """Return a copy with one more job."""
        return replace(self, jobs=(*self.jobs, job_id))

    def write(self, folder: Path) -> None:
        """Replace the record of a run folder. Raises OSError."""
        atomic_write(folder / RECORD_FILE, (json.dumps(asdict(self)) + "\n").encode(), mode=READABLE)


def read_submission(folder: Path) -> Submission | None:
    """Return the record of a run folder; None if the run was never submitted."""
    try:
        values = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Submission(**values | {"jobs": tuple(values["jobs"])})
