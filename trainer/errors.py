"""Errors of `trainer`, each with the exit code of the process.

TrainerError
├── SpecError            2  the job or model spec is wrong
├── DataError            2  a data file or tokenizer is missing, foreign, truncated or does not fit
├── OutputError          2  the run folder exists or cannot be written at the start
├── CheckpointError      2  a saved state is missing, damaged or does not fit
├── RendezvousFailed     1  the ranks do not reach each other; another start may succeed
├── DeviceBroken         1  the rank's GPU fails; another node may take its place
├── RestoreFailed        1  state could not be restored from memory; another start may succeed
├── TrainingStopped      3  training stopped itself: NaN, a gate
├── UnrecoverableFault   4  a fault that no level of recovery can fix
└── StateNotSaved        6  the state could not be written: a full disk
"""

from keepwarm.exit_code import ExitCode


class TrainerError(Exception):
    """Base class of all errors raised by this package; the message says what to do next."""

    exit_code = ExitCode.BAD_INPUT


class SpecError(TrainerError):
    """The spec cannot be read or contains a wrong value; names the file and the key."""


class DataError(TrainerError):
    """A data file or tokenizer cannot be used; names the file."""


class OutputError(TrainerError):
    """The run folder cannot be used; names the folder."""


class CheckpointError(TrainerError):
    """A saved state cannot be used; names the file."""


class RendezvousFailed(TrainerError):
    """The ranks do not reach each other; names the address or the interfaces."""

    exit_code = ExitCode.FAULT


class DeviceBroken(TrainerError):
    """This rank's GPU is lost or computes wrong; names the rank. Only another node helps."""

    exit_code = ExitCode.FAULT


class RestoreFailed(TrainerError):
    """Agents, peers or bytes were lost while state was being restored: a regular fault; the ranks restart."""

    exit_code = ExitCode.FAULT


class TrainingStopped(TrainerError):
    """Training stopped itself; names the step and the ranks."""

    exit_code = ExitCode.TRAINING_STOPPED


class UnrecoverableFault(TrainerError):
    """A fault that could not be recovered."""

    exit_code = ExitCode.UNRECOVERABLE


class StateNotSaved(TrainerError):
    """The training state could not be written; names the folder. Earlier checkpoints are untouched."""

    exit_code = ExitCode.STATE_NOT_SAVED
