"""Majorities and votes: of two parts of a run at most one may go on."""

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.launch.node import slot_table
from keepwarm.launch.node.slot_table import Known, RequestedSlot, Table
from keepwarm.launch.node.view import (
    Ballot,
    Member,
    View,
    Voter,
    identity,
    is_majority,
    may_be_installed,
    missing,
    name_of,
    outbid,
    tally,
    verdict,
)

HISTORIES, MOVES = 60, 1500


def member(node: str) -> Member:
    return Member(node=node, host="127.0.0.1", port=1)


def view(*nodes: str, number: tuple[int, int] = (0, 1)) -> View:
    return View(number=number, members={slot: member(node) for slot, node in enumerate(nodes)})


def test_majority_tie_goes_to_the_half_with_the_lowest_slot() -> None:
    four = view("a", "b", "c", "d")
    assert is_majority(four, "acd")
    assert is_majority(four, "ad")
    assert not is_majority(four, "bc")
    assert not is_majority(four, "a")
    assert is_majority(view("a", "b"), "a")
    assert not is_majority(view("a", "b"), "b")


@given(st.integers(1, 7), st.data())
def test_majority_never_on_both_sides(count: int, data: st.DataObject) -> None:
    nodes = [f"n{index}" for index in range(count)]
    here = data.draw(st.sets(st.sampled_from(nodes)))
    assert is_majority(view(*nodes), here) + is_majority(view(*nodes), set(nodes) - here) == 1


@pytest.mark.parametrize(
    ("here", "dead", "expected"),
    [
        ("abc", "", "go"),
        ("cde", "", "go"),
        ("de", "", "wait"),  # a, b and c may go on
        ("de", "a", "claim"),  # b and c are not enough either
        ("de", "abc", "go"),
        ("e", "abcd", "go"),
        ("", "abcd", "wait"),  # e goes on, and needs no claim
        ("", "abcde", "claim"),  # spares, of which there may be several
        ("", "", "wait"),
    ],
)
def test_verdict_with_five_owners(here: str, dead: str, expected: str) -> None:
    assert verdict([view(*"abcde")], here, dead) == expected


def test_verdict_needs_every_view_that_may_be_installed() -> None:
    old, new = view(*"abc"), view("f", "b", "c", number=(0, 2))
    assert verdict([old, new], "bc", "") == "go"
    assert verdict([old, new], "ab", "") == "wait"
    assert missing([old, new], "ab", "") == ["c", "f"]
    assert may_be_installed(old, (new, None)) == (old, new)
    assert may_be_installed(new, (old,)) == (new,)
    assert may_be_installed(None, (new,)) == ()


def test_identity_names_a_node_and_its_start() -> None:
    assert name_of(identity("gpu-7", "3f")) == "gpu-7"
    assert identity("gpu-7", "3f") != identity("gpu-7", "40")
    assert name_of("gpu-7") == "gpu-7"


def test_vote_once_for_a_number_and_not_while_a_store_is_followed() -> None:
    five = view(*"abcde")
    voter = Voter(node="b", installed=five)
    ballot = Ballot(number=1, candidate="a", installed=five, accepted=None)
    rival = Ballot(number=1, candidate="c", installed=five, accepted=None)
    assert voter.vote(ballot).granted
    assert voter.vote(ballot).granted, "its answer may have been lost"
    assert not voter.vote(rival).granted
    assert voter.vote(Ballot(number=2, candidate="c", installed=five, accepted=None)).granted
    assert not voter.vote(ballot).granted
    voter.follows = True
    assert not voter.vote(Ballot(number=3, candidate="c", installed=five, accepted=None)).granted


def test_vote_never_for_a_node_that_knows_an_older_view() -> None:
    old, new = view(*"abc"), view("f", "b", "c", number=(0, 2))
    voter = Voter(node="b", installed=old)
    voter.accept(new)
    assert not voter.vote(Ballot(number=1, candidate="a", installed=old, accepted=None)).granted
    assert voter.vote(Ballot(number=1, candidate="c", installed=old, accepted=new)).granted
    voter.learn(new)
    vote = voter.vote(Ballot(number=5, candidate="a", installed=old, accepted=None))
    assert (vote.granted, vote.installed) == (False, new)


def test_tally_counts_the_candidate_and_not_the_silent() -> None:
    five, yes = view(*"abcde"), Voter(node="b", installed=view(*"abcde"))
    vote = yes.vote(Ballot(number=1, candidate="a", installed=five, accepted=None))
    assert tally([five], {"b": vote, "c": "silent"}, "a") == "wait"
    assert tally([five], {"b": vote, "c": "dead"}, "a") == "claim"
    assert tally([five], {"b": vote, "c": "dead", "d": "dead", "e": "dead"}, "a") == "go"


class Election:
    """Owners of one view without a store, each a candidate at drawn times; messages are lost and cross."""

    def __init__(self, owners: str, lost: str) -> None:
        self.view, self.alive = view(*owners), [node for node in owners if node not in lost]
        self.voters = {node: Voter(node=node, installed=self.view) for node in self.alive}
        self.outbid = dict.fromkeys(self.alive, -1)

    def ballot(self, node: str) -> Ballot:
        ballot = self.voters[node].stand(max(0, self.outbid[node]))
        assert ballot is not None
        return ballot

    def ask(self, node: str, ballot: Ballot, others: Iterable[str]) -> bool:
        """Ask others for their votes; return whether the candidate has a majority."""
        answers = {other: self.voters[other].vote(ballot) for other in others if other != node}
        self.outbid[node] = max(self.outbid[node], outbid(ballot, answers))
        return tally([self.view], answers, node) == "go"


@given(st.integers(3, 7), st.data())
def test_owners_that_voted_for_themselves_at_once_elect_one_when_it_asks_again(count: int, data: st.DataObject) -> None:
    owners = "abcdefg"[:count]
    lost = data.draw(st.sets(st.sampled_from(owners), max_size=(count - 1) // 2))
    election = Election(owners, "".join(lost))
    waiting: list[tuple[str, Ballot]] = []
    elected: dict[int, set[str]] = {}
    for node in data.draw(st.lists(st.sampled_from(election.alive), max_size=20)):
        waiting.append((node, election.ballot(node)))
        if data.draw(st.booleans()):
            node, ballot = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            if election.ask(node, ballot, data.draw(st.sets(st.sampled_from(election.alive)))):
                elected.setdefault(ballot.number, set()).add(node)
    assert all(len(nodes) == 1 for nodes in elected.values()), "two nodes may open one store"
    # From here on nothing is lost. The first refusal tells a candidate how high it must go.
    last = data.draw(st.sampled_from(election.alive))
    assert any(election.ask(last, election.ballot(last), election.alive) for _ in range(2))


class Partitions:
    """Stores, nodes that move between them, and owners that change, in random order.

    A store gives up nodes that are elsewhere, at any time or never. A new store inherits the table that some node has
    seen, whatever votes say: votes only keep stores few. A process that has ended is known to be dead at any store.
    """

    NODES = tuple("abcdef")
    SLOTS = 3

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        first = Table(slots=self.SLOTS, max_restarts=999)
        self.tables: dict[int, Table] = {0: first}
        self.claims: dict[object, int] = {}
        """Store that has the claim on the view after each."""
        self.at = dict.fromkeys(self.NODES, 0)
        self.voters = {node: Voter(node=node) for node in self.NODES}
        self.seen = dict.fromkeys(self.NODES, first)
        self.restart = dict.fromkeys(self.NODES, -1)
        self.runs: dict[str, int] = {}
        """Store under which a node runs workers, which are those of the restart in `self.restart`."""
        self.dead: set[str] = set()
        self.replaced = 0
        for node in self.NODES:
            self.join(node)
        for node in self.NODES:
            self.arrive(node)
        for node in self.NODES:
            self.start(node)
        assert len(self.runs) == self.SLOTS

    def join(self, node: str) -> None:
        store, voter = self.at[node], self.voters[node]
        known = Known(restart=self.restart[node], installed=voter.installed, accepted=voter.accepted)
        if known.installed is None or known.installed.number[0] <= store:
            table = slot_table.follow(self.tables[store], member(node), known)
            self.tables[store] = slot_table.join(table, node, "any", seen_restart=known.restart)

    def look(self, node: str) -> None:
        self.seen[node] = self.tables[self.at[node]]
        self.voters[node].learn(self.seen[node].view)
        if self.seen[node].restart != self.restart[node]:
            self.runs.pop(node, None)

    def arrive(self, node: str) -> None:
        seen, store = self.seen[node], self.at[node]
        if seen.store == store and seen.awaits(node):
            self.runs.pop(node, None)
            self.voters[node].accept(seen.proposed)
            if seen.number == self.tables[store].number:
                self.tables[store] = slot_table.arrive(self.tables[store], node, seen.restart)
        table = self.tables[store]
        claims = table.view is not None and slot_table.needs_claim(table)
        if claims and table.view is not None and self.claims.setdefault(table.view.number, store) == store:
            self.tables[store] = slot_table.claim(table)
        self.look(node)
        if self.seen[node].awaits(node) and self.seen[node] is not seen:
            self.arrive(node)

    def start(self, node: str) -> None:
        self.look(node)
        seen = self.seen[node]
        if seen.complete and seen.slot_of(node) is not None and seen.restart > self.restart[node]:
            self.runs[node], self.restart[node] = self.at[node], seen.restart

    def move(self, node: str, store: int) -> None:
        """A node loses its store, ends its workers and follows another one."""
        self.at[node] = store
        self.runs.pop(node, None)
        self.join(node)

    def open(self, node: str) -> None:
        number = max(self.tables) + 1
        self.tables[number] = slot_table.inherit(self.seen[node], number, self.dead)
        self.move(node, number)

    def step(self) -> None:
        store = self.random.choice(sorted(self.tables)[-3:])
        alive = [node for node in self.NODES if node not in self.dead]
        node, kind = self.random.choice(alive), self.random.random()
        if kind < 0.01:
            self.open(node)
        elif kind < 0.06:
            self.move(node, store)
        elif kind < 0.12:
            for other in self.NODES:
                if self.at[other] != store or other in self.dead:
                    table, dead = self.tables[store], other in self.dead
                    self.tables[store] = slot_table.lose(table, other, "silent", 0.0, dead=dead)
            self.tables[store] = slot_table.fill(self.tables[store])
        elif kind < 0.121 and len(alive) > 3:
            self.dead.add(node)
            self.runs.pop(node, None)
        elif kind < 0.14:
            self.tables[store] = slot_table.lose(self.tables[store], node, "silent", 0.0)
        elif self.random.random() < 0.5:
            if self.at[node] in self.tables and not self.tables[self.at[node]].knows(node):
                self.join(node)
            self.arrive(node)
        else:
            self.start(node)

    def check(self) -> None:
        whole = set()
        for store, table in self.tables.items():
            for restart in {self.restart[node] for node, at in self.runs.items() if at == store}:
                running = [node for node, at in self.runs.items() if at == store and self.restart[node] == restart]
                if len(running) == table.slots:
                    whole.add(store)
        assert len(whole) <= 1, f"stores {sorted(whole)} both train"
        self.replaced = max(self.replaced, *whole, 0)


def test_partitions_never_two_sets_of_owners_run() -> None:
    replaced = 0
    for seed in range(HISTORIES):
        history = Partitions(seed)
        for _ in range(MOVES):
            history.step()
            history.check()
        replaced += history.replaced > 0
    assert replaced > HISTORIES / 3, "too few histories train again after a store was replaced"


def arrive_all(table: Table, nodes: Iterable[str]) -> Table:
    for node in nodes:
        table = slot_table.arrive(table, node, table.restart)
    return table


def running(*nodes: str, spares: Iterable[str] = (), sizes: tuple[int, ...] = ()) -> Table:
    table = Table(slots=len(nodes), max_restarts=3, sizes=sizes)
    wanted: list[tuple[str, RequestedSlot]] = [(node, slot) for slot, node in enumerate(nodes)]
    for node, slot in wanted + [(spare, "spare") for spare in spares]:
        table = slot_table.follow(table, member(node), Known())
        table = slot_table.join(table, node, slot)
    return arrive_all(table, nodes)


def test_minority_keeps_slots_vacant_and_gives_nothing_up() -> None:
    table = running("a", "b", "c", "d", spares="s", sizes=(4, 2, 1))
    for node in "bcd":
        table = slot_table.lose(table, node, "silent", 0.0)
    assert table.owners == {0: "a", 1: "s"}, "b alone may be lost"
    assert (table.decides, table.waits_for) == (False, ["b", "c", "d"])
    assert slot_table.shrink(table) == table
    assert slot_table.claim_flush(table, "a") == table
    assert slot_table.fill(slot_table.join(table, "t", "spare")).spares == ("t",)
    assert slot_table.join(table, "t", 2).spares == ("t",)
    assert not arrive_all(table, "as").complete


def test_dead_processes_let_the_others_go_on() -> None:
    table = running("a", "b", "c", "d", sizes=(4, 2, 1))
    for node in "abc":
        table = slot_table.lose(table, node, "gone", 0.0, dead=True)
    assert table.decides
    table = arrive_all(slot_table.shrink(table), "d")
    assert (table.complete, table.owners) == (True, {0: "d"})


def test_claim_decides_between_minorities() -> None:
    table = running("a", "b", "c", spares="s")
    table = slot_table.lose(table, "b", "gone", 0.0, dead=True)
    assert table.owners[1] == "s"
    table = slot_table.join(slot_table.lose(table, "a", "silent", 0.0), "t", "any")
    table = arrive_all(table, "stc")
    assert not table.complete
    assert slot_table.needs_claim(table)
    assert slot_table.claim(table).complete


def test_inherit_keeps_sizes_owners_and_blame_of_a_shrunken_run() -> None:
    table = running("a", "b", "c", "d", sizes=(4, 2, 1))
    table = arrive_all(slot_table.shrink(slot_table.lose(table, "d", "gone", 0.0, dead=True)), "abc")
    assert (table.slots, table.complete, table.spares) == (2, True, ("c",))
    table = slot_table.fail(table, "a", table.restart, "killed", "it broke", 1.0)
    table = arrive_all(table, "abc")
    after = slot_table.inherit(table, 7, ["b"])
    assert (after.slots, after.owners, after.spares) == (2, {0: "a", 1: "b"}, ("c",))
    assert (after.attributed, after.charged_restarts, after.restart) == ({"a": (1.0,)}, 1, table.restart + 1)
    assert (after.resized, after.absent, after.dead) == (False, ("a", "b", "c"), ("b",))
    assert after.view == table.view
    late = slot_table.follow(after, member("c"), Known(attributed={"b": (2.0,)}, excluded={"x": "why"}))
    assert (late.attributed, late.excluded) == ({"a": (1.0,), "b": (2.0,)}, {"x": "why"})


def test_two_starts_of_one_name_are_not_the_same_node() -> None:
    table = running(identity("gpu-7", "1"), identity("gpu-8", "1"))
    assert slot_table.namesake(table, identity("gpu-7", "2")) == identity("gpu-7", "1")
    assert slot_table.namesake(table, identity("gpu-7", "1")) is None


def test_accepted_view_is_needed_wherever_its_owner_goes() -> None:
    """b accepts s for a, and then follows a: s, c and b may go on under the first store without hearing of that."""
    first = running("a", "b", "c", spares="s")
    after = slot_table.lose(first, "a", "silent", 0.0)
    assert after.owners == {0: "s", 1: "b", 2: "c"}
    b = Voter(node="b", installed=first.view)
    b.accept(after.proposed)
    second = slot_table.join(slot_table.inherit(first, 1, ()), "a", 0)
    known = Known(restart=0, installed=b.installed, accepted=b.accepted)
    second = slot_table.join(slot_table.follow(second, member("b"), known), "b", 1)
    assert second.accepted == (after.proposed,)
    for node in "cs":
        second = slot_table.lose(second, node, "silent", 0.0)
    assert (second.decides, second.waits_for) == (False, ["c", "s"])
    assert slot_table.follow(slot_table.inherit(first, 1, ()), member("b"), Known(installed=first.view)).accepted == ()


def test_replacement_is_installed_when_a_majority_has_accepted_that_very_one() -> None:
    table = slot_table.lose(running("a", "b", "c", spares="st"), "a", "silent", 0.0)
    table = slot_table.lose(arrive_all(table, "bc"), "s", "silent", 0.0)
    assert (table.owners[0], table.arrived) == ("t", ())
    assert not arrive_all(table, "tb").complete
    assert arrive_all(table, "tbc").complete
