"""Buckets on their way in: each is checksummed on a thread, then the protocol decides what becomes of it."""

from collections.abc import Hashable

import numpy as np
import xxhash

from keepwarm.ft.agent.shell import Arrived, Shell
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.protocol import events
from keepwarm.ft.protocol.messages import Bucket
from keepwarm.ft.transport.link import Link


class Inbox:
    """Receive buffers of one bucket each; a link fills one at a time and is paused until that one is free again."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._free: list[Bytes] = []
        self._filling: dict[Link, Bytes] = {}

    @property
    def free(self) -> int:
        """Receive buffers that wait for their next bucket; they are kept."""
        return len(self._free)

    def target(self, link: Link, size: int) -> memoryview | None:
        """Memory for a bucket of `size` bytes; None when buckets of this job are smaller."""
        if size > self._shell.config.bucket_bytes:
            return None
        self._filling[link] = self._free.pop() if self._free else self._new()
        return self._filling[link][:size].data

    def received(self, link: Link, message: Bucket, payload: memoryview) -> None:
        assert link.theirs is not None
        shell = self._shell
        sender, incarnation, data = link.slot, link.theirs.incarnation, self._filling.pop(link)
        link.pause()  # what follows waits in the sockets: one bucket of a peer takes memory here

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
        """The link has gone, perhaps in the middle of a bucket."""
        if (buffer := self._filling.pop(link, None)) is not None:
            self._free.append(buffer)

    def _new(self) -> Bytes:
        buffer = np.empty(self._shell.config.bucket_bytes, np.uint8)
        buffer.fill(0)  # fault it in, once
        return buffer


def strand(link: Link) -> Hashable:
    """What arrives on one link is handled in order."""
    return "link", id(link)
