"""What torch's own `TCPStore` client sends, in pieces of any size, and anything else."""

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.launch.node.key_store.keys import Keys, Waiter
from keepwarm.launch.node.key_store.protocol import COUNT_LIMIT, KEY_LIMIT, MAGIC, VALUE_LIMIT, Client, Query
from keepwarm.launch.node.key_store.server import entries, entry, foretell, foretold

HELLO = bytes([Query.VALIDATE]) + struct.pack("<I", MAGIC)


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def number(value: int) -> bytes:
    return struct.pack("<q", value)


def request(query: Query, *fields: bytes) -> bytes:
    return bytes([query]) + b"".join(fields)


def client(keys: Keys) -> tuple[Client, list[bytes]]:
    answers: list[bytes] = []
    return Client(keys, answers.append, lambda request, answer: None), answers


SESSION = [
    HELLO,
    request(Query.PING, struct.pack("<I", 7)),
    request(Query.SET, text(b"a"), text(b"one")),
    request(Query.GET, text(b"a")),
    request(Query.ADD, text(b"n"), number(-5)),
    request(Query.WAIT, number(2), text(b"a"), text(b"later")),
    request(Query.SET, text(b"later"), text(b"")),
    request(Query.MULTI_GET, number(2), text(b"a"), text(b"later")),
    request(Query.DELETE_KEY, text(b"a")),
    request(Query.GETNUMKEYS),
]
ANSWERS = [
    struct.pack("<I", 7), text(b"one"), number(-5), b"\0", text(b"one") + text(b""), number(1), number(2),
]  # fmt: skip


@given(st.lists(st.integers(1, 40)))
def test_requests_in_pieces_of_any_size_are_answered_alike(sizes: Sequence[int]) -> None:
    one, answers = client(Keys())
    stream, at = b"".join(SESSION), 0
    for size in sizes:
        one.feed(stream[at : at + size])
        at += size
    one.feed(stream[at:])
    assert answers == ANSWERS


@given(st.binary(max_size=200), st.booleans())
def test_anything_else_is_refused_or_waited_for_and_changes_no_other_client(data: bytes, greeted: bool) -> None:
    keys = Keys()
    honest, answers = client(keys)
    honest.feed(HELLO + request(Query.SET, text(b"mine"), text(b"1")))
    other, _ = client(keys)
    try:
        other.feed(HELLO * greeted + data)
    except ValueError:
        other.close()
    honest.feed(request(Query.CHECK, number(1), text(b"mine")))
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0d", "no client of torch's TCPStore"),
        (bytes(5), "no client of torch's TCPStore"),
        (HELLO + b"\xff", "request 255 of torch's TCPStore is not known here"),
        (HELLO + request(Query.SET, number(KEY_LIMIT + 1)), "a key of"),
        (HELLO + request(Query.SET, text(b"a"), number(VALUE_LIMIT + 1)), "a value of"),
        (HELLO + request(Query.WAIT, number(COUNT_LIMIT + 1)), "a list of"),
        (HELLO + request(Query.GET, text(b"nowhere")), "there is no key b'nowhere'"),
        (HELLO + request(Query.SET, text(b"a"), text(b"x")) + request(Query.ADD, text(b"a"), number(1)), "invalid"),
        (HELLO + 2 * request(Query.ADD, text(b"a"), number(2**63 - 1)), "key b'a' would become"),
    ],
)
def test_request_that_does_not_fit_is_refused_with_a_sentence(data: bytes, message: str) -> None:
    one, _ = client(Keys())
    with pytest.raises(ValueError, match=message):
        one.feed(data)


def test_keys_and_values_are_bounded_in_all_and_replaced_ones_do_not_count() -> None:
    keys = Keys(size_limit=100)
    for _ in range(50):
        keys.set(b"key", bytes(60))
        keys.push(b"queue", bytes(20))
        keys.pop(b"queue")
    with pytest.raises(ValueError, match="more than 100 bytes"):
        keys.set(b"more", bytes(60))
    assert keys.names() == [b"key"]
    keys.delete(b"key")
    keys.set(b"more", bytes(60))


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=20))), st.integers(1, 7))
def test_entries_of_a_message_come_back_and_a_cut_message_is_refused(
    given_entries: list[tuple[int, bytes]], missing: int
) -> None:
    message = b"".join(entry(number, data) for number, data in given_entries)
    assert list(entries(message)) == given_entries
    if message:
        with pytest.raises(ValueError, match="ends within an entry"):
            list(entries(message[:-missing]))


def test_foretold_answer_comes_back_and_a_cut_one_is_refused() -> None:
    assert foretold(foretell(b"request", b"answer")) == (b"request", b"answer")
    with pytest.raises(ValueError, match="ends within an entry"):
        foretold(b"123")


def test_answer_to_what_follows_a_wait_is_foretold_as_it_would_be() -> None:
    keys = Keys()
    told: list[tuple[bytes, bytes]] = []
    answers: list[bytes] = []
    one = Client(keys, answers.append, lambda request, answer: told.append((request, answer)))
    one.feed(HELLO + request(Query.WAIT, number(1), text(b"a")))
    assert told == []
    keys.set(b"a", b"1")
    keys.push(b"queue", b"2")
    one.feed(request(Query.WAIT, number(2), text(b"a"), text(b"a")) + request(Query.WAIT, number(1), text(b"queue")))
    assert answers == [b"\0"] * 3
    assert [said[0] for said, _ in told] == [Query.GET, Query.MULTI_GET]
    for said, answer in told:
        one.feed(said)
        assert answers.pop() == answer


def test_client_that_has_gone_is_not_answered() -> None:
    keys = Keys()
    gone, answers = client(keys)
    gone.feed(HELLO + request(Query.WAIT, number(1), text(b"a")))
    gone.close()
    keys.set(b"a", b"")
    assert answers == []


def test_callers_that_gave_up_or_were_served_leave_nothing_behind() -> None:
    keys, told = Keys(), list[str]()
    waiters = [Waiter(lambda: told.append("waited")) for _ in range(2)]
    arrived, queued = Waiter(lambda: told.append("arrived")), Waiter(lambda: told.append("pushed"))
    for waiter in waiters:
        keys.wait([b"never", b"also never"], waiter)
    keys.arrive(b"barrier", 2, arrived)
    keys.wait([b"queue"], queued)
    keys.push(b"queue", b"1")
    keys.cancel(waiters[0])
    assert keys._waiting.keys() == {b"never", b"also never"}
    keys.cancel(waiters[1])
    keys.cancel(arrived)
    assert (keys._waiting, keys._barriers) == ({}, {})
    keys.arrive(b"barrier", 2, Waiter(lambda: told.append("arrived")))
    assert told == ["pushed", "arrived"]
