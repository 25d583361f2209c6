"""sbatch options that a job may add to its script, and those that the script itself needs. Torch-free."""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

_LAYOUT = "it follows from parallel.*, cluster.ranks_per_node and cluster.slurm.spares"
_GPUS = "write cluster.slurm.gpus_per_node or cluster.slurm.gres"
_CPUS = "write cluster.slurm.cpus_per_rank"
_REQUEUE = "keepwarm requeues the job, which continues from its saved state"
_LOGS = "the logs are in the run folder, where keepwarm logs finds them"
_SUBMISSION = "keepwarm submit has its own options for this"
_ENVIRONMENT = "write cluster.slurm.export"

RESERVED: Mapping[str, str] = {
    "nodes": _LAYOUT, "nodefile": "write cluster.slurm.nodelist", "use-min-nodes": _LAYOUT,
    "ntasks": _LAYOUT, "ntasks-per-node": _LAYOUT, "ntasks-per-core": _LAYOUT, "ntasks-per-gpu": _LAYOUT,
    "ntasks-per-socket": _LAYOUT, "overcommit": _LAYOUT, "tasks": _LAYOUT, "tasks-per-node": _LAYOUT,
    "cpus-per-task": _CPUS, "cpus-per-gpu": _CPUS,
    "gpus": _GPUS, "gpus-per-node": _GPUS, "gpus-per-socket": _GPUS, "gpus-per-task": _GPUS,
    "requeue": _REQUEUE, "no-requeue": _REQUEUE,
    "no-kill": "the job must outlive the loss of a node",
    "signal": "write cluster.slurm.save_before_limit", "time": "write cluster.slurm.time",
    "array": "keepwarm submit --sweep makes arrays",
    "dependency": "write cluster.slurm.dependency",
    "output": _LOGS, "open-mode": _LOGS, "chdir": _LOGS,
    "export": _ENVIRONMENT, "export-file": _ENVIRONMENT, "get-user-env": _ENVIRONMENT,
    "clusters": "runs, watch and cancel ask the cluster of this machine alone",
    "wrap": _SUBMISSION, "parsable": _SUBMISSION, "test-only": _SUBMISSION, "wait": _SUBMISSION,
    "help": _SUBMISSION, "usage": _SUBMISSION, "version": _SUBMISSION, "quiet": _SUBMISSION,
}  # fmt: skip
"""Options that the layout, requeues or the record of the job need, each with what to do instead."""
KEYS: Mapping[str, str] = {
    "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint",
    "exclude": "exclude", "nodelist": "nodelist", "reservation": "reservation", "begin": "begin", "mem": "mem",
    "gres": "gres", "mail-type": "mail", "mail-user": "mail", "job-name": "job_name",
}  # fmt: skip
"""Options that have a key of `cluster.slurm`, with the key."""
_OTHERS = (
    "acctg-freq", "batch", "bb", "bbf", "cluster-constraint", "comment", "container", "contiguous", "core-spec",
    "cores-per-socket", "cpu-freq", "deadline", "delay-boot", "distribution", "error", "exclusive", "extra-node-info",
    "gid", "gpu-bind", "gpu-freq", "gres-flags", "hint", "hold", "ignore-pbs", "input", "kill-on-invalid-dep",
    "licenses", "mcs-label", "mem-bind", "mem-per-cpu", "mem-per-gpu", "mincpus", "network", "nice", "oversubscribe",
    "power", "prefer", "priority", "profile", "propagate", "reboot", "sockets-per-node", "spread-job", "switches",
    "thread-spec", "threads-per-core", "time-min", "tmp", "uid", "verbose", "wait-all-nodes", "wckey",
)  # fmt: skip
_SHORT: Mapping[str, str] = {
    "A": "account", "a": "array", "B": "extra-node-info", "b": "begin", "C": "constraint", "c": "cpus-per-task",
    "D": "chdir", "d": "dependency", "e": "error", "F": "nodefile", "G": "gpus", "H": "hold", "h": "help",
    "i": "input", "J": "job-name", "k": "no-kill", "L": "licenses", "M": "clusters", "m": "distribution",
    "N": "nodes", "n": "ntasks", "O": "overcommit", "o": "output", "p": "partition", "Q": "quiet", "q": "qos",
    "S": "core-spec", "s": "oversubscribe", "t": "time", "V": "version", "v": "verbose", "W": "wait",
    "w": "nodelist", "x": "exclude",
}  # fmt: skip
_WITHOUT_VALUE = "HhOQvVW"
"""Short options that others may follow in the same word."""


def problem(extra: Sequence[str], keys: Sequence[str]) -> str | None:
    """Return why additional options do not fit a job that sets these `keys` of `cluster.slurm`; None if they fit."""
    for text in extra:
        for name in _names(text):
            if name in RESERVED:
                return f"{text}: sets --{name}, which keepwarm sets itself: {RESERVED[name]}"
            if KEYS.get(name) in keys:
                return f"{text}: sets --{name}, as cluster.slurm.{KEYS[name]} does: keep one of them"
    return None


def keys_set(extra: Iterable[object]) -> set[str]:
    """Return the keys of `cluster.slurm` whose options are among these."""
    return {KEYS[name] for text in extra if isinstance(text, str) for name in _names(text) if name in KEYS}


def option_names(extra: Iterable[str]) -> list[str]:
    """Return the full names of all options, also those with which a job may do as it likes."""
    return [name for text in extra for name in _names(text)]


def _names(text: str) -> Iterator[str]:
    """Yield the full names of the options in one string, which may contain several words, as sbatch reads it."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # a quotation mark without its partner
        words = text.split()
    for word in words:
        if word.startswith("--"):
            yield from _long(word[2:].partition("=")[0])
        elif word.startswith("-"):
            yield from _bundle(word[1:])


def _long(name: str) -> Iterator[str]:
    """Yield what an option may mean: its name, or every name that it abbreviates."""
    if name in RESERVED or name in KEYS or name in _OTHERS or not name:
        yield name
        return
    yield from (full for full in (*RESERVED, *KEYS) if full.startswith(name))


def _bundle(letters: str) -> Iterator[str]:
    for letter in letters:
        if not re.match("[A-Za-z]", letter):
            return
        yield _SHORT.get(letter, letter)
        if letter not in _WITHOUT_VALUE:
            return
