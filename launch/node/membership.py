"""One node's link to the store: find it or open the next one, send heartbeats, read and change the table.

A supervisor that has no store must stop its workers: every method then raises `StoreLost`. A store is followed only if
a majority of the owners of the last view does so (`keepwarm.launch.node.view`); a node that is cut off waits, and opens
none.
"""

import contextlib
import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from keepwarm.exit_code import ExitCode
from keepwarm.files import within
from keepwarm.launch.errors import LaunchError
from keepwarm.launch.node import record as node_record
from keepwarm.launch.node.connections import Dialled
from keepwarm.launch.node.heartbeat import Heartbeat
from keepwarm.launch.node.peers import (
    CONNECT_TIMEOUT_S,
    PeerListener,
    announce,
    collect_votes,
    stand_of,
    stands_of,
    stores_of,
)
from keepwarm.launch.node.record import EndRecord, StoreRecord
from keepwarm.launch.node.shared_table import Answer, Change, Hello, Request, Stand, Update
from keepwarm.launch.node.slot_table import Known, Table, inherit
from keepwarm.launch.node.view import Member, Number, Vote, missing, name_of, outbid, tally

OPENING_TIMEOUT_S = 60.0
"""How long the supervisor that opens a store may take."""
SEARCH_TIMEOUT_S = 300.0
"""How long a node looks for a store that it can follow."""
LEFTOVER_TIMEOUT_S = 15.0
"""How long a node that has no view waits for silent processes of an earlier start, before it opens the next store."""
STORE_POLL_INTERVAL_S = 0.05
LOOK_INTERVAL_S = 1.0
"""How often a node without a store, or whose store decides nothing, asks others for theirs."""
TURN_S = 0.5
"""How much later than the owner before it each owner tries to open the next store."""
TURNS = 16
"""Owners after these do not wait any longer."""
GRANTED_S = 5.0
"""How long an owner leaves the next store to the one for which it has voted."""
ASKED_AT_ONCE = 4
RECEIVE_TIMEOUT_S = 0.5
FILES_TIMEOUT_S = 2.0


class StoreLost(LaunchError):
    """The store has died, does not answer, or was replaced."""

    exit_code = ExitCode.UNRECOVERABLE


class RunEnded(LaunchError):
    """The run has ended under a store that this node cannot reach."""

    def __init__(self, end: EndRecord) -> None:
        super().__init__(end.reason)
        self.exit_code = end.code


class Membership:
    """Link to the store that this node follows. `change` and `read` may be called from any thread."""

    def __init__(
        self, folder: Path, me: Member, first: Table, *, peer_timeout: float, peers: PeerListener,
        open_store: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Create an unconnected link.

        Args:
            folder: of the run.
            me: this node.
            first: the table of the first store.
            peer_timeout: seconds without an answer after which the store counts as lost.
            peers: answers the other supervisors.
            open_store: starts the process of the n-th store of the run on this node.
        """
        self.folder, self.me, self.node, self._peer_timeout = folder, me, me.node, peer_timeout
        self._peers, self._open_store, self._secret = peers, open_store, peers.secret
        self.record: StoreRecord | None = None
        self._table = first
        """The last table that this node has seen; it survives the store."""
        self._first_store: int | None = None
        self._heartbeat: Heartbeat | None = None
        self._link: _TableLink | None = None
        self._replaced = self._said = ""
        self._outbid = -1
        """The highest number that owners have promised to others while this node was a candidate."""
        self._turn = itertools.count()
        self._lock = threading.Lock()
        threading.Thread(target=self._look_for_better, name="look-for-store", daemon=True).start()

    # ---- finding a store

    def enter(self, patience: Callable[[], float] = lambda: SEARCH_TIMEOUT_S) -> None:
        """Follow the store that a majority follows, or open the next one with the votes of a majority.

        Raises:
            RunEnded: the run ended under a store that other nodes could reach.
            StoreLost: there was none for `patience` seconds, which is asked again and again and may raise.
        """
        self.leave(farewell=False)
        began = looked = time.monotonic()
        known = self._peers.voter.installed is not None
        turn, pause = began + (self._patience() if known else 0.0), STORE_POLL_INTERVAL_S
        granted = self._peers.voter.promised
        while time.monotonic() < began + patience():
            announced, known = self._newly_announced(), self._peers.voter.installed is not None
            if announced is not None and self._reach(announced):
                return
            if (before := time.monotonic()) >= looked:
                self.check_end()
                found = self._best()
                if found is not None and self._reach(found):
                    return
                looked = time.monotonic() + (LOOK_INTERVAL_S if known else 2 * STORE_POLL_INTERVAL_S)
                if known and before < turn <= time.monotonic():
                    # All have looked for as long, at silent nodes: their turns must not coincide.
                    turn = time.monotonic() + self._patience()
                    looked = max(looked, turn + STORE_POLL_INTERVAL_S)
            voter = self._peers.voter  # looking takes time in which this node may have voted
            if voter.promised != granted and voter.candidate != self.node:
                granted, turn = voter.promised, time.monotonic() + GRANTED_S + self._patience()
            if time.monotonic() >= turn:
                if self._elect() if known else self._open_first(time.monotonic() - began):
                    return
                pause = min(2 * pause, LOOK_INTERVAL_S)
                # An owner that another one has voted for may be opening its store.
                rest = GRANTED_S if self._outbid >= self._peers.voter.promised else LOOK_INTERVAL_S
                turn = time.monotonic() + (rest + self._patience() if known else pause)
            time.sleep(STORE_POLL_INTERVAL_S)
        raise StoreLost(
            f"{name_of(self.node)} found no store to follow in {time.monotonic() - began:.0f} s"
            + (f"; {self._said}" if self._said else "")
        )

    def _newly_announced(self) -> StoreRecord | None:
        """Return the store that was announced to this node, if it is later than all that the node knows of."""
        announced, voter = self._peers.announced, self._peers.voter
        if announced is None or voter.installed is None:
            return None
        # A node whose own candidacy found no majority follows the one that did: majorities decide, not numbers.
        promised = -1 if voter.candidate == self.node else voter.promised
        left = -1 if self.record is None else self.record.number
        later = announced.number > left and announced.number >= max(promised, voter.installed.number[0])
        return announced if later else None

    def _patience(self) -> float:
        """Return how long this node leaves the next store to the owners before it."""
        view = self._peers.voter.installed
        nodes = [] if view is None else [view.members[slot].node for slot in sorted(view.members)]
        place = nodes.index(self.node) if self.node in nodes else TURNS
        return min(place, TURNS) * TURN_S

    def _best(self) -> StoreRecord | None:
        """Return the store that others follow and that decides, as far as this node can find one."""
        installed = self._peers.voter.installed
        mine = None if installed is None else installed.number
        found: dict[tuple[int, int], StoreRecord] = {}
        members = [] if installed is None else [one for one in installed.members.values() if one.node != self.node]
        start = next(self._turn) * ASKED_AT_ONCE
        some = [members[(start + step) % len(members)] for step in range(min(ASKED_AT_ONCE, len(members)))]
        stores, _ = stores_of(self._secret, {one.node: (one.host, one.port) for one in some})
        hints = within(lambda: node_record.stores(self.folder)[:ASKED_AT_ONCE], FILES_TIMEOUT_S) or []
        announced = self._peers.announced
        for record in (*stores, *hints, *([announced] if announced else []), *([self.record] if self.record else [])):
            found[record.number, record.heartbeat_port] = record
        stands = stands_of(self._secret, found.values())
        worth = [(_rank(stand), record) for stand, record in stands if _is_followed(stand, mine)]
        return max(worth, key=lambda each: each[0], default=(None, None))[1]

    def _open_first(self, waited: float) -> bool:
        """Open a store for a run without a view, unless processes of an earlier start may live; return success."""
        newest = within(lambda: node_record.newest_claim(self.folder), FILES_TIMEOUT_S)
        if newest is None:
            return False
        if newest >= 0:
            known = within(lambda: node_record.stores(self.folder), FILES_TIMEOUT_S)
            opening = not known or known[0].number < newest
            if waited < OPENING_TIMEOUT_S and (opening or not known):
                return False
            if waited < LEFTOVER_TIMEOUT_S and not self._all_gone(known or []):
                return False
        if not within(lambda: node_record.claim_store(self.folder, newest + 1), FILES_TIMEOUT_S):
            return False
        return self._open(newest + 1, msgspec.structs.replace(self._table, store=newest + 1))

    def _all_gone(self, stores: list[StoreRecord]) -> bool:
        """Return whether the machines of an earlier start's store and supervisors say that these have ended."""
        records = within(lambda: node_record.read_all(self.folder), FILES_TIMEOUT_S) or []
        others = [one for one in records if one.port and (one.host, one.port) != (self.me.host, self.me.port)]
        asked = {one.node: (one.host, one.port) for one in others[-ASKED_AT_ONCE * 4 :]}
        alive, why = stores_of(self._secret, asked)
        living = any(reason in ("silent", "elects") for reason in why.values())
        return not alive and not living and self._stand_of(stores[0]) == "refused"

    def _elect(self) -> bool:
        """Open the next store if the owners of the last view let this node; return whether they did."""
        above = max(self.record.number if self.record else -1, self._table.store, self._outbid)
        ballot = self._peers.candidacy(above)
        voter = self._peers.voter
        if ballot is None or voter.installed is None:
            return False
        members = {one.node: one for view in voter.views for one in view.members.values()}
        answers = collect_votes(self._secret, ballot, members, voter)
        for vote in answers.values():
            if isinstance(vote, Vote) and vote.installed is not None:
                return False  # that node knows more, and will open it
        self._outbid = max(self._outbid, outbid(ballot, answers))
        mine = {self.node} & members.keys()
        granted = mine | {node for node, vote in answers.items() if isinstance(vote, Vote) and vote.granted}
        dead = {node for node, vote in answers.items() if vote == "dead"}
        if dead:
            self.check_end()  # they have recorded the end before they went
        decided = tally(voter.views, answers, self.node)
        if decided == "wait":
            self._say(f"waits for {', '.join(missing(voter.views, granted, dead))}: they may go on without this node")
            return False
        if decided == "claim" and not within(
            lambda: node_record.claim_view(self.folder, voter.views[0].number, self.node), FILES_TIMEOUT_S
        ):
            self._say(f"could not claim the run: another node may have, or {self.folder} is not writable")
            return False
        table = inherit(self._table, ballot.number, dead)
        return self._open(ballot.number, msgspec.structs.replace(table, claimed=decided == "claim"))

    def _open(self, number: int, table: Table) -> bool:
        self._peers.expect(number, table)
        self._open_store(number)
        record = self._peers.opened(number, OPENING_TIMEOUT_S)
        if record is None or not self._reach(record):
            self._say(f"store {number} did not open on this node")
            return False
        told = (self._secret, record, table.members, self.node)
        threading.Thread(target=announce, args=told, daemon=True).start()
        return True

    def _reach(self, record: StoreRecord) -> bool:
        try:
            self._heartbeat = Heartbeat(self._secret, record, self.node, self._peer_timeout, CONNECT_TIMEOUT_S)
            self._link = _TableLink(self._secret, record, self.node, max(5.0, self._peer_timeout), self._on_table)
        except OSError:
            self.leave(farewell=False)
            return False
        self.record, self._replaced, self._said = record, "", ""
        if self._first_store is None:
            self._first_store = record.number
        self._peers.follow(record)
        return True

    def _stand_of(self, store: StoreRecord) -> Stand | str:
        return stand_of(self._secret, store)

    def _look_for_better(self) -> None:
        """While this node's store decides nothing, or another one was announced, look whether others follow another."""
        while True:
            time.sleep(LOOK_INTERVAL_S)
            record, link, announced = self.record, self._link, self._peers.announced
            if record is None or link is None or self._replaced:
                continue
            newer = announced is not None and announced.number > record.number
            decides = link.table.decides and link.table.view is not None
            if decides and not newer:
                continue
            if announced is not None and newer and not decides and isinstance(self._stand_of(announced), Stand):
                # Two stores were opened at once: all go to the later one.
                self._replaced = f"store {announced.number} was opened after store {record.number}"
                continue
            found = self._best()
            if found is not None and found.number != record.number and self.record is record:
                stand = self._stand_of(found)
                if isinstance(stand, Stand) and stand.view is not None and stand.decides:
                    self._peers.hear_of(found)
                    self._replaced = f"store {found.number} has replaced store {record.number}"

    def check_end(self) -> None:
        """Raise `RunEnded` if nodes that could decide have ended the run since this node first had a store."""
        if self._first_store is None:
            return
        end = within(lambda: node_record.read_end(self.folder), FILES_TIMEOUT_S)
        if end is not None and end.number >= self._first_store:
            raise RunEnded(end)

    def record_end(self, code: int, reason: str) -> None:
        """Record the end of the run under this node's store, for nodes that cannot reach it."""
        assert self.record is not None
        end = EndRecord(number=self.record.number, code=code, reason=reason)
        within(lambda: node_record.write_end(self.folder, end), FILES_TIMEOUT_S)

    # ---- the table

    @property
    def outdated(self) -> bool:
        """Whether owners have installed a view under a later store than this node's."""
        installed = self._peers.voter.installed
        return self.record is not None and installed is not None and installed.number[0] > self.record.number

    def change(self, change: Change) -> tuple[Table, bool]:
        """Ask for a change of the table; return (the table afterwards, whether this changed it).

        Raises:
            StoreLost: there is no answer.
            ChangeRefused: the store refuses; with its reason.
        """
        with self._lock:
            link = self._link
            if link is None:
                raise StoreLost(f"{name_of(self.node)}: not connected to a store")
            number = link.ask(change)
            while not self._why_lost():
                if (answer := link.answer(number, STORE_POLL_INTERVAL_S)) is not None:
                    if answer.refused:
                        raise ChangeRefused(answer.refused)
                    return link.table, answer.changed
            raise StoreLost(f"{name_of(self.node)}: {self._why_lost()}")

    def read(self) -> Table:
        """Return the table as it is known here; the store sends it when it changes."""
        link = self._link
        if link is None:
            raise StoreLost(f"{name_of(self.node)}: not connected to a store")
        if why := self._why_lost():
            raise StoreLost(f"{name_of(self.node)}: {why}")
        return link.table

    def known(self, restart: int) -> Known:
        """Return what this node brings to a store, having started workers for `restart`."""
        voter, table = self._peers.voter, self._table
        return Known(
            restart=restart, charged_restarts=table.charged_restarts, attributed=table.attributed,
            excluded=table.excluded, installed=voter.installed, accepted=voter.accepted,
        )  # fmt: skip

    def accept(self, table: Table) -> None:
        """Remember the owners in a table before arriving: they may be installed without this node hearing of it."""
        self._peers.accept(table)

    def leave(self, *, farewell: bool) -> None:
        """Disconnect. With a farewell this node leaves the run."""
        self._peers.follow(None)
        if self._heartbeat is not None:
            self._heartbeat.close(farewell=farewell)
        if self._link is not None:
            self._link.close()
        self._heartbeat = self._link = None

    def _why_lost(self) -> str:
        heartbeat, link = self._heartbeat, self._link
        if heartbeat is None or link is None:
            return "not connected to a store"
        return self._replaced or heartbeat.lost or link.lost

    def _on_table(self, table: Table) -> None:
        if table.store >= self._table.store:
            self._table = table
        self._peers.learn(table)

    def _say(self, text: str) -> None:
        if text != self._said:
            self._said = text
            print(f"keepwarm: {name_of(self.node)}: {text}", file=sys.stderr, flush=True)


class ChangeRefused(LaunchError):
    """The store does not make a change; the message says why."""


def _rank(stand: Stand) -> tuple[bool, Number, int]:
    return stand.decides, stand.view or (-1, -1), stand.number


def _is_followed(stand: Stand, mine: Number | None) -> bool:
    """Return whether a store may be followed by a node whose last view is `mine`."""
    return mine is None or (stand.decides and stand.view is not None and stand.view >= mine)


class _TableLink:
    """Connection for the table: requests and answers, and the table whenever it has changed."""

    def __init__(
        self, secret: bytes, record: StoreRecord, node: str, timeout: float, on_table: Callable[[Table], None]
    ) -> None:
        """Connect; return once the table has arrived. Raises `OSError`."""
        self.lost = ""
        self._number, self._on_table = 0, on_table
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        address = record.host, record.heartbeat_port
        self._connection = Dialled(secret, address, connect_timeout=CONNECT_TIMEOUT_S, timeout=timeout)
        first: queue.SimpleQueue[Table] = queue.SimpleQueue()
        self._first: queue.SimpleQueue[Table] | None = first
        try:
            self._connection.send(Hello(node=node, heartbeat=False))
            threading.Thread(target=self._run, name="table", daemon=True).start()
            self.table = first.get(timeout=timeout)
        except (OSError, queue.Empty) as error:
            self.close()
            raise ConnectionError(f"store {record.number} sends no table") from error

    def ask(self, change: Change) -> int:
        """Send a request; return its number."""
        self._number += 1
        try:
            self._connection.send(Request(number=self._number, change=change))
        except OSError as error:
            self.lost = self.lost or f"the connection to the store was lost: {error}"
        return self._number

    def answer(self, number: int, timeout: float) -> Answer | None:
        """Return the answer to a request, waiting at most `timeout`; drop those to earlier ones."""
        with contextlib.suppress(queue.Empty):
            answer = self._answers.get(timeout=timeout)
            return answer if answer.number == number else None
        return None

    def close(self) -> None:
        self._connection.close()

    def _run(self) -> None:
        decoder = msgspec.json.Decoder(Update | Answer)
        try:
            while True:
                if (message := self._connection.receive(RECEIVE_TIMEOUT_S)) is not None:
                    self._take(decoder.decode(message))
        except (OSError, ValueError) as error:
            self.lost = self.lost or f"the connection to the store was lost: {error}"
        self._connection.close()

    def _take(self, message: Update | Answer) -> None:
        if isinstance(message, Answer):
            self._answers.put(message)
            return
        self.table = message.table
        self._on_table(message.table)
        if self._first is not None:
            self._first.put(message.table)
            self._first = None
