"""CPUs of this machine: those near a PCI device, and those that a process had before it was bound to some of them."""

import contextlib
import os
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

CPUS = "KEEPWARM_CPUS"
"""Environment variable that keeps the CPUs of a process before it was bound, for its children and its next start."""
SYSFS = Path("/sys")


def parse_cpus(text: str) -> frozenset[int]:
    """Return the CPUs of a list such as `0-3,8,10-11`, the form of the kernel. Raise `ValueError`."""
    found: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def format_cpus(cpus: Iterable[int]) -> str:
    """Return a list of CPUs in the form of the kernel."""
    runs = [[cpu for _, cpu in run] for _, run in groupby(enumerate(sorted(cpus)), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def near_cpus(address: str, sysfs: Path = SYSFS) -> frozenset[int]:
    """Return the CPUs of the NUMA node of a PCI device such as `0000:19:00.0`; none if the kernel does not know."""
    with contextlib.suppress(OSError, ValueError):
        return parse_cpus((sysfs / "bus" / "pci" / "devices" / address / "local_cpulist").read_text())
    return frozenset()


def unbound_cpus() -> frozenset[int]:
    """Return the CPUs that this process may use, as they were before `bind`."""
    with contextlib.suppress(ValueError):
        if kept := parse_cpus(os.environ.get(CPUS, "")):
            return kept
    return frozenset(os.sched_getaffinity(0))


def bind(cpus: Iterable[int]) -> None:
    """Bind all threads of this process to some CPUs. Raise `OSError` if the kernel refuses."""
    os.environ[CPUS] = format_cpus(unbound_cpus())
    chosen = list(cpus)
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), chosen)


def unbind() -> None:
    """Let this process, which a bound one has started, use all CPUs that there are for the node's processes."""
    if CPUS in os.environ:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, unbound_cpus())
