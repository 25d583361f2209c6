"""Batches for one rank, read ahead in the background."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from keepwarm.parallel.engine import Batch, local_rows
from keepwarm.parallel.errors import LayoutError
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.packing import PackedSource, Samples, Source, assembled
from keepwarm.trainer.data.prefetch import Prefetcher
from keepwarm.trainer.data.replay import content_of, length_of
from keepwarm.trainer.data.spec import ReplaySpec
from keepwarm.trainer.data.table import Ints
from keepwarm.trainer.errors import DataError

log = logging.getLogger(__name__)

_Prepared = tuple[int, int, Batch]
"""Position, global size, and this rank's batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShare:
    """Which rows of every global batch belong to a rank, and in micro-batches of how many samples."""

    layout: Layout
    rank: int
    micro_batch_size: int

    def rows(self, global_batch_size: int) -> range:
        """Return the rank's rows of a batch of `global_batch_size` samples.

        Raises:
            LayoutError: the size does not divide by data-parallel ranks times micro-batch.
        """
        if global_batch_size < 1 or global_batch_size % (self.layout.data * self.micro_batch_size):
            raise LayoutError(
                f"a global batch of {global_batch_size} samples does not divide by "
                f"data {self.layout.data} x micro-batch {self.micro_batch_size}"
            )
        return local_rows(global_batch_size, self.layout, self.rank)


class BatchLoader:
    """Hands out this rank's share of every global batch, in the order that the ledger fixes.

    Global batch number i holds the samples at positions [consumed, consumed + global size); every rank of one data
    coordinate gets the same rows (`keepwarm.parallel.engine.local_rows`). The ledger knows only what `next_batch` has
    returned, not what was read ahead. Used from one thread; owns its background thread until `close`.

    Args:
        sources: by name; every source that is drawn from here on.
        ledger: where to begin. It needs a segment before the first batch (`open_segment`).
        share: whose rows are read.
        global_size_at: global batch size as a function of the samples consumed, for reading ahead.
        prefetch: batches read ahead.
        timeout: seconds that `next_batch` waits for the data, and `close` for the thread.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        ledger: Ledger,
        share: RankShare,
        *,
        global_size_at: Callable[[int], int],
        prefetch: int = 2,
        timeout: float = 600.0,
    ) -> None:
        self._sources = dict(sources)
        self._share = share
        self._global_size_at = global_size_at
        self._prefetch, self._timeout = prefetch, timeout
        self._ahead: Prefetcher[_Prepared] | None = None
        self._by_identity = {source.identity: source for source in sources.values()}
        self._ledger = ledger

    @property
    def ledger(self) -> Ledger:
        """What has been handed out, and the plan of what comes."""
        return self._ledger

    @property
    def consumed(self) -> int:
        """Samples handed out over all ranks: the position of the next one."""
        return self._ledger.position

    def open_segment(
        self,
        mixture: Mapping[str, float],
        *,
        start: int | None = None,
        replay: Sequence[ReplaySpec] = (),
        stage: str | None = None,
        skip: int = 0,
        sequence_length: int | None = None,
    ) -> None:
        """Draw with these weights from `start` on (default: the next sample), in samples of `sequence_length` tokens
        (default: that of the sources); see `Ledger.opened`."""
        sources: Mapping[str, Source] = self._sources
        if sequence_length is not None:
            sources = {name: source.at_length(sequence_length) for name, source in sources.items()}
            self._by_identity |= {source.identity: source for source in sources.values()}
        self._adopt(self._ledger.opened(mixture, sources, start=start, replay=replay, stage=stage, skip=skip))

    def next_batch(self, global_batch_size: int | None = None) -> Batch:
        """This rank's rows of the next global batch; `global_batch_size` defaults to what `global_size_at` says.

        Raises:
            DataError: a file cannot be read or took longer than the deadline, or a source that the ledger draws from
                is not there; names it.
            LayoutError: the size does not divide by data-parallel ranks times micro-batch.
        """
        size = self._global_size_at(self.consumed) if global_batch_size is None else global_batch_size
        prepared = self._take()
        if prepared[:2] != (self.consumed, size):
            self._stop()
            self._start(first_size=size)
            prepared = self._take()
        before = self._ledger
        self._ledger = before.advanced(size)
        if self._share.rank == 0:
            self._warn_of_repeats(before)
        return prepared[2]

    def state(self) -> dict[str, Any]:
        """The ledger as plain values, for a snapshot."""
        return self._ledger.save()

    def restore(self, state: Ledger | Mapping[str, Any]) -> None:
        """Continue where `state` (a ledger, or what `state()` returned) was taken, whatever layout it was taken in.

        Raises:
            CheckpointError: the state is damaged.
        """
        self._adopt(state if isinstance(state, Ledger) else Ledger.load(state))

    def close(self) -> None:
        """End the background thread. The loader can still tell its state."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _adopt(self, ledger: Ledger) -> None:
        self._stop()
        self._ledger = ledger

    def _check_sources(self) -> None:
        """Every source that the ledger is about to draw from must be there, with the same content."""
        if not self._ledger.segments:
            raise ValueError("the ledger has no segment: call open_segment first")
        for segment in self._ledger.upcoming():
            replays = (self._ledger.replays[share.replay] for share in segment.replays)
            again = (identity for replay in replays for identity in replay.identities)
            for identity in (*(share.source for share in segment.shares), *again):
                origin = self._ledger.sources[identity]
                source = self._find(identity)
                if source is None or source.size != origin.size:
                    there = ", ".join(f"{source.name} {source.identity}" for source in self._sources.values())
                    raise DataError(
                        f"the run draws from source {origin.name!r} with content {identity}, but data.sources "
                        f"hold only: {there}; the file was changed or sequence_length is another"
                    )

    def _find(self, identity: str) -> Source | None:
        """The source, at the length of its samples, whatever the lengths of the stages of this job."""
        if identity not in self._by_identity:
            for source in self._sources.values():
                if content_of(source.identity) == content_of(identity):
                    self._by_identity[identity] = source.at_length(length_of(identity))
        return self._by_identity.get(identity)

    def _take(self) -> _Prepared:
        if self._ahead is None:
            self._start(first_size=None)
        assert self._ahead is not None
        try:
            return self._ahead.take(self._timeout)
        except TimeoutError:
            files = ", ".join(self._sources)
            raise DataError(
                f"rank {self._share.rank}: no batch at sample {self.consumed} after {self._timeout:g} s of reading the "
                f"sources {files}; is their file system reachable?"
            ) from None

    def _start(self, first_size: int | None) -> None:
        self._check_sources()
        items = self._batches(self._ledger, first_size)
        self._ahead = Prefetcher(items, self._prefetch, name=f"batches-of-rank-{self._share.rank}")

    def _stop(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            try:
                ahead.close(self._timeout)
            except TimeoutError:
                raise DataError(
                    f"rank {self._share.rank}: reading ahead did not stop within {self._timeout:g} s; "
                    "is the data's file system reachable?"
                ) from None

    def _batches(self, ledger: Ledger, first_size: int | None) -> Iterator[_Prepared]:
        position, size = ledger.position, first_size
        while True:
            size = self._global_size_at(position) if size is None else size
            rows = self._share.rows(size)
            positions = position + np.arange(rows.start, rows.stop, dtype=np.int64)
            yield position, size, _batch(self._read(ledger, positions), self._share.micro_batch_size)
            position, size = position + size, None

    def _read(self, ledger: Ledger, positions: Ints) -> Samples:
        draw = ledger.samples_at(positions)
        whole = np.ones(positions.shape, np.bool_)
        parts, places = [], []
        for cut in draw.cuts:
            rows = np.unique(cut.place)
            whole[rows] = False
            read = [
                (own, self._by_identity[draw.identities[index]].read(cut.k[own], seed=ledger.seed))
                for index in np.unique(cut.source)
                for own in [np.flatnonzero(cut.source == index)]
            ]
            parts.append(assembled(cut, read))
            places.append(rows)
        for index, own in _grouped(draw.source, np.flatnonzero(whole)):
            source = self._by_identity[draw.identities[index]]
            parts.append(source.read(draw.k[own], seed=ledger.seed))
            places.append(own)
        return _joined(parts, np.concatenate(places))

    def _warn_of_repeats(self, before: Ledger) -> None:
        old = before.given()
        for source, now in self._ledger.given().items():
            origin = self._ledger.sources[source]
            done = (now.consumed - 1) // origin.size
            past = (old[source].consumed - 1) // origin.size if source in old else 0
            if done > max(past, 0):
                level = logging.INFO if past > 0 else logging.WARNING
                text = "source %s repeats: epoch %d of its %d samples begins at sample %d of the run"
                log.log(level, text, origin.name, done + 1, origin.size, self._ledger.position)


def _grouped(sources: Ints, rows: Ints) -> Iterator[tuple[int, Ints]]:
    """`rows` by their source; each group ascending."""
    ordered = rows[np.argsort(sources[rows], kind="stable")]
    found = sources[ordered]
    begins = np.flatnonzero(np.diff(found, prepend=-1)).tolist()
    for begin, end in zip(begins, [*begins, len(ordered)][1:], strict=True):
        yield int(found[begin]), ordered[begin:end]


def evaluation_batches(
    source: PackedSource, samples: int, share: RankShare, *, global_batch_size: int
) -> Iterator[Batch]:
    """A rank's batches over the first `samples` windows of a validation source, in the order of the file.

    Every batch has `global_batch_size` rows; those that are missing at the end carry no loss, so that sums over the
    batches do not depend on the layout.
    """
    samples = min(samples, source.size)
    rows = share.rows(global_batch_size)
    for start in range(0, samples, global_batch_size):
        wanted = start + np.arange(rows.start, rows.stop, dtype=np.int64)
        read = source.windows(np.minimum(wanted, samples - 1))
        read.targets[wanted >= samples] = IGNORED
        yield _batch(read, share.micro_batch_size)


def _joined(parts: list[Samples], places: Ints) -> Samples:
    """Samples of several sources, put where they belong."""
    order = np.argsort(places)
    documents = [part.documents for part in parts if part.documents is not None]
    return Samples(
        np.concatenate([part.tokens for part in parts])[order],
        np.concatenate([part.targets for part in parts])[order],
        np.concatenate(documents)[order] if documents else None,
    )


def _batch(samples: Samples, micro_batch_size: int) -> Batch:
    shape = (-1, micro_batch_size, samples.tokens.shape[1])
    return Batch(
        tokens=torch.from_numpy(samples.tokens).reshape(shape),
        targets=torch.from_numpy(samples.targets).reshape(shape),
        documents=None if samples.documents is None else torch.from_numpy(samples.documents).reshape(shape),
    )
