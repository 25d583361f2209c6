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
    """The rows of every global batch that belong to a rank, and the number of samples per micro-batch."""

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
    """Hands out this rank's share of every global batch, in the order fixed by the ledger.

    Global batch i holds the samples at positions [consumed, consumed + global size); all ranks with the same data
    coordinate get the same rows (`keepwarm.parallel.engine.local_rows`). The ledger records only what `next_batch` has
    returned, not what was read ahead. Use from one thread; owns its background thread until `close`.

    Args:
        sources: by name; every source that is drawn from here on.
        ledger: the position to start at. Needs a segment before the first batch (`open_segment`).
        share: the rows to read.
        global_size_at: global batch size as a function of the samples consumed, for reading ahead.
        prefetch: number of batches to read ahead.
        timeout: seconds that `next_batch` waits for data, and `close` for the thread.
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
        """Return the ledger: what was handed out, and the plan of what follows."""
        return self._ledger

    @property
    def consumed(self) -> int:
        """Number of samples handed out over all ranks, which is the position of the next one."""
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
        (default: the sources' own); see `Ledger.opened`.
        """
        sources: Mapping[str, Source] = self._sources
        if sequence_length is not None:
            sources = {name: source.at_length(sequence_length) for name, source in sources.items()}
            self._by_identity |= {source.identity: source for source in sources.values()}
        self._adopt(self._ledger.opened(mixture, sources, start=start, replay=replay, stage=stage, skip=skip))

    def next_batch(self, global_batch_size: int | None = None) -> Batch:
        """Return this rank's rows of the next global batch; `global_batch_size` defaults to `global_size_at(consumed)`.

        Raises:
            DataError: a file cannot be read or took too long, or a source of the ledger is missing; names it.
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
        """Return the ledger as plain values, for a snapshot."""
        return self._ledger.save()

    def restore(self, state: Ledger | Mapping[str, Any]) -> None:
        """Continue from `state` (a ledger, or what `state()` returned), whatever layout saved it.

        Raises:
            CheckpointError: the state is damaged.
        """
        self._adopt(state if isinstance(state, Ledger) else Ledger.load(state))

    def close(self) -> None:
        """Stop the background thread. `state` stays usable."""
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
        """Check that every source that the ledger is about to draw from is present, with the same content."""
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
                        f"only contain: {there}; the file or sequence_length has changed"
                    )

    def _find(self, identity: str) -> Source | None:
        """Return the source with the ledger's sample length, which need not be that of a stage of this job."""
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
    """Group `rows` by source; each group ascending."""
    ordered = rows[np.argsort(sources[rows], kind="stable")]
    grouped = sources[ordered]
    begins = np.flatnonzero(np.diff(grouped, prepend=-1)).tolist()
    for begin, end in zip(begins, [*begins, len(ordered)][1:], strict=True):
        yield int(grouped[begin]), ordered[begin:end]


def evaluation_batches(
    source: PackedSource, samples: int, share: RankShare, *, global_batch_size: int
) -> Iterator[Batch]:
    """Yield a rank's batches over the first `samples` windows of a validation source, in file order.

    Every batch has `global_batch_size` rows; rows missing at the end carry no loss, so that sums over the batches do
    not depend on the layout.
    """
    samples = min(samples, source.size)
    rows = share.rows(global_batch_size)
    for start in range(0, samples, global_batch_size):
        wanted = start + np.arange(rows.start, rows.stop, dtype=np.int64)
        read = source.windows(np.minimum(wanted, samples - 1))
        read.targets[wanted >= samples] = IGNORED
        yield _batch(read, share.micro_batch_size)


def _joined(parts: list[Samples], places: Ints) -> Samples:
    """Merge samples of several sources in their target order."""
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
