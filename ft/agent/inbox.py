"""Receive buckets: checksum each one on a thread, then let the protocol decide what to do with it."""

from collections.abc import Hashable

import numpy as np
import xxhash

from keepwarm.ft.agent.shell import Arrived, Shell
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import Bucket
from keepwarm.ft.transport.link import Link


class Inbox:
    """One-bucket receive buffers. A link fills one at a time and is paused until that buffer is free again."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._free: list[Bytes] = []
        self._filling: dict[Link, Bytes] = {}

    @property
    def free(self) -> int:
        """Number of idle receive buffers. They are kept for reuse."""
        return len(self._free)

    def target(self, link: Link, size: int) -> memoryview | None:
        """Return memory for a bucket of `size` bytes, or None if this job's buckets are smaller."""
        if size > self._shell.config.bucket_bytes:
            return None
        self._filling[link] = self._free.pop() if self._free else self._new()
        return self._filling[link][:size].data

    def received(self, link: Link, message: Bucket, payload: memoryview) -> None:
        assert link.theirs is not None
        shell = self._shell
        sender, incarnation, data = link.slot, link.theirs.incarnation, self._filling.pop(link)
        link.pause()  # further data waits in the sockets: each peer may occupy memory for one bucket

        def done() -> None:
            self._free.append(data)
            link.resume()

        def arrived(intact: bool) -> None:
            bucket = Arrived(data[: message.size], done)
            shell.dispatch(events.BucketArrived(sender, incarnation, message, intact), bucket)
            if not bucket.wanted:
                bucket.done()

        shell.pool.order(strand(link), lambda: xxhash.xxh3_64_intdigest(payload) == message.sum, arrived)

    def forget(self, link: Link) -> None:
        """Clean up after a lost link, which may have been in the middle of a bucket."""
        if (buffer := self._filling.pop(link, None)) is not None:
            self._free.append(buffer)

    def _new(self) -> Bytes:
        buffer = np.empty(self._shell.config.bucket_bytes, np.uint8)
        buffer.fill(0)  # fault the pages in once
        return buffer


def strand(link: Link) -> Hashable:
    """Return the strand of a link, which keeps its buckets in order."""
    return "link", id(link)
