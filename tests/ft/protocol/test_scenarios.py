"""Transcripts of one agent: what happens (`>`), what it does about it (indented).

They lie in tests/ft/protocol/scenarios/*.txt.

`KEEPWARM_REWRITE=1 pytest tests/ft/protocol/test_scenarios.py` rewrites them; read the difference.
"""

import os
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import pytest

from keepwarm.ft.protocol import events as ev
from keepwarm.ft.protocol import messages as msg
from keepwarm.ft.protocol import step as protocol
from keepwarm.ft.protocol.parity_placement import StripeGroup
from keepwarm.ft.protocol.state import Geometry, State, Topology, initial

FOLDER = Path(__file__).parent / "scenarios"
FILES = sorted(FOLDER.glob("*.txt"))


def snapshot(text: str) -> msg.SnapshotId:
    epoch, step = text.split(".")
    return msg.SnapshotId("run", int(epoch), int(step), "layout")


def records(text: str) -> tuple[msg.ChunkRecord, ...]:
    """`0:aa` is data of one bucket, `1:bb<aa+cc` is parity of two chunks of one bucket each; digests are decimal."""
    found = []
    for item in text.split(","):
        stripe, _, rest = item.partition(":")
        digest, _, sources = rest.partition("<")
        parts = tuple(int(part) for part in sources.split("+")) if sources else ()
        found.append(msg.ChunkRecord(int(stripe), int(digest), parts, 1, (1,) * len(parts)))
    return tuple(found)


def start(words: list[str]) -> State:
    """`agent slot=0 groups=0,1/1 [parts=1,1] [chunk=1] [durable=1]`: groups are members/parity, `+` between them."""
    given = dict(word.split("=") for word in words)
    groups = []
    for index, text in enumerate(given["groups"].split("+")):
        members, _, parity = text.partition("/")
        groups.append(StripeGroup(index, tuple(int(slot) for slot in members.split(",")), int(parity)))
    state = initial("run", int(given["slot"]), 1, Topology(tuple(groups)), durable="durable" in given)
    parts = tuple(int(part) for part in given.get("parts", "1").split(","))
    return protocol.step(state, ev.Configured(Geometry("layout", parts, int(given.get("chunk", "1")))))[0]


def event(words: list[str]) -> ev.Event:
    name, rest = words[0], words[1:]
    given = dict(word.split("=") for word in rest if "=" in word)
    plain = [word for word in rest if "=" not in word]
    sender, incarnation = int(given.get("from", "0")), int(given.get("incarnation", "1"))

    def heard(message: msg.AgentMessage) -> ev.Event:
        return ev.Received(sender, incarnation, message)

    match name, plain:
        case "epoch", [epoch]:
            return ev.EpochAdvanced(int(epoch))
        case "decision", [epoch, chosen]:
            incarnations = tuple(int(incarnation) for incarnation in given["incarnations"].split(","))
            choice = None if chosen == "none" else snapshot(chosen)
            return heard(msg.Decision(epoch=int(epoch), snapshot=choice, incarnations=incarnations))
        case "inventory", [epoch]:
            return heard(msg.InventoryRequest(epoch=int(epoch)))
        case "open", [which]:
            return ev.WorkerOpened(int(given.get("worker", "0")), snapshot(which), "wait" in given)
        case "seal", [which]:
            sums = tuple(int(s) for s in given["sums"].split(","))
            return ev.WorkerSealed(int(given.get("worker", "0")), snapshot(which), sums)
        case "cancel", [which]:
            return ev.WorkerCancelled(int(given.get("worker", "0")), snapshot(which))
        case "worker-lost", []:
            return ev.WorkerLost(int(given.get("worker", "0")))
        case "data-verified", [which]:
            bad = tuple(int(b) for b in given["bad"].split(",")) if "bad" in given else ()
            return ev.DataVerified(snapshot(which), bad)
        case "parity-verified", [which]:
            return ev.ParityVerified(snapshot(which), int(given["stripe"]), int(given["digest"]))
        case "connected", []:
            return ev.PeerConnected(sender, incarnation)
        case "bucket" | "damaged-bucket", [which]:
            header = msg.Bucket(
                snapshot=snapshot(which), stripe=int(given["stripe"]), index=int(given["index"]),
                sum=int(given["sum"]), size=4,
            )  # fmt: skip
            return ev.BucketArrived(sender, incarnation, header, name == "bucket")
        case "end", [which]:
            sums = [int(s) for s in given["sums"].split(",")]
            end = msg.ChunkEnd(
                snapshot=snapshot(which), stripe=int(given["stripe"]), count=len(sums), digest=msg.digest(sums)
            )
            return heard(end)
        case "want", [which]:
            return heard(msg.Want(snapshot=snapshot(which), stripe=int(given["stripe"]), start=int(given["start"])))
        case "stored", [which]:
            chunks, epoch = records(given["chunks"]), int(given.get("epoch", "0"))
            return heard(msg.Stored(snapshot=snapshot(which), chunks=chunks, epoch=epoch))
        case "known", [which]:
            prepared = tuple(int(g) for g in given["prepared"].split(",")) if "prepared" in given else ()
            known = msg.Known(
                snapshot=snapshot(which), prepared=prepared, committed="committed" in given, void="void" in given,
                epoch=int(given.get("epoch", "0")),
            )  # fmt: skip
            return heard(known)
        case "joined", [epoch]:
            return heard(msg.Joined(epoch=int(epoch)))
        case "fetch", [which]:
            return heard(msg.Fetch(epoch=int(given["epoch"]), snapshot=snapshot(which), stripe=int(given["stripe"])))
        case "chunk-wrong", [which]:
            stripe = int(given["stripe"])
            return heard(msg.ChunkWrong(epoch=int(given["epoch"]), snapshot=snapshot(which), stripe=stripe))
        case "lost", []:
            return ev.PeerLost(sender)
        case "away", []:
            return ev.PeerAway(sender)
        case "epoch-needed", [epoch]:
            return ev.EpochNeeded(int(epoch), "a chunk is gone")
        case "plan", [epoch, which]:
            slots = tuple(int(incarnation) for incarnation in given["incarnations"].split(","))
            chosen = msg.Decision(epoch=int(epoch), snapshot=snapshot(which), incarnations=slots)
            order = msg.Decode(
                epoch=int(epoch), snapshot=snapshot(which), stripe=0, sources=(1,), targets=(0,), digests=(9,),
                counts=(1,),
            )  # fmt: skip
            return ev.PlanRead(chosen, ((1, order),))
        case "decode-failed", [which]:
            holders = tuple(int(slot) for slot in given["holders"].split(","))
            return ev.DecodeFailed(snapshot(which), int(given["stripe"]), holders)
        case "rebuilt", [which]:
            (record,) = records(given["chunk"])
            return ev.ChunkRebuilt(snapshot(which), record, (int(given.get("sum", "0")),))
        case "scrubbed", [which]:
            return ev.Scrubbed(snapshot(which), int(given["stripe"]), intact=False)
        case "durable-started", [which]:
            return ev.DurableStarted(snapshot(which))
        case "durable-ended", [which]:
            return ev.DurableEnded(snapshot(which))
    raise ValueError(f"no such event: {' '.join(words)}")


def shown(value: Any) -> str:
    match value:
        case msg.SnapshotId():
            return str(value)
        case msg.ChunkRecord():
            made_of = "<" + "+".join(map(str, value.sources)) if value.sources else ""
            return f"{value.stripe}:{value.digest}{made_of}"
        case Enum():
            return str(value.name)
        case msgspec.Struct():
            pairs = [(each.name, getattr(value, each.name), each.default) for each in msgspec.structs.fields(value)]
            inner = " ".join(f"{name}={shown(item)}" for name, item, default in pairs if item != default)
            return f"{type(value).__name__}({inner})"
        case tuple():
            return "[" + " ".join(shown(item) for item in value) + "]"
    return str(value)


def line(effect: ev.Effect) -> str:
    pairs = " ".join(f"{each.name}={shown(getattr(effect, each.name))}" for each in fields(effect))
    return f"  {type(effect).__name__} {pairs}".rstrip()


def replay(text: str) -> str:
    """The transcript with what the agent does now in place of its indented lines."""
    state: State | None = None
    out = []
    for row in text.splitlines():
        if row.startswith("  "):
            continue
        out.append(row)
        if row.startswith("agent "):
            state = start(row.split()[1:])
        elif row.startswith("> "):
            assert state is not None, "a transcript begins with an agent line"
            state, effects = protocol.step(state, event(row[2:].split()))
            out.extend(line(effect) for effect in effects)
            held = ", ".join(f"{copy.snapshot} {copy.phase.value}" for copy in state.copies) or "nothing"
            out.append(f"  = {state.mode.value}, holds {held}")
    return "\n".join(out) + "\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_protocol_transcript_is_unchanged(path: Path) -> None:
    before = path.read_text()
    after = replay(before)
    if os.environ.get("KEEPWARM_REWRITE"):
        path.write_text(after)
    else:
        assert after == before, f"{path.name}: read the difference, then rewrite with KEEPWARM_REWRITE=1"


def test_protocol_transcripts_exist() -> None:
    assert len(FILES) >= 5
