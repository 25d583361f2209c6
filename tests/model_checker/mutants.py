"""Defects that are planted into the protocol, to see that the model checker finds them.

A mutant replaces a piece of the text of one function, which is found by its name in any module of the protocol. Where
the function or the text is gone, planting fails; so a mutant never passes for want of a defect. A function that has
been renamed or rewritten is given as another `Edit`: the first that fits is taken.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType

import keepwarm.ft.protocol


class NoPlace(Exception):
    """The text that a mutant replaces is nowhere in the protocol."""


@dataclass(frozen=True)
class Edit:
    """Replace `old` by `new` in the function `name`."""

    name: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """One defect."""

    name: str
    edits: tuple[Edit, ...]

    def __str__(self) -> str:
        return self.name

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Have the defect in the protocol for a while. Raise `NoPlace` if none of the edits fits."""
        function, code = self._found()
        before = function.__code__
        function.__code__ = code
        try:
            yield
        finally:
            function.__code__ = before

    def _found(self) -> tuple[FunctionType, CodeType]:
        for edit in self.edits:
            for function in functions(edit.name):
                source = textwrap.dedent(inspect.getsource(function))
                if source.count(edit.old) == 1:
                    return function, _compiled(function, source.replace(edit.old, edit.new))
        raise NoPlace(f"mutant {self.name!r}: none of its edits fits the protocol; follow it with another one")


def _compiled(function: FunctionType, source: str) -> CodeType:
    scope: dict[str, object] = {}
    exec(compile(source, inspect.getsourcefile(function) or "mutant", "exec"), function.__globals__, scope)  # noqa: S102
    made = scope[function.__name__]
    if isinstance(made, property):
        made = made.fget
    assert isinstance(made, FunctionType)
    return made.__code__


def functions(name: str) -> Iterator[FunctionType]:
    """Yield the protocol's functions and methods of a name."""
    for each in pkgutil.iter_modules(keepwarm.ft.protocol.__path__):
        module = importlib.import_module(f"keepwarm.ft.protocol.{each.name}")
        for value in vars(module).values():
            if isinstance(value, FunctionType) and value.__name__ == name and value.__module__ == module.__name__:
                yield value
            elif isinstance(value, type) and value.__module__ == module.__name__ and name in vars(value):
                member = vars(value)[name]
                found = member.fget if isinstance(member, property) else member
                if isinstance(found, FunctionType):
                    yield found


def _one(name: str, function: str, old: str, new: str) -> Mutant:
    return Mutant(name, (Edit(function, old, new),))


def _two(name: str, functions: tuple[str, str], old: str, new: str) -> Mutant:
    """Return a mutant of a function that has one of two names."""
    return Mutant(name, tuple(Edit(function, old, new) for function in functions))


MINORITY = _one("a minority gives up what others hold", "_majority", "return all(", "return True or all(")

MUTANTS = (
    # ---- coding
    _one("damaged buckets are added to parity", "on_bucket", "if not event.intact:", "if False:"),
    _one(
        "the chain of checksums forgets what came before",
        "on_bucket",
        "digest((bucket.sum,), progress.digest)",
        "digest((bucket.sum,), 0)",
    ),
    _one("parity is finished when one source has ended", "on_end", "if all(coding.get(", "if any(coding.get("),
    _one(
        "stored is said with a chunk missing",
        "check_stored",
        "len(copy.good) == copy.group.size",
        "len(copy.good) >= copy.group.size - 1",
    ),
    _one(
        "prepared without the last member",
        "check_prepared",
        "len(copy.members) < copy.group.size",
        "len(copy.members) < copy.group.size - 1",
    ),
    _one(
        "a request that comes before the seal is forgotten",
        "on_want",
        "if copy is not None or snapshot.age > state.newest:",
        "if False:",
    ),
    _one(
        "parity is not cleared before it is used again",
        "_ask_from_zero",
        "transition.emit(ClearParity(copy.snapshot, stripe, copy.parity))",
        "pass",
    ),
    _one(
        "data is not read back after the seal",
        "sealed",
        "transition.emit(Verify(copy.snapshot, copy.data, flat))",
        "pass",
    ),
    _one(
        "wrong data is taken for good",
        "on_data_verified",
        "bad = {stripes[bucket // chunk] for bucket in event.bad}",
        "bad = set()",
    ),
    _one(
        "a chunk is sent from its second bucket on", "_send_chunk", "min(start, len(sums))", "min(start + 1, len(sums))"
    ),
    _one(
        "a verified parity chunk is forgotten",
        "on_parity_verified",
        "good={**copy.good, event.stripe: record}",
        "good=copy.good",
    ),
    # ---- commits
    _one(
        "one group is taken for all",
        "learn",
        "everything = len(now) == len(state.topology.groups)",
        "everything = bool(now)",
    ),
    _one(
        "all groups but one are enough",
        "learn",
        "everything = len(now) == len(state.topology.groups)",
        "everything = len(now) >= max(1, len(state.topology.groups) - 1)",
    ),
    Mutant(
        "a commit is not passed on",
        (
            Edit("learn", "if message is not None and slot != sender:", "if False:"),
            Edit("learn", "self.emit(Send(slot, Known(snapshot=snapshot, committed=True, epoch=epoch)))", "pass"),
        ),
    ),
    _one(
        "the older snapshot is freed when the newer is sealed",
        "sealed",
        "assert copy.data is not None",
        "[transition.drop(other) for other in transition.state.copies if other.committed]",
    ),
    _one(
        "what can never be committed is not passed on",
        "void",
        "self.send_tree(Known(snapshot=snapshot, void=True), sender)",
        "pass",
    ),
    _one("what others say can never be committed is ignored", "_know", "known.void:", "False:"),
    # ---- buffers and workers
    _one("a buffer that a worker writes to is free", "drop", "keep = copy.writers or copy.held", "keep = copy.held"),
    _one("a buffer that the disk reads is free", "drop", "keep = copy.writers or copy.held", "keep = copy.writers"),
    _one(
        "what was discarded leaves its buffer at once",
        "free_buffers",
        "data = set(range(state.data_buffers)) - {copy.data for copy in state.copies}",
        "data = set(range(state.data_buffers)) - {copy.data for copy in state.copies if copy.candidate or copy.open}",
    ),
    _two("a part is taken for the whole", ("sealed", "_seal"), "len(copy.sums) == len(copy.geometry.parts)", "True"),
    Mutant(
        "a busy agent does not say that it passes",
        (
            Edit(
                "_refuse",
                'transition.void(snapshot, f"slot {transition.state.slot} {why}")\n    transition.pass_to(snapshot)',
                "pass",
            ),
            Edit("_open", 'transition.void(snapshot, f"slot {state.slot} was busy")', "pass"),
        ),
    ),
    # ---- links
    _two(
        "facts are not repeated after a reconnect",
        ("_repeat", "_say_again"),
        "for snapshot in sorted(state.known, key=lambda each: each.age):",
        "for snapshot in ():",
    ),
    # ---- recovery
    _two(
        "a new epoch discards what was committed",
        ("advance", "_advance"),
        "if copy.phase is Phase.FILLING:",
        "if copy.phase in (Phase.FILLING, Phase.COMMITTED):",
    ),
    _one(
        "an inventory lists only what is known to be committed",
        "inventory",
        "if copy.candidate and copy.good",
        "if copy.committed and copy.good",
    ),
    Mutant(
        "one chunk more is asked for than is needed",
        (
            Edit("_lost", "if lacking > group.parity:", "if lacking >= group.parity:"),
            Edit("_lost", "if not state.decodable(group.data):", "if not state.decodable(group.data + 1):"),
        ),
    ),
    MINORITY,
    Mutant(
        "the oldest snapshot is chosen",
        (Edit("_on_the_branch", "reverse=True", "reverse=False"), Edit("_held", "reverse=True", "reverse=False")),
    ),
    _one("data is whole as soon as one chunk is", "_data_whole", "return all(", "return any("),
    Mutant(
        "the chosen snapshot is announced before it is here",
        (
            Edit(
                "_decide",
                "_announce(transition, chosen, whole=_data_whole(transition, chosen))",
                "_announce(transition, chosen, whole=True)",
            ),
            Edit(
                "decide",
                "_announce(transition, chosen, whole=_data_whole(transition, chosen))",
                "_announce(transition, chosen, whole=True)",
            ),
        ),
    ),
    _one("what was restored does not stay beside a newer choice", "decide", "restored=True", "restored=False"),
    _one("what is lost after an inventory is not missed", "follow", "_miss(transition, orders)", "pass"),
    _two("the plan is not followed", ("follow", "_plan"), "transition.emit(FollowOrders(orders))", "pass"),
    Mutant(
        "checksums of rebuilt data are forgotten",
        (Edit("rebuilt", "rebuilt=sums)", "rebuilt={})"), Edit("_rebuilt", "rebuilt=rebuilt)", "rebuilt={})")),
    ),
    _one(
        "parity is placed beside its data",
        "parities",
        "self._parities[stripe % self.size]",
        "self._parities[stripe % self.size][:1] * self.parity",
    ),
)
