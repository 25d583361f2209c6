"""`keepwarm snapshots RUN`: show the snapshots that a run's agents hold in this machine's memory."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from keepwarm.ft.discovery.config import agents_here
from keepwarm.ft.discovery.status import Status
from keepwarm.ft.errors import FtError
from keepwarm.ft.transport.auth import SECRET, load_secret, run_identity
from keepwarm.ft.transport.identity import copied_from
from keepwarm.ft.worker.client import AgentClient
from keepwarm.launch.errors import SnapshotsError
from keepwarm.launch.plan.text import size

AGENT_TIMEOUT_S = 10.0
"""Timeout of an agent's handshake, and again of its answer."""


def show(folder: Path, *, as_json: bool) -> None:
    """Print the snapshots that this machine's agents of the run in `folder` hold.

    Raises:
        SnapshotsError: the run never took a snapshot, or none of its agents runs here.
    """
    found, silent = ask(folder)
    if as_json:
        agents = [msgspec.to_builtins(status, str_keys=True) for status in found]
        print(json.dumps({"agents": agents, "silent": {str(slot): why for slot, why in silent.items()}}))
    else:
        print("\n".join(text(found, silent)))


def ask(folder: Path) -> tuple[list[Status], dict[int, str]]:
    """Return the answers of the run's agents on this machine and, by slot, why the others gave none.

    Raises:
        SnapshotsError: as `show`.
    """
    if not (folder / SECRET).exists():
        raise SnapshotsError(f"{folder}: no run with snapshots has been started in this folder (no file {SECRET!r})")
    if (original := copied_from(folder)) is not None:
        raise SnapshotsError(f"{folder}: this is a copy of {original}, and no run of its own before it is resumed")
    try:
        secret = load_secret(folder / SECRET)
    except FtError as error:
        raise SnapshotsError(str(error)) from error
    run = run_identity(secret)
    found, silent = [], {}
    for slot, path in agents_here(run).items():
        try:
            found.append(_status(path, run, secret))
        except FtError as error:
            silent[slot] = str(error)
    if not found:
        why = "".join(f"; {reason}" for reason in silent.values())
        raise SnapshotsError(f"{folder}: no agent of this run is running on this machine{why}")
    return found, silent


def _status(path: Path, run: str, secret: bytes) -> Status:
    client = AgentClient(path, run=run, secret=secret, role="onlooker", deadline=AGENT_TIMEOUT_S)
    try:
        return client.status()
    finally:
        client.close()


def text(found: Sequence[Status], silent: Mapping[int, str]) -> Iterator[str]:
    """Yield the answers as tables: agents, snapshots, latest commits and background work."""
    yield f"run {found[0].run}: {len(found)} of its agents on this machine"
    for rows in (_agents(found), _snapshots(found), _commits(found), _background(found)):
        yield from _table(list(rows))
    for slot, why in silent.items():
        yield f"slot {slot} does not answer: {why}"
    if not any(status.held for status in found):
        yield "no snapshot is held yet"


Rows = Iterator[tuple[str, ...]]


def _agents(found: Sequence[Status]) -> Rows:
    yield (
        "slot",
        "pid",
        "epoch",
        "mode",
        "group",
        "parity",
        "peers",
        "workers",
        "buffers",
        "buffer size",
        "memory",
        "resident",
    )
    for status in found:
        yield (
            str(status.slot), str(status.pid), str(status.epoch), _mode(status), _numbers(status.group),
            str(status.parity), _numbers(status.peers), _numbers(status.workers), str(status.buffers),
            size(status.buffer_bytes), size(status.memory_bytes), size(status.resident_bytes),
        )  # fmt: skip


def _mode(status: Status) -> str:
    """Return the mode, and how much memory an agent that has just started has taken so far."""
    if status.grown_bytes >= status.memory_bytes:
        return status.mode
    return f"{status.mode}, growing {100 * status.grown_bytes // status.memory_bytes} %"


def _snapshots(found: Sequence[Status]) -> Rows:
    yield "slot", "epoch", "step", "phase", "layout", "data in", "parity in", "stripe:checksum"
    for status in found:
        for held in status.held:
            chunks = " ".join(f"{stripe}:{digest}" for stripe, digest in sorted(held.chunks.items()))
            yield (
                str(status.slot), str(held.epoch), str(held.step), held.phase, held.layout[:12],
                _or_dash(held.data), _or_dash(held.parity), chunks or "-",
            )  # fmt: skip


def _commits(found: Sequence[Status], shown: int = 5) -> Rows:
    yield "slot", "epoch", "step", "committed after s"
    for status in found:
        for commit in status.commits[-shown:]:
            yield str(status.slot), str(commit.epoch), str(commit.step), _seconds(commit.committed)


def _background(found: Sequence[Status]) -> Rows:
    yield "slot", "scrubbed", "damaged", "durable parts", "published", "failed", "last step", "in s", "last error"
    for status in found:
        scrub, durable = status.scrub, status.durable
        written: tuple[str, ...] = ("-",) * 6
        if durable:
            step = "-" if durable["last_step"] < 0 else str(durable["last_step"])
            counts = (str(durable[key]) for key in ("written", "published", "failed"))
            written = (*counts, step, _seconds(durable["last_seconds"]), durable["last_error"] or "-")
        yield (str(status.slot), str(scrub["checked"]), str(scrub["damaged"]), *written)


def _table(lines: list[tuple[str, ...]]) -> Iterator[str]:
    """Yield a blank line and aligned columns; nothing if there is only the header."""
    if len(lines) == 1:
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in [(), *lines]:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=bool(line))).rstrip()


def _numbers(values: Sequence[int]) -> str:
    return ",".join(map(str, values)) or "-"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _seconds(value: float) -> str:
    return f"{value:.3f}"
