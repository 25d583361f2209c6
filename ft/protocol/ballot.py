"""Votes on what an epoch restores. The choice for which a majority of the slots has voted stands, without any file.

Each slot votes once in an epoch, for the first choice that it is asked about, and its next agent with the same memory
knows for which: two choices of one epoch never have a majority both. A slot that loses its memory in the middle of an
epoch forgets its vote; its workers then begin another epoch.
"""

import msgspec
import xxhash

from keepwarm.ft.protocol.messages import Choice, Vote


def digest_of(choice: Choice) -> int:
    """Return the number by which votes name a choice."""
    return xxhash.xxh3_64_intdigest(msgspec.msgpack.encode(choice))


class Ballot:
    """The votes of one epoch at a time, as one slot knows them. No clock and no link."""

    def __init__(self, slots: int, cast: Vote | None) -> None:
        """`cast` is the last vote of this slot that its memory tells of."""
        self.majority = slots // 2 + 1
        self.cast = cast
        """The last vote of this slot."""
        self.proposal: Choice | None = None
        """What this slot asks the others to vote for."""
        self._epoch = 0
        self._known: dict[int, Choice] = {}
        self._votes: dict[int, int] = {}

    def begin(self, epoch: int) -> None:
        self._epoch, self.proposal, self._known, self._votes = epoch, None, {}, {}

    def vote(self, choice: Choice) -> Vote:
        """Return this slot's vote, which is for `choice` if it has not voted in the epoch."""
        digest = digest_of(choice)
        self._known[digest] = choice
        if self.cast is None or self.cast.epoch != self._epoch:
            self.cast = Vote(epoch=self._epoch, digest=digest)
        return self.cast

    def propose(self, choice: Choice) -> Choice:
        """Return what to ask the others to vote for: what this slot has voted for, as far as it knows that."""
        vote = self.vote(choice)
        self.proposal = self._known.get(vote.digest, choice)
        return self.proposal

    def count(self, slot: int, vote: Vote) -> Choice | None:
        """Count a vote. Return the choice for which a majority has voted, if there is one and this slot knows it."""
        if vote.epoch != self._epoch:
            return None
        self._votes[slot] = vote.digest
        agreed = sum(digest == vote.digest for digest in self._votes.values())
        return self._known.get(vote.digest) if agreed >= self.majority else None
