"""Exit codes shared by the command line, the supervisors and the ranks."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a keepwarm process ends with. Documented in docs/reference.md; scripts may rely on the numbers."""

    DONE = 0
    FAULT = 1
    """A fault that another start may mend, such as a lost peer."""
    BAD_INPUT = 2
    """A job, file or option is wrong; nothing was started or changed."""
    TRAINING_STOPPED = 3
    """Training stopped itself: non-finite values, or a gate that was not passed."""
    UNRECOVERABLE = 4
    """A fault that no level of recovery mends."""
    HUNG = 5
    """A rank that ended itself because training hung. Launchers start the ranks again and never end with it."""
    STATE_NOT_SAVED = 6
    """Training ended with a state that could not be written, as on a full disk; another start repeats the steps since
    the newest checkpoint."""
    INTERRUPTED = 130
    """Ctrl-C or a signal that asked for the end; the state is saved where that was possible."""

    @classmethod
    def of_run(cls) -> "tuple[ExitCode, ...]":
        """Codes of a rank that end the whole run; with any other the ranks are started again."""
        return cls.BAD_INPUT, cls.TRAINING_STOPPED, cls.UNRECOVERABLE, cls.STATE_NOT_SAVED, cls.INTERRUPTED
