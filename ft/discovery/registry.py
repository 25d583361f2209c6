"""Agent discovery and per-epoch decisions, as small files in the folder shared by all nodes."""

import contextlib
from pathlib import Path

import msgspec

from keepwarm.files import atomic_create, atomic_write
from keepwarm.ft.errors import AgentError
from keepwarm.ft.protocol.messages import Decision, Decode

AGENTS_FOLDER = "agents"
"""Folder name inside the run folder."""
TEMPLATE_FILE = "template.json"
"""File in the agents folder: the config of rank 0's agent, from which supervisors start others. Only slot, host and
runtime folder differ."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Address of a slot's agent in its current incarnation."""

    host: str
    port: int
    incarnation: int


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """Decision of an epoch and its decoding plan: (decoder, order).

    Stored in one file, so that an agent that knows the choice also knows the orders, even if links or agents were lost.
    """

    decision: Decision
    orders: tuple[tuple[int, Decode], ...] = ()


class Registry:
    """The files: `<slot>.json` holds an agent's endpoint, `choice-<epoch>.json` what that epoch restores."""

    def __init__(self, shared: Path) -> None:
        self.folder = shared / AGENTS_FOLDER
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def publish(self, slot: int, address: tuple[str, int], incarnation: int) -> None:
        endpoint = Endpoint(host=address[0], port=address[1], incarnation=incarnation)
        atomic_write(self.folder / f"{slot}.json", msgspec.json.encode(endpoint), durable=True)

    def withdraw(self, slot: int, incarnation: int) -> None:
        """Remove the endpoint, unless a later incarnation has published its own."""
        if (endpoint := self.endpoint(slot)) is not None and endpoint.incarnation == incarnation:
            (self.folder / f"{slot}.json").unlink(missing_ok=True)

    def endpoint(self, slot: int) -> Endpoint | None:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode((self.folder / f"{slot}.json").read_bytes(), type=Endpoint)
        return None

    def resolve(self, slot: int) -> tuple[str, int] | None:
        endpoint = self.endpoint(slot)
        return None if endpoint is None else (endpoint.host, endpoint.port)

    def choose(self, choice: Choice) -> Choice:
        """Write the choice of an epoch by compare-and-set. The first one stands and is returned to every caller."""
        path = self._choice_file(choice.decision.epoch)
        atomic_create(path, msgspec.json.encode(choice))
        chosen = self.choice(choice.decision.epoch)
        if chosen is None:
            raise AgentError(f"{path}: cannot be read back")
        return chosen

    def newest_epoch(self) -> int:
        """Return the highest epoch that has been decided here, or 0 if none has or the folder cannot be read."""
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = [path.stem.removeprefix("choice-") for path in self.folder.glob("choice-*.json")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def explain(self, epoch: int, reason: str) -> None:
        """Record the reason for a choice that restores nothing."""
        atomic_write(self.folder / f"reason-{epoch}.txt", reason.encode(), durable=True)

    def reason(self, epoch: int) -> str:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return (self.folder / f"reason-{epoch}.txt").read_text()
        return "no committed snapshot is left in memory"

    def choice(self, epoch: int) -> Choice | None:
        """Return the choice of an epoch; None if there is none, or none that this version can read."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._choice_file(epoch).read_bytes(), type=Choice)
        return None

    def decided_at(self, epoch: int) -> float:
        """Return when an epoch was decided, in seconds since 1970, or 0 if unknown."""
        with contextlib.suppress(OSError):
            return self._choice_file(epoch).stat().st_mtime
        return 0.0

    def _choice_file(self, epoch: int) -> Path:
        return self.folder / f"choice-{epoch}.json"
