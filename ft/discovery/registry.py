"""Agent discovery and per-epoch decisions, as small files in the folder shared by all nodes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from keepwarm.files import READABLE, atomic_create, atomic_write
from keepwarm.ft.format import publication
from keepwarm.ft.protocol.messages import Choice
from keepwarm.ft.protocol.restore_choice import NOTHING_HELD

AGENTS_FOLDER = "agents"
"""Folder name inside the run folder."""
LAYOUT = "layout-"
"""Prefix of the folder names, inside that folder, of the agents of a run's later layouts; their number follows."""
CHECKPOINTS_FOLDER = "checkpoints"
"""Folder of durable checkpoints inside the run folder."""
TEMPLATE_FILE = "template.json"
"""File in the agents folder: the config of rank 0's agent, from which supervisors start others. Only slot, host and
runtime folder differ."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Address of a slot's agent in its current incarnation."""

    host: str
    port: int
    incarnation: int


def newest_epoch(shared: Path) -> int:
    """Return the highest epoch of a choice or a durable checkpoint in a run folder, or -1 if there is none.

    Epochs order everything that a run saves, so a start begins one beyond all that are visible: the files of agents may
    have been deleted, the folder copied, or the last start have taken no snapshots. Raises `OSError`.
    """
    agents = shared / AGENTS_FOLDER
    decided = (*_epochs(agents, "choice-*.json"), *_epochs(agents, f"{LAYOUT}*/choice-*.json"))
    return max(publication.newest_epoch(shared / CHECKPOINTS_FOLDER), *decided)


def agents_folder(shared: Path, generation: int) -> Path:
    """Return the folder with the files of the agents of one of a run's layouts, counted from 0."""
    return shared / AGENTS_FOLDER / f"{LAYOUT}{generation}" if generation else shared / AGENTS_FOLDER


def newest_generation(shared: Path) -> int:
    """Return the number of the last layout for which agents were started in a run folder, or 0. Raises `OSError`."""
    names = (path.name.removeprefix(LAYOUT) for path in (shared / AGENTS_FOLDER).glob(f"{LAYOUT}*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def _epochs(folder: Path, pattern: str) -> tuple[int, ...]:
    """Return the epochs in the names of the files of one kind, after -1."""
    names = (path.stem.rpartition("-")[2] for path in folder.glob(pattern))
    return (-1, *(int(name) for name in names if name.isdigit()))


REASON_LIMIT = 1000
"""Characters of a reason that are kept."""
KEPT_EPOCHS = 8
"""Epochs whose files are kept: an agent that comes late reads those of the newest."""


class Registry:
    """The files: `<slot>.json` holds an agent's endpoint, `choice-<epoch>.json` what that epoch restores.

    No method raises `OSError`: a folder that is full, read-only or gone is tried again by the caller.
    """

    def __init__(self, shared: Path, generation: int = 0) -> None:
        self.folder = agents_folder(shared, generation)
        self._shared = shared
        self.failure = ""
        """What the last attempt to write failed with; empty if it succeeded."""
        self._newest = 0
        self._reasons: dict[int, str] = {}

    @contextlib.contextmanager
    def _tried(self) -> Iterator[None]:
        """Record an error of the folder in `failure` instead of raising it."""
        self.failure = ""
        try:
            yield
        except OSError as error:
            self.failure = str(error)

    def publish(self, slot: int, address: tuple[str, int], incarnation: int) -> bool:
        """Write an agent's endpoint. Return False if the folder does not take it."""
        endpoint = Endpoint(host=address[0], port=address[1], incarnation=incarnation)
        with self._tried():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            atomic_write(self.folder / f"{slot}.json", msgspec.json.encode(endpoint), durable=True)
        return not self.failure

    def keep(self, template: bytes, choice: Choice | None) -> None:
        """Write the template and a choice again if their files are gone."""
        with self._tried():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not (self.folder / TEMPLATE_FILE).exists():
                atomic_write(self.folder / TEMPLATE_FILE, template, mode=READABLE)
            if choice is not None and not self._choice_file(choice.decision.epoch).exists():
                atomic_create(self._choice_file(choice.decision.epoch), msgspec.json.encode(choice))

    def next_incarnation(self, slot: int, hint: int) -> int:
        """Return a number higher than that of every earlier agent of a slot that the folder knows, `hint` if it is.

        A clock is a good hint, because the folder may have forgotten; but clocks of nodes differ, and an agent that
        stood still must not come before the one that has replaced it.
        """
        endpoint, newest = self.endpoint(slot), self.choice(self.newest_epoch())
        chosen = newest.decision.incarnations if newest is not None else ()
        known = max(0 if endpoint is None else endpoint.incarnation, *chosen[slot : slot + 1], 0)
        return max(hint, known + 1)

    def withdraw(self, slot: int, incarnation: int) -> None:
        """Remove the endpoint, unless a later incarnation has published its own."""
        if (endpoint := self.endpoint(slot)) is not None and endpoint.incarnation == incarnation:
            with self._tried():
                (self.folder / f"{slot}.json").unlink(missing_ok=True)

    def endpoint(self, slot: int) -> Endpoint | None:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode((self.folder / f"{slot}.json").read_bytes(), type=Endpoint)
        return None

    def resolve(self, slot: int) -> tuple[str, int] | None:
        endpoint = self.endpoint(slot)
        return None if endpoint is None else (endpoint.host, endpoint.port)

    def settle(self, choice: Choice) -> Choice | None:
        """Write the choice of an epoch as `choose` does, and why it restores nothing if that is so."""
        decision = choice.decision
        if decision.snapshot is None:
            reason = self._whole_reason(decision.reason)[:REASON_LIMIT]
            choice = msgspec.structs.replace(choice, decision=msgspec.structs.replace(decision, reason=reason))
            self.explain(decision.epoch, reason)
        return self.choose(choice)

    def note(self, choice: Choice) -> Choice | None:
        """Write down a choice that stands already. Return what the folder has."""
        if choice.decision.snapshot is None:
            self.explain(choice.decision.epoch, choice.decision.reason)
        return self.choose(choice)

    def _whole_reason(self, reason: str) -> str:
        """Append the previous epoch's reason if that epoch restored nothing and so discarded what was left."""
        before = self.newest_epoch()
        choice = self.choice(before)
        if not reason.startswith(NOTHING_HELD) or choice is None or choice.decision.snapshot is not None:
            return reason
        earlier = self.reason(before)
        return earlier if earlier.startswith(NOTHING_HELD) else f"{reason}; in epoch {before}: {earlier}"

    def choose(self, choice: Choice) -> Choice | None:
        """Write the choice of an epoch by compare-and-set. The first one stands and is returned to every caller.

        None: the folder does not take it, see `failure`; the epoch stays undecided and the caller tries again.
        """
        epoch = choice.decision.epoch
        with self._tried():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if atomic_create(self._choice_file(epoch), msgspec.json.encode(choice)):
                self._forget(epoch - KEPT_EPOCHS)
        return self.choice(epoch)

    def newest_epoch(self) -> int:
        """Return the highest epoch that has been seen decided or saved in this run, 0 if none has. It never shrinks."""
        with contextlib.suppress(OSError):
            self._newest = max(self._newest, newest_epoch(self._shared))
        return self._newest

    def _forget(self, last: int) -> None:
        """Remove the files of epochs up to `last`, which newer ones have superseded."""
        for kind, suffix in (("choice", ".json"), ("reason", ".txt")):
            for epoch in _epochs(self.folder, f"{kind}-*{suffix}"):
                if 0 <= epoch <= last:
                    (self.folder / f"{kind}-{epoch}{suffix}").unlink(missing_ok=True)

    def explain(self, epoch: int, reason: str) -> None:
        """Record the reason for a choice that restores nothing."""
        self._reasons[epoch] = reason
        with self._tried():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            atomic_write(self.folder / f"reason-{epoch}.txt", reason.encode(), durable=True)

    def reason(self, epoch: int) -> str:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self.folder / f"reason-{epoch}.txt").read_text()
        return self._reasons.get(epoch, "no committed snapshot is left in memory")

    def choice(self, epoch: int) -> Choice | None:
        """Return the choice of an epoch; None if there is none, or none that this version can read."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._choice_file(epoch).read_bytes(), type=Choice)
        return None

    def _choice_file(self, epoch: int) -> Path:
        return self.folder / f"choice-{epoch}.json"
