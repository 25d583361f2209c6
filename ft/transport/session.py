"""Authentication of what follows the handshake: every frame carries a MAC over its bytes and its number.

The key is derived from the secret and both `Hello` frames, so from both nonces, one for each direction. A frame that
was injected, changed, repeated, left out or moved does not have the MAC that the receiver computes.
"""

import hmac
from dataclasses import dataclass

from keepwarm.ft.errors import AuthenticationFailed

TAG_BYTES = 16
_NUMBER_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class SessionKeys:
    """Keys of one connection as seen from one side."""

    sending: bytes
    receiving: bytes


class Direction:
    """One direction of an authenticated connection: the numbers of its frames, and their MACs.

    With `payloads`, the bytes that follow a frame have a MAC too, under the number of their frame.
    """

    def __init__(self, key: bytes, *, payloads: bool) -> None:
        self._key, self.payloads = key, payloads
        self._keyed = hmac.new(key, digestmod="sha256")
        """The MAC of nothing yet: to copy it takes half the time of preparing the key for every frame."""
        self._number = 0

    def tag(self, frame: bytes) -> bytes:
        """Return the MAC of the next frame."""
        self._number += 1
        mac = self._keyed.copy()
        mac.update(b"f" + self._number.to_bytes(_NUMBER_BYTES, "big") + frame)
        return mac.digest()[:TAG_BYTES]

    def check(self, frame: bytes, tag: bytes) -> None:
        """Raise `AuthenticationFailed` unless `tag` is that of the next frame. Constant time."""
        if not hmac.compare_digest(self.tag(frame), tag):
            raise AuthenticationFailed("a frame is not the next one that the other side sent")

    def payload(self) -> "Payload":
        """Return the MAC, still to be fed with bytes, of the payload of the last frame."""
        return Payload(self._key, self._number)


class Payload:
    """MAC of one payload, computed as its bytes pass."""

    def __init__(self, key: bytes, number: int) -> None:
        self._mac = hmac.new(key, b"p" + number.to_bytes(_NUMBER_BYTES, "big"), "sha256")

    def update(self, data: memoryview) -> None:
        self._mac.update(data)

    def tag(self) -> bytes:
        return self._mac.digest()[:TAG_BYTES]

    def check(self, tag: bytes) -> None:
        """Raise `AuthenticationFailed` unless `tag` is that of the bytes seen. Constant time."""
        if not hmac.compare_digest(self.tag(), tag):
            raise AuthenticationFailed("a payload is not the one that the other side sent")
