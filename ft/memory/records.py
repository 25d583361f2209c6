"""The records of an agent about its memory, in a memory file that outlives it.

The file has two places, written in turn, so that the last record is complete while the next one is written. A record is
a header (magic, number, length, xxh3_64 of number, length and content) and msgpack. The valid one with the higher
number counts. A record of another configuration is no record.
"""

import os
import struct
from collections.abc import Iterable, Mapping

import msgspec
import xxhash

from keepwarm.ft.memory.shared_memory import started_at
from keepwarm.ft.protocol.ballot import Promises
from keepwarm.ft.protocol.kept_memory import KeptMemory, kept, same
from keepwarm.ft.protocol.state import State

_MAGIC = b"kwrecord"
_HEADER = struct.Struct("<8sQQQ")
_NUMBERS = struct.Struct("<QQ")
_PLACES = (0, 1 << 40)
"""Where the two records begin. Only what was written takes memory."""


class WorkerProcess(msgspec.Struct, frozen=True):
    """A process that has mapped the memory. `started` tells it from another one that got its pid later."""

    worker: int
    pid: int
    started: int


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What the next agent finds."""

    config: int
    """xxh3_64 of the configuration."""
    memory: KeptMemory
    workers: tuple[WorkerProcess, ...]
    """Those that were attached."""
    promises: Promises = Promises()
    """To other agents: see `keepwarm.ft.protocol.ballot`."""


class Records:
    """Reads and writes the records in one memory file, which has one user at a time."""

    def __init__(self, descriptor: int, config: bytes) -> None:
        """Take ownership of the memory file `descriptor`."""
        self._descriptor, self._config = descriptor, xxhash.xxh3_64_intdigest(config)
        self._number = 0
        self._before: tuple[State, Mapping[int, int], Promises] | None = None
        self.promises = Promises()
        """Those to other agents, written with the rest."""
        self.damaged = False
        """Whether something was found and not understood."""

    def read(self) -> Record | None:
        """Return the last record, or None."""
        found = [place for place in (self._place(start) for start in _PLACES) if place is not None]
        if os.fstat(self._descriptor).st_size == 0:
            return None
        self.damaged = True
        for number, content in sorted(found, reverse=True):
            self._number = max(self._number, number)
            try:
                record = msgspec.msgpack.decode(content, type=Record)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
            if record.config == self._config:
                self.damaged, self.promises = False, record.promises
                return record
        return None

    def write(self, state: State, workers: Mapping[int, int]) -> None:
        """Write down what matters of a state, if that has changed. `workers` are the pids of the attached workers."""
        before, self._before = self._before, (state, workers, self.promises)
        if before is not None and (before[0] is state or same(before[0], state)) and before[1:] == self._before[1:]:
            return
        record = Record(
            config=self._config, memory=kept(state), workers=tuple(_processes(workers)), promises=self.promises
        )  # fmt: skip
        try:
            self._append(msgspec.msgpack.encode(record))
        except OSError:  # an old record must not stand for what is there now
            os.ftruncate(self._descriptor, 0)

    def _append(self, content: bytes) -> None:
        self._number += 1
        numbers = _NUMBERS.pack(self._number, len(content))
        sum_ = xxhash.xxh3_64_intdigest(numbers + content)
        data = memoryview(_HEADER.pack(_MAGIC, self._number, len(content), sum_) + content)
        at = _PLACES[self._number % 2]
        while data:
            written = os.pwrite(self._descriptor, data, at)
            data, at = data[written:], at + written

    def close(self) -> None:
        os.close(self._descriptor)

    def _place(self, start: int) -> tuple[int, bytes] | None:
        """Return (number, content) of the record that begins at `start`, or None if there is no complete one."""
        head = os.pread(self._descriptor, _HEADER.size, start)
        if len(head) < _HEADER.size:
            return None
        magic, number, length, sum_ = _HEADER.unpack(head)
        room = os.fstat(self._descriptor).st_size - start - _HEADER.size
        if magic != _MAGIC or length > room:
            return None
        content = os.pread(self._descriptor, length, start + _HEADER.size)
        if len(content) < length or xxhash.xxh3_64_intdigest(_NUMBERS.pack(number, length) + content) != sum_:
            return None
        return number, content


def _processes(workers: Mapping[int, int]) -> Iterable[WorkerProcess]:
    for worker, pid in workers.items():
        started = started_at(pid)
        if started is not None:
            yield WorkerProcess(worker, pid, started)
