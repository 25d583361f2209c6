"""`RUN/events.jsonl`: what happened to a run, one JSON object a line, appended by every supervisor and by ranks.

Every line has `time` (seconds since 1970), `event`, and what belongs to it; lines of supervisors have their `node`.

    started   slots, nodes          a supervisor began to run
    failure   cause, slots          workers of these slots are lost, and why
    recovery  rung, why, slots, step, bytes_decoded, phases   training goes on; phases are seconds by name
    whole     epoch, step           every chunk of the restored snapshot is back: the redundancy is what it was
    hang      silent, late, reason  no rank made progress: ranks that did not answer, and that others wait for
    straggler rank, host, ratio     everything takes `ratio` times as long because of a rank
    sink_failed sink, reason        a metric sink failed for the first time
    node left out   host, why       a node that the run goes on without
    rescued   step, slots           before a run shrinks: memory is on disk, that of lost slots included
    not rescued   why, slots        before a run shrinks: memory could not be saved
    resized   slots, why            the run goes on with another number of slots, from disk
    ended     why                   a supervisor left

Torch-free.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "events.jsonl"
PHASES = ("detect", "rendezvous", "start", "fetch", "decode", "verify", "resume")
"""Phases of a recovery, in the order in which they come."""


def append(folder: Path, event: str, **fields: Any) -> None:
    """Add one line, in one write: lines of several processes do not mix on a local or a POSIX shared file system."""
    line = json.dumps({"time": time.time(), "event": event, **fields}) + "\n"
    descriptor = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read(folder: Path) -> list[dict[str, Any]]:
    """All complete lines, oldest first; a torn last one is left out, a missing file is an empty list."""
    found = []
    with contextlib.suppress(FileNotFoundError), (folder / FILE).open(encoding="utf-8") as lines:
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found
