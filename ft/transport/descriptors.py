"""File descriptors of an agent: how many it needs, and the limit of the process."""

import resource

from keepwarm.ft.errors import TooFewDescriptors
from keepwarm.ft.transport.listener import STRANGERS

OWN = 64
"""Standard streams, selector, memory, log, lock, listeners, and the files and folders that are open at one time."""
PER_PROCESS = 2
"""A socket and a pidfd for every process of this node."""
PROCESSES = 64
"""Ranks, those that they replace, supervisors and observers on one node."""
FEWEST_STRANGERS = 16


def needed(slots: int) -> int:
    """Return the descriptors of an agent of a job with `slots` nodes. Pure.

    An agent keeps links to its group and its neighbours in the tree, but while an epoch is being decided, that of the
    lowest slot, or another one in its place, is connected with every other agent.
    """
    return OWN + PER_PROCESS * PROCESSES + max(0, slots - 1)


def strangers(slots: int, limit: int) -> int:
    """Return how many connections may wait to identify themselves under a `limit` of descriptors. Pure.

    Raise `TooFewDescriptors` with the arithmetic if the limit is too low for the job.
    """
    need = needed(slots)
    if limit < need + FEWEST_STRANGERS:
        raise TooFewDescriptors(
            f"the snapshot agent of a job of {slots} nodes needs {need + FEWEST_STRANGERS} file descriptors "
            f"({OWN} of its own, {PER_PROCESS * PROCESSES} for processes of its node, {max(0, slots - 1)} for the "
            f"other agents, {FEWEST_STRANGERS} for connections that identify themselves), this process may have "
            f"{limit}: raise the hard limit (`ulimit -Hn`, LimitNOFILE= of the service that starts the job)"
        )
    return min(STRANGERS, limit - need)


def raise_limit() -> int:
    """Raise this process's limit to its hard limit. Return the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft if soft != resource.RLIM_INFINITY else 1 << 20
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # a hard limit above the kernel's own maximum
        return soft
    return hard if hard != resource.RLIM_INFINITY else 1 << 20
