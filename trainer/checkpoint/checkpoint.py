"""Durable checkpoints of a run: every rank writes the shards that it holds first; any layout can read them.

The format is that of `keepwarm.ft.format.publication`, so checkpoints written here and by snapshot agents are the same.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash

from keepwarm import side_writer
from keepwarm.files import within
from keepwarm.ft.arrays import Bytes
from keepwarm.ft.discovery.registry import newest_epoch
from keepwarm.ft.errors import DurableError, FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.contents import Move, Piece, move_bytes, plan
from keepwarm.ft.format.manifest import Entry, Manifest, Part
from keepwarm.ft.format.writer import age_notes
from keepwarm.ft.worker.snapshotter import DTYPES, piece_of
from keepwarm.parallel.shard import Shard
from keepwarm.trainer.checkpoint import own_part
from keepwarm.trainer.checkpoint.store import Checkpoint, opened
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.errors import CheckpointError, StateNotSaved
from keepwarm.trainer.job.sections import CheckpointSpec
from keepwarm.trainer.job.spec import JobSpec

FOLDER_PATIENCE_S = 2.0
"""How long ranks wait for checkpoints on disk from which they need nothing, in seconds."""
WEIGHTS = "model."
"""Names with this prefix are parameters."""

OPTIONAL = ("random.", "average.")
"""Names with these prefixes may be missing: generators belong to one rank, and a layout with more ranks finds none for
the new ones; a moving average may be asked for later."""


_REASONS = 3
"""How many ranks' reasons a failure quotes."""


def layout_hash(job: JobSpec) -> str:
    """Return a hash that is equal for runs whose ranks hold the same shards of the same model."""
    text = job.parallel.model_dump_json(exclude={"reshard_after_forward", "accumulate"}) + job.model.model_dump_json()
    return xxhash.xxh3_64_hexdigest(text.encode())


class Checkpoints:
    """The folder `OUTPUT/checkpoints` of one run. Every method is collective."""

    def __init__(self, root: Path, spec: CheckpointSpec, world: World, *, run: str, layout: str) -> None:
        self.root = root
        self._spec = spec
        self._world = world
        self._run = run
        self._layout = layout
        self.epoch = 0
        """Orders checkpoints together with the step; every start begins a new one."""

    def begin_epoch(self, memory: int) -> None:
        """Begin the epoch of the snapshot agents, or, without them (0), one beyond all that are visible."""
        look = partial(newest_epoch, self.root.parent)
        newest = within(look, FOLDER_PATIENCE_S) if memory else look() + 1
        self.epoch = max(memory, newest or 0)

    def due(self, step: int) -> bool:
        """Return whether the spec asks for a checkpoint after `step` completed steps, besides the final one."""
        return self._spec.every is not None and step % self._spec.every == 0

    def save(
        self, step: int, shards: Mapping[str, Shard], meta: dict[str, Any], moved: Callable[[], object] = lambda: None
    ) -> Path:
        """Write, verify and publish the checkpoint of `step`, then delete those beyond `keep`.

        Each rank reads back what it wrote. No rank waits in a collective while another reads or writes: that may take
        longer than a collective's deadline. `moved` is called from time to time as long as any rank goes on.

        Raises:
            StateNotSaved: on all ranks, as the disk is full or the folder cannot be written by one of them; existing
                checkpoints stay intact, and nothing of this one keeps its space.
        """
        # Ranks may have started with different epochs: an agent that joins late causes another one.
        self.epoch = self._world.largest(self.epoch)
        tmp, final = publication.staging(self.root, self.epoch, step, "ranks"), publication.folder(self.root, step)
        failure: Exception | None = None
        header = b""
        written = self._world.meeting(moved)
        try:
            # By every rank, not by one for which the others wait: a rank that fails goes on to what all take part in.
            tmp.mkdir(parents=True, exist_ok=True)
            mine = [shard for shard in shards.values() if shard.replicas[0] == self._world.rank]
            part = own_part.write(tmp, self._world.rank, mine, age_notes(self.epoch, step), written.advance)
            header = part.header_xxh3.encode()
        except (OSError, FtError) as error:
            failure = error
        written.arrive()
        self._agree(failure, tmp)
        headers = self._world.gather(header)
        published = self._world.meeting(moved)
        if self._world.rank == 0:
            try:
                self._publish(tmp, final, step, meta, headers)
            except (OSError, FtError) as error:
                failure = error
        published.arrive()
        self._agree(failure, tmp)
        if self._world.rank == 0:
            with side_writer.attempt("old checkpoints"):
                publication.prune(self.root, self._spec.keep, published=final)
        return final

    def _publish(self, tmp: Path, final: Path, step: int, meta: dict[str, Any], headers: list[bytes]) -> None:
        """Publish parts that their ranks have verified; `headers` are the checksums of their headers."""
        manifest = publication.write_manifest(
            tmp,
            publication.Identity(run=self._run, epoch=self.epoch, step=step, layout=self._layout),
            ranks=self._world.size,
            meta=meta,
        )
        for part, header in zip(manifest.parts, headers, strict=True):
            if part.header_xxh3 != header.decode():
                raise DurableError(f"{tmp / part.file}: its header is not the one that rank {part.rank} verified")
        if not publication.publish(tmp, final):
            warnings.warn(
                f"{final.parent}: a restart prefers a checkpoint of a later epoch than {self.epoch} to step {step}",
                stacklevel=2,
            )

    def _agree(self, failure: Exception | None, tmp: Path) -> None:
        """Raise on all ranks if one of them failed; rank 0 names the others' reasons and makes the room free again."""
        if not self._world.any(failure is not None):
            return
        reasons = self._world.gather(b"" if failure is None else str(failure).encode())
        if self._world.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
        ranks = [f"rank {rank}: {reason.decode()}" for rank, reason in enumerate(reasons) if reason]
        why = "; ".join(ranks[:_REASONS]) if ranks else str(failure or "on another rank")
        raise StateNotSaved(f"checkpoint to {self.root} failed: {why}; earlier checkpoints are untouched")

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        return publication.latest(self.root)

    def sweep(self) -> None:
        """Delete the leftovers of an interrupted writer."""
        if self._world.rank == 0:
            with side_writer.attempt("leftovers of checkpoints"):
                publication.sweep(self.root)


def load(path: Path | str, shards: Mapping[str, Shard]) -> dict[str, Any]:
    """Fill live shards from a checkpoint of any layout; return the `meta` that was saved with it.

    `path` is a folder or an fsspec URL. If only part of a piece is needed, only that part is read.

    Raises:
        CheckpointError: damaged, incomplete, or of a different model; names the file or tensor.
    """
    try:
        with opened(path) as stored:
            by_name = _by_name(stored.manifest)
            for shard in shards.values():
                if shard.name in by_name or not shard.name.startswith(OPTIONAL):
                    _fill(stored, shard, by_name.get(shard.name, []))
            return stored.manifest.meta
    except FtError as error:
        raise CheckpointError(str(error)) from error


def load_weights(path: Path | str, shards: Mapping[str, Shard]) -> dict[str, Any]:
    """Fill only the live `shards` that hold parameters, from a checkpoint of any layout and dtype.

    `path` and the result are as for `load`. Values are rounded if the shard's dtype is narrower. The caller calls
    `Engine.restored()` and decides what to do with the optimizer.

    Raises:
        CheckpointError: damaged, incomplete, or of a different model; names the file or tensor.
    """
    try:
        with opened(path) as stored:
            by_name = _by_name(stored.manifest)
            for shard in shards.values():
                if shard.name.startswith(WEIGHTS):
                    _fill(stored, shard, by_name.get(shard.name, []), as_stored=True)
            return stored.manifest.meta
    except FtError as error:
        raise CheckpointError(str(error)) from error


Sources = list[tuple[Part, Entry]]


def _by_name(manifest: Manifest) -> dict[str, Sources]:
    found: dict[str, Sources] = {}
    for part in manifest.parts:
        for entry in part.entries:
            found.setdefault(entry.piece.name, []).append((part, entry))
    return found


def _fill(stored: Checkpoint, shard: Shard, sources: Sources, *, as_stored: bool = False) -> None:
    target, dtype = piece_of(shard), shard.local.dtype
    if as_stored and sources:
        target = msgspec.structs.replace(target, dtype=sources[0][1].piece.dtype)
        dtype = next(known for known, name in DTYPES.items() if name == target.dtype)
    if target.elements == 0:
        return
    exact = next((source for source in sources if source[1].piece == target), None)
    if exact is not None and dtype == shard.local.dtype and shard.local.is_cpu and shard.local.is_contiguous():
        # Read directly into live memory: after an error here, callers must not use any of it.
        stored.piece(*exact, shard.local.detach().reshape(-1).view(torch.uint8).numpy())
        return
    out = np.empty(target.bytes, dtype=np.uint8)
    if exact is not None:
        stored.piece(*exact, out)
    else:
        _assemble(stored, target, sources, out)
    with torch.no_grad():
        shard.local.copy_(torch.from_numpy(out).view(dtype).view(shard.local.shape))


def _assemble(stored: Checkpoint, target: Piece, sources: Sources, out: Bytes) -> None:
    spans: dict[int, list[Move]] = {}
    for move in plan(target, [entry.piece for _, entry in sources]):
        spans.setdefault(move.source, []).append(move)
    for source, moves in spans.items():
        start, stop = min(move.span[0] for move in moves), max(move.span[1] for move in moves)
        first, held = stored.span(*sources[source], start, stop)
        for move in moves:
            move_bytes(move, held[move.span[0] - first : move.span[1] - first], out)
