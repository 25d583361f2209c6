"""Last words of a rank: what its launcher must know of its end beyond the exit code. Torch-free.

A rank whose GPU breaks ends like one with a bug, NCCL's watchdog ends healthy ranks by SIGABRT, and of a hang only the
ranks know for whom they wait. So a launcher gives every rank a file in its own memory, to which the rank appends a line
for each such fact.
"""

import os
from collections.abc import Iterator

import msgspec

from keepwarm.side_writer import attempt

LAST_WORDS = "KEEPWARM_LAST_WORDS"
"""Environment variable: the file for the last words of this rank, in the memory of its launcher."""
MAX_BYTES = 1 << 16
MAX_TEXT = 2000


class OnGpu(msgspec.Struct, frozen=True, tag=True):
    """The rank computes on a GPU, where SIGABRT is how NCCL's watchdog ends it."""


class BrokenGpu(msgspec.Struct, frozen=True, tag=True):
    """Its GPU fails in a way that another start on the same node does not mend."""

    text: str


class Hang(msgspec.Struct, frozen=True, tag=True):
    """It has detected a hang and ends."""

    at_fault: tuple[int, ...]
    """Ranks for which the others wait; empty if that is not known."""


Word = OnGpu | BrokenGpu | Hang


def leave(word: Word) -> None:
    """Append to the file of this rank, if its launcher gave it one; what cannot be written is dropped."""
    path = os.environ.get(LAST_WORDS)
    if path is None:
        return
    if isinstance(word, BrokenGpu):
        word = BrokenGpu(word.text[:MAX_TEXT])
    with attempt("last words"):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, msgspec.json.encode(word) + b"\n")
        finally:
            os.close(descriptor)


class LastWords:
    """The launcher's side: one file, empty at first, gone with this process."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("keepwarm-last-words")

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def clear(self) -> None:
        os.ftruncate(self._descriptor, 0)

    def read(self) -> list[Word]:
        """Return what the rank has left, oldest first, without lines that are not words."""
        return list(_words(os.pread(self._descriptor, MAX_BYTES, 0)))


def _words(data: bytes) -> Iterator[Word]:
    for line in data.splitlines():
        try:
            yield msgspec.json.decode(line, type=Word)
        except msgspec.DecodeError:
            continue
