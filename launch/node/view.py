"""Which nodes may decide for a run: views, majorities and votes for the next store. Pure and torch-free.

A *view* maps every slot to the node that owns it: the name of the node with the identifier of that start of its
supervisor, and the address at which the supervisor listens. The owners of view v install view v+1: a majority of them
must accept it, by arriving for a restart under it. So of two parts of a run at most one goes on.

- A tie is a majority for the half that has the lowest slot.
- An owner whose process is known to be dead decides nothing, and silence is not death. If neither the owners here nor
  the silent ones can be a majority, the node that creates the claim on the next view goes on. Nodes that never were
  owners claim nothing while an owner is silent: it goes on without a claim if it knows that the others are dead.
- An owner remembers the view that it has accepted last, as it may have been installed. Wherever the owner goes, the
  majority of that view is needed as well.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import msgspec

Number = tuple[int, int]
"""Number of a view: the store under which it was proposed, and the number of its proposal. Later ones are larger."""
Verdict = Literal["go", "claim", "wait"]
"""go: these owners decide; claim: so does the node that claims the next view; wait: others may decide."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A supervisor, and where it listens for the others."""

    node: str
    """Name and start: see `identity`."""
    host: str
    port: int
    domain: str = ""
    """Failure domain: nodes of one may be lost at once. Empty: it is a domain of its own."""


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The owners of all slots."""

    number: Number
    members: dict[int, Member]
    """By slot."""

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset(member.node for member in self.members.values())


def identity(name: str, start: str) -> str:
    """Return what stands for one start of a node's supervisor; the name alone owns nothing."""
    return f"{name}#{start}"


def name_of(node: str) -> str:
    """Return the name of a node from its identity."""
    return node.partition("#")[0]


def is_majority(view: View, nodes: Collection[str]) -> bool:
    """Return whether these nodes are more than half of a view's owners, or the half with the lowest slot."""
    here = [slot for slot, member in view.members.items() if member.node in nodes]
    return 2 * len(here) > len(view.members) or (2 * len(here) == len(view.members) and min(view.members) in here)


def verdict(views: Iterable[View], here: Collection[str], dead: Collection[str]) -> Verdict:
    """Return whether the owners in `here` decide in all of these views; `dead` processes have certainly ended."""
    found: Verdict = "go"
    for view in views:
        owners = view.nodes & set(here)
        silent = view.nodes - owners - set(dead)
        # Silent owners need no claim once they know that all others are dead. One that is here cannot be known so.
        if is_majority(view, silent) or (silent and not owners):
            return "wait"
        if not is_majority(view, owners) and (silent or not owners):
            found = "claim"
    return found


def missing(views: Iterable[View], here: Collection[str], dead: Collection[str]) -> list[str]:
    """Return the names of the owners of which it is not known whether they go on elsewhere."""
    return sorted({name_of(node) for view in views for node in view.nodes - set(here) - set(dead)})


def may_be_installed(installed: View | None, accepted: Iterable[View | None]) -> tuple[View, ...]:
    """Return the views of which a majority is needed: the newest that is known to be installed, and those after it."""
    if installed is None:
        return ()
    later = {view.number: view for view in accepted if view is not None and view.number > installed.number}
    return (installed, *(later[number] for number in sorted(later)))


class Ballot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A node asks to open the store with this number."""

    number: int
    candidate: str
    installed: View
    accepted: View | None


class Vote(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The answer to a ballot."""

    node: str
    granted: bool
    promised: int
    """The highest number for which this node has voted."""
    installed: View | None = None
    """Newer than the candidate's."""


class Voter(msgspec.Struct, kw_only=True):
    """What one supervisor has promised and accepted; it lives as long as the supervisor and is in no file."""

    node: str
    promised: int = -1
    candidate: str = ""
    installed: View | None = None
    accepted: View | None = None
    follows: bool = False
    """It has a store, so that it needs no other."""

    @property
    def views(self) -> tuple[View, ...]:
        return may_be_installed(self.installed, (self.accepted,))

    def learn(self, installed: View | None) -> None:
        """Note a view that a majority has installed."""
        if installed is not None and (self.installed is None or installed.number > self.installed.number):
            self.installed = installed

    def accept(self, view: View | None) -> None:
        """Note a view before arriving in it: it may be installed without this node hearing of it."""
        if view is None:
            return
        if self.accepted is None or view.number > self.accepted.number:
            self.accepted = view

    def stand(self, above: int) -> Ballot | None:
        """Vote for this node itself, for a number higher than `above`; None if it has no view to be elected in.

        A node that was refused asks again for the same number, as long as `above` allows it.
        """
        if self.installed is None:
            return None
        again = self.candidate == self.node and self.promised > above
        number = self.promised if again else max(above, self.promised) + 1
        ballot = Ballot(number=number, candidate=self.node, installed=self.installed, accepted=self.accepted)
        return ballot if self.vote(ballot).granted else None

    def vote(self, ballot: Ballot) -> Vote:
        """Vote once for each number, and never for a node that knows less than this one."""
        theirs = max(view.number for view in may_be_installed(ballot.installed, (ballot.accepted,)))
        mine = max((view.number for view in self.views), default=(-1, -1))
        again = ballot.number == self.promised and ballot.candidate == self.candidate
        granted = not self.follows and theirs >= mine and (ballot.number > self.promised or again)
        if granted:
            self.promised, self.candidate = ballot.number, ballot.candidate
        newer = self.installed is not None and self.installed.number > ballot.installed.number
        return Vote(
            node=self.node, granted=granted, promised=self.promised, installed=self.installed if newer else None
        )


def outbid(ballot: Ballot, answers: Mapping[str, Vote | Literal["dead", "silent"]]) -> int:
    """Return the highest number that owners have promised to others instead of this ballot; -1 if none has.

    The candidate asks for a higher one next: of owners that voted for themselves at once, none would ever get a
    majority for the same number.
    """
    refused = (vote for vote in answers.values() if isinstance(vote, Vote) and not vote.granted)
    return max((vote.promised for vote in refused if vote.promised >= ballot.number), default=-1)


def tally(views: Iterable[View], answers: Mapping[str, Vote | Literal["dead", "silent"]], me: str) -> Verdict:
    """Return the verdict on a ballot from the answers by node."""
    granted = {node for node, answer in answers.items() if isinstance(answer, Vote) and answer.granted} | {me}
    return verdict(views, granted, {node for node, answer in answers.items() if answer == "dead"})
