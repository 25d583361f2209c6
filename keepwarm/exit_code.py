"""Exit codes shared by the command line, the supervisors and the ranks."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a keepwarm process ends with. Documented in README; scripts may rely on the numbers."""

    DONE = 0
    FAULT = 1
    """A fault that another start may mend, such as a lost peer."""
    BAD_INPUT = 2
    """A job, file or option is wrong; nothing was started or changed."""
    TRAINING_STOPPED = 3
    """Training stopped itself: non-finite values, or a gate that was not passed."""
    UNRECOVERABLE = 4
    """A fault that no level of recovery mends."""
    INTERRUPTED = 130
    """Ctrl-C or a signal that asked for the end; the state is saved where that was possible."""
