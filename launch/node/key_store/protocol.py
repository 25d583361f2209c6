"""What torch's `TCPStore` client sends and reads: its requests, and the answers to them.

A request is a byte that names it, and its fields: little-endian numbers, and texts after their length. torch 2.11 to
2.13 send these; one that is not known closes the connection of its sender, as anything else that does not fit.
"""

import struct
from collections.abc import Callable, Generator, Iterable
from enum import IntEnum
from typing import Any, TypeAlias, TypeVar

from keepwarm.launch.node.key_store.keys import Keys, Waiter

KEY_LIMIT, VALUE_LIMIT, COUNT_LIMIT = 8 << 10, 8 << 20, 128 << 10
"""Bytes of a key and of a value, and keys in one request: the limits of torch's own server."""
MAGIC = 0x3C85F7CE
_U32, _U64, _I64 = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct("<q")
_CAME, _CANCELLED, _READY, _NOT_READY = b"\0", b"\1", b"\0", b"\1"
FORETOLD_BYTES = 64 << 10
"""Most bytes of an answer that is sent before its request."""
T = TypeVar("T")
Reading: TypeAlias = Generator[int, bytes, T]
"""Yields how many bytes are needed next, and is sent them."""


class Query(IntEnum):
    VALIDATE = 0
    SET = 1
    COMPARE_SET = 2
    GET = 3
    ADD = 4
    CHECK = 5
    WAIT = 6
    GETNUMKEYS = 7
    DELETE_KEY = 8
    APPEND = 9
    MULTI_GET = 10
    MULTI_SET = 11
    CANCEL_WAIT = 12
    PING = 13
    QUEUE_PUSH = 14
    QUEUE_POP = 15
    QUEUE_LEN = 16
    LIST_KEYS = 17
    BARRIER = 18


def _u32() -> Reading[int]:
    return int(_U32.unpack((yield _U32.size))[0])


def _i64() -> Reading[int]:
    return int(_I64.unpack((yield _I64.size))[0])


def _length(limit: int, what: str) -> Reading[int]:
    (length,) = _U64.unpack((yield _U64.size))
    if length > limit:
        raise ValueError(f"{what} of {length} where {limit} is the limit")
    return int(length)


def _key() -> Reading[bytes]:
    length = yield from _length(KEY_LIMIT, "a key")
    return (yield length)


def _value() -> Reading[bytes]:
    length = yield from _length(VALUE_LIMIT, "a value")
    return (yield length)


def _keys() -> Reading[list[bytes]]:
    keys = []
    for _ in range((yield from _length(COUNT_LIMIT, "a list"))):
        keys.append((yield from _key()))
    return keys


def _pairs() -> Reading[list[tuple[bytes, bytes]]]:
    pairs = []
    for _ in range((yield from _length(COUNT_LIMIT, "a list"))):
        key = yield from _key()
        pairs.append((key, (yield from _value())))
    return pairs


def _text(data: bytes) -> bytes:
    return _U64.pack(len(data)) + data


def _texts(texts: Iterable[bytes]) -> bytes:
    return b"".join(map(_text, texts))


class Client:
    """Carries out the requests of one connection of a worker.

    torch's client waits for keys before it gets them, in one call. So that this takes one round trip, the answer to the
    second request is foretold with that to the first: as of then, which is during the call.
    """

    def __init__(
        self, keys: Keys, answer: Callable[[bytes], None], foretell: Callable[[bytes, bytes], None]
    ) -> None:  # fmt: skip
        """Create the client of a new connection.

        Args:
            keys: of the start.
            answer: called with what is to be sent.
            foretell: called with a request that may come next, and the answer to it.
        """
        self._keys, self._answer, self._foretell = keys, answer, foretell
        self._waiter = Waiter(self._on_came)
        self._awaited: list[bytes] = []
        self._data = bytearray()
        self._reading = self._requests()
        self._needed = next(self._reading)

    def feed(self, data: bytes) -> None:
        """Take what has arrived. Raise ValueError for anything that does not fit; the client is of no use then."""
        self._data += data
        at = 0
        try:
            while len(self._data) - at >= self._needed:
                part = bytes(self._data[at : at + self._needed])
                at += self._needed
                self._needed = self._reading.send(part)
        finally:
            del self._data[:at]

    def close(self) -> None:
        """Wait for nothing any more."""
        self._keys.cancel(self._waiter)

    def _requests(self) -> Reading[None]:
        valid = False
        while True:
            number = (yield 1)[0]
            if number not in _REQUESTS:
                raise ValueError(f"request {number} of torch's TCPStore is not known here")
            if not valid and number != Query.VALIDATE:
                raise ValueError("it is no client of torch's TCPStore")
            valid = True
            fields, carry_out = _REQUESTS[Query(number)]
            values = []
            for field in fields:
                values.append((yield from field()))
            answer = carry_out(self, *values)
            if answer:
                self._answer(answer)

    # ---- requests

    def _validate(self, number: int) -> None:
        if number != MAGIC:
            raise ValueError("it is no client of torch's TCPStore")

    def _wait(self, keys: list[bytes]) -> None:
        self._awaited = keys
        self._keys.wait(keys, self._waiter)

    def _on_came(self) -> None:
        keys, self._awaited = self._awaited, []
        values = [self._keys.get(key) for key in keys if self._keys.is_set(key)]
        if keys and len(values) == len(keys) and sum(map(len, values)) <= FORETOLD_BYTES:
            several = _texts(keys) if len(keys) == 1 else _U64.pack(len(keys)) + _texts(keys)
            query = Query.GET if len(keys) == 1 else Query.MULTI_GET
            self._foretell(bytes([query]) + several, _texts(values))
        self._answer(_CAME)

    def _cancel(self) -> bytes:
        self._keys.cancel(self._waiter)
        return _CANCELLED

    def _multi_set(self, pairs: list[tuple[bytes, bytes]]) -> None:
        for key, value in pairs:
            self._keys.set(key, value)

    def _pop(self, key: bytes) -> bytes:
        value = self._keys.pop(key)
        return _U64.pack(0) if value is None else _U64.pack(1) + _text(value)

    def _barrier(self, key: bytes, size: int) -> None:
        self._awaited = []
        self._keys.arrive(key, size, self._waiter)


_REQUESTS: dict[Query, tuple[tuple[Callable[[], Reading[Any]], ...], Callable[..., bytes | None]]] = {
    Query.VALIDATE: ((_u32,), Client._validate),
    Query.SET: ((_key, _value), lambda one, key, value: one._keys.set(key, value)),
    Query.COMPARE_SET: (
        (_key, _value, _value),
        lambda one, key, expected, value: _text(one._keys.compare_set(key, expected, value)),
    ),
    Query.GET: ((_key,), lambda one, key: _text(one._keys.get(key))),
    Query.ADD: ((_key, _i64), lambda one, key, amount: _I64.pack(one._keys.add(key, amount))),
    Query.CHECK: ((_keys,), lambda one, keys: _READY if one._keys.has(keys) else _NOT_READY),
    Query.WAIT: ((_keys,), Client._wait),
    Query.GETNUMKEYS: ((), lambda one: _I64.pack(len(one._keys))),
    Query.DELETE_KEY: ((_key,), lambda one, key: _I64.pack(one._keys.delete(key))),
    Query.APPEND: ((_key, _value), lambda one, key, value: one._keys.append(key, value)),
    Query.MULTI_GET: ((_keys,), lambda one, keys: _texts([one._keys.get(key) for key in keys])),
    Query.MULTI_SET: ((_pairs,), Client._multi_set),
    Query.CANCEL_WAIT: ((), Client._cancel),
    Query.PING: ((_u32,), lambda one, nonce: _U32.pack(nonce)),
    Query.QUEUE_PUSH: ((_key, _value), lambda one, key, value: one._keys.push(key, value)),
    Query.QUEUE_POP: ((_key,), Client._pop),
    Query.QUEUE_LEN: ((_key,), lambda one, key: _I64.pack(one._keys.length(key))),
    Query.LIST_KEYS: ((), lambda one: _U64.pack(len(one._keys)) + _texts(one._keys.names())),
    Query.BARRIER: ((_key, _i64), Client._barrier),
}
"""What each request has, and what is done for it; returns the answer, or nothing."""
