"""Votes on what an epoch restores. A choice for which enough slots have voted stands, without any file.

Each slot votes once in an epoch, for the first choice that it is asked about, and its next agent with the same memory
knows for which. An agent whose memory is empty may have a predecessor that has voted: until it has followed a choice
that names it, its votes are those of a `new` one. A choice stands with the votes of

- a majority of the slots, of which at least half of all slots are not new; or
- all slots.

So no two agents follow different choices of one epoch, unless more than half of the slots forget their votes in it.
That this is so although a new agent becomes an old one takes two more rules: a slot votes only for a choice that names
an agent of it, a new one only for one that names itself; and none votes for a choice that names an agent of another
slot of which it has voted for, or followed, a later one. `tests/model_checker/ballot.pml` checks all three.
"""

import msgspec
import xxhash

from keepwarm.ft.protocol.messages import Choice, Vote

ABSTAINS = 0
"""In place of a digest: the slot must not vote for what it was asked about."""


def digest_of(choice: Choice) -> int:
    """Return the number by which votes name a choice."""
    return xxhash.xxh3_64_intdigest(msgspec.msgpack.encode(choice))


class Promises(msgspec.Struct, frozen=True):
    """What the next agent with the same memory has to know."""

    vote: Vote | None = None
    """The last vote of the slot."""
    latest: tuple[int, ...] = ()
    """The highest incarnation of every slot in the choices that it has voted for or followed."""


class Ballot:
    """The votes of one epoch at a time, as one slot knows them. No clock and no link."""

    def __init__(self, slot: int, slots: int, incarnation: int, promises: Promises) -> None:
        """`promises` are those of the agents before with the same memory."""
        self.majority = slots // 2 + 1
        self._slot, self._slots, self._incarnation = slot, slots, incarnation
        self.promises = promises
        self.proposal: Choice | None = None
        """What this slot asks the others to vote for."""
        self._epoch = 0
        self._new = True
        self._known: dict[int, Choice] = {}
        self._votes: dict[int, Vote] = {}

    def begin(self, epoch: int, *, new: bool) -> None:
        """Begin an epoch. `new` is whether this memory has not followed any choice yet."""
        self._epoch, self._new = epoch, new
        self.proposal, self._known, self._votes = None, {}, {}

    def vote(self, choice: Choice) -> Vote:
        """Return this slot's vote, which is for `choice` if it has not voted in the epoch and may."""
        digest = digest_of(choice)
        self._known[digest] = choice
        cast = self.promises.vote
        if cast is None or cast.epoch != self._epoch:
            if not self._may(choice.decision.incarnations):
                return Vote(epoch=self._epoch, digest=ABSTAINS, new=True)
            cast = Vote(epoch=self._epoch, digest=digest, new=self._new)
            self.promises = msgspec.structs.replace(self.promises, vote=cast)
            self.follow(choice)
        return cast

    def _may(self, named: tuple[int, ...]) -> bool:
        """Return whether this slot may vote for a choice that names these incarnations; 0 is none."""
        if len(named) != self._slots or not 0 < named[self._slot] <= self._incarnation:
            return False
        if self._new and named[self._slot] != self._incarnation:
            return False
        known = self.promises.latest or (0,) * self._slots
        return not any(0 < incarnation < latest for incarnation, latest in zip(named, known, strict=True))

    def follow(self, choice: Choice) -> None:
        """Remember which agents a choice names that this slot votes for, or that stands."""
        named, known = choice.decision.incarnations, self.promises.latest or (0,) * self._slots
        if len(named) == len(known):
            latest = tuple(map(max, named, known))
            self.promises = msgspec.structs.replace(self.promises, latest=latest)

    def propose(self, choice: Choice) -> Choice:
        """Return what to ask the others to vote for: what this slot has voted for, as far as it knows that."""
        vote = self.vote(choice)
        self.proposal = self._known.get(vote.digest, choice)
        return self.proposal

    def count(self, slot: int, vote: Vote) -> Choice | None:
        """Count a vote. Return the choice that stands by the votes, if there is one and this slot knows it."""
        if vote.epoch != self._epoch:
            return None
        self._votes[slot] = vote
        return self._known.get(vote.digest) if self._enough(vote.digest) else None

    def _enough(self, digest: int) -> bool:
        votes = [vote for vote in self._votes.values() if vote.digest == digest]
        old = sum(not vote.new for vote in votes)
        return len(votes) == self._slots or (len(votes) >= self.majority and old >= self._slots - self._slots // 2)

    def too_few(self, connected: set[int]) -> bool:
        """Return whether the proposal does not stand although all connected slots, this one included, agree on it."""
        return self._answered(connected) and not self._opposed(connected)

    def hopeless(self, connected: set[int]) -> bool:
        """Return whether the proposal does not stand and one of the connected slots will never vote for it."""
        return self._answered(connected) and self._opposed(connected)

    def _answered(self, connected: set[int]) -> bool:
        return self.proposal is not None and connected <= self._votes.keys()

    def _opposed(self, connected: set[int]) -> bool:
        digest = digest_of(self.proposal) if self.proposal is not None else ABSTAINS
        return any(self._votes[slot].digest != digest for slot in connected)
