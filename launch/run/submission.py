"""Records in a run folder of its submission to a batch system, and of the jobs that a user has asked to end."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import msgspec

from keepwarm.files import READABLE, atomic_write
from keepwarm.ft.transport.identity import copied_from
from keepwarm.trainer.errors import OutputError

RECORD_FILE = "submission.json"
CANCELLED = "cancelled-"
"""Start of the name of the file that marks a job to be ended."""


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
    """Return the record of a run folder; None if the run was never submitted, or the folder is a copy of one that was.
    Fields of other versions are ignored.

    Raises OutputError if it cannot be read.
    """
    file = folder / RECORD_FILE
    try:
        if copied_from(folder) is not None:
            return None
        return msgspec.json.decode(file.read_bytes(), type=Submission)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise OutputError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def ask_for_end(folder: Path, job_id: str) -> None:
    """Record that a user wants a running job to end once its state is saved. An empty file, which a full disk takes.

    Raises OSError.
    """
    (folder / f"{CANCELLED}{job_id}").touch()


def end_is_asked(folder: Path, job_id: str) -> bool:
    """Return whether `ask_for_end` was called for the job."""
    return (folder / f"{CANCELLED}{job_id}").exists()
