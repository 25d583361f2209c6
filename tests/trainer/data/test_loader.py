import itertools
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.parallel.engine import Batch
from keepwarm.parallel.errors import LayoutError
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.loader import BatchLoader, RankShare, evaluation_batches
from keepwarm.trainer.data.packing import PackedSource, Samples
from keepwarm.trainer.data.prefetch import Prefetcher
from keepwarm.trainer.data.table import Ints
from keepwarm.trainer.errors import CheckpointError, DataError
from tests.support.corpus import MemoryTokens, counting_source, random_documents, write_token_file

SOURCES = {"a": counting_source("a", 40), "b": counting_source("b", 300, first=10_000)}
MIXTURE = {"a": 3.0, "b": 1.0}
LEDGER = Ledger(seed=5).opened(MIXTURE, SOURCES)


def _layout(data: int, pipeline: int = 1, tensor: int = 1) -> Layout:
    return Layout(data=data, pipeline=pipeline, tensor=tensor, ranks_per_node=data * pipeline * tensor)


def _ramp(consumed: int) -> int:
    """Global batch sizes 8, then 16 from sample 32 on."""
    return 8 if consumed < 32 else 16


def _loader(
    ledger: Ledger | None = None, *, data: int = 1, rank: int = 0, micro_batch_size: int = 2, prefetch: int = 2
) -> BatchLoader:
    return BatchLoader(
        SOURCES,
        LEDGER if ledger is None else ledger,
        RankShare(layout=_layout(data), rank=rank, micro_batch_size=micro_batch_size),
        global_size_at=_ramp,
        prefetch=prefetch,
        timeout=30,
    )


def _first_tokens(batch: Batch) -> list[int]:
    """One token of each sample, in the order of the rows; tells source and window."""
    return batch.tokens[..., 0].reshape(-1).tolist()


def _stream(
    ledger: Ledger, until: int, *, data: int = 1, micro_batch_size: int = 2
) -> tuple[list[int], list[dict[str, object]]]:
    """Samples from the ledger's position to `until`, put together from all data ranks; and the ranks' last states."""
    loaders = [_loader(ledger, data=data, rank=rank, micro_batch_size=micro_batch_size) for rank in range(data)]
    seen: list[int] = []
    while loaders[0].consumed < until:
        for loader in loaders:
            seen += _first_tokens(loader.next_batch())
    for loader in loaders:
        loader.close()
    return seen, [loader.state() for loader in loaders]


REFERENCE, _ = _stream(LEDGER, 4 * 8 + 12 * 16)


@pytest.mark.parametrize(("data", "micro_batch_size"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_loader_samples_are_independent_of_layout_and_micro_batch(data: int, micro_batch_size: int) -> None:
    seen, states = _stream(LEDGER, 192, data=data, micro_batch_size=micro_batch_size)
    assert seen == REFERENCE[:192]
    assert all(state == states[0] for state in states)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4])), min_size=1, max_size=4))
def test_loader_continued_with_another_data_size_gives_same_stream(stops: list[tuple[int, int]]) -> None:
    """Each run takes some batches and is continued, from its saved state alone, with other data-parallel ranks."""
    state, seen = LEDGER.save(), []
    for batches, data in stops:
        ledger = Ledger.load(json.loads(json.dumps(state)))
        until = ledger.position
        for _ in range(batches):
            until += _ramp(until)
        part, states = _stream(ledger, until, data=data, micro_batch_size=1)
        seen, state = seen + part, states[-1]
    assert seen == REFERENCE[: len(seen)]


def test_loader_pipeline_and_tensor_ranks_share_the_batch() -> None:
    layout = _layout(2, 2, 2)
    batches = []
    for rank in range(layout.world_size):
        with BatchLoader(
            SOURCES, LEDGER, RankShare(layout=layout, rank=rank, micro_batch_size=2), global_size_at=_ramp, timeout=30
        ) as loader:
            batches.append(loader.next_batch())
    for rank, batch in enumerate(batches):
        assert torch.equal(batch.tokens, batches[4 * layout.coordinates(rank).data].tokens)
    assert [*_first_tokens(batches[0]), *_first_tokens(batches[4])] == REFERENCE[:8]


def test_loader_batch_has_documented_shapes_and_types() -> None:
    documents = tuple(tuple(document) for document in random_documents(3, 40, longest=9))
    source = PackedSource("a", MemoryTokens(documents), 6, True)
    ledger = Ledger(seed=1).opened({"a": 1}, {"a": source})
    with BatchLoader(
        {"a": source},
        ledger,
        RankShare(layout=_layout(2), rank=1, micro_batch_size=2),
        global_size_at=lambda _: 12,
        timeout=30,
    ) as loader:
        batch = loader.next_batch()
    assert batch.documents is not None
    assert batch.tokens.shape == batch.targets.shape == batch.documents.shape == (3, 2, 6)
    assert (batch.tokens.dtype, batch.targets.dtype, batch.documents.dtype) == (torch.int64, torch.int64, torch.int32)
    crossing = batch.documents[..., 1:] != batch.documents[..., :-1]
    assert torch.equal(batch.targets[..., :-1] == IGNORED, crossing)
    kept = batch.targets[..., :-1] != IGNORED
    assert torch.equal(batch.targets[..., :-1][kept], batch.tokens[..., 1:][kept])


def test_loader_ledger_counts_only_delivered_samples() -> None:
    with _loader(prefetch=4) as loader:
        loader.next_batch()
        loader.next_batch()
        assert loader.consumed == 16
        assert sum(given.consumed for given in loader.ledger.given().values()) == 16


def test_loader_unexpected_batch_size_is_served() -> None:
    with _loader() as loader:
        seen = [token for size in (8, 4, 4, 16) for token in _first_tokens(loader.next_batch(size))]
    assert seen == REFERENCE[:32]


def test_loader_new_mixture_starts_with_next_sample() -> None:
    with _loader() as loader:
        before = _first_tokens(loader.next_batch())
        loader.open_segment({"b": 1.0})
        after = _first_tokens(loader.next_batch())
    assert before == REFERENCE[:8]
    assert min(after) >= 10_000
    drawn_before = [token for token in before if token >= 10_000]
    assert not set(after) & set(drawn_before)


def test_loader_restore_goes_back() -> None:
    with _loader() as loader:
        loader.next_batch()
        state = loader.state()
        first = _first_tokens(loader.next_batch())
        loader.next_batch()
        loader.restore(state)
        assert _first_tokens(loader.next_batch()) == first


def test_loader_damaged_state_is_refused() -> None:
    with _loader() as loader, pytest.raises(CheckpointError):
        loader.restore({"position": 3})


def test_loader_changed_data_are_refused_on_resume() -> None:
    changed = {**SOURCES, "a": counting_source("a", 41)}
    loader = BatchLoader(
        changed, LEDGER, RankShare(layout=_layout(1), rank=0, micro_batch_size=1), global_size_at=_ramp
    )
    with loader, pytest.raises(DataError, match=r"source 'a'.*the file or sequence_length has changed"):
        loader.next_batch()


def test_loader_ledger_without_a_segment_is_refused() -> None:
    with _loader(Ledger(seed=1)) as loader, pytest.raises(ValueError, match="open_segment"):
        loader.next_batch()


@pytest.mark.parametrize("size", [0, 6, 7])
def test_loader_batch_that_does_not_divide_is_refused(size: int) -> None:
    with _loader(data=2) as loader, pytest.raises(LayoutError, match=f"global batch of {size} samples"):
        loader.next_batch(size)


def test_loader_repeating_source_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "keepwarm.trainer.data.loader"), _loader() as loader:
        while loader.consumed < 192:
            loader.next_batch()
    # Three quarters of the samples are from the 40 of `a`: epochs end after 40, 80 and 120 of 144.
    assert [(record.levelname, record.args[:2]) for record in caplog.records] == [  # type: ignore[index]
        ("WARNING", ("a", 2)),
        ("INFO", ("a", 3)),
        ("INFO", ("a", 4)),
    ]


def test_loader_repeating_source_on_other_ranks_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    with _loader(data=2, rank=1) as loader:
        while loader.consumed < 192:
            loader.next_batch()
    assert not caplog.records


def test_loader_bad_token_is_reported_with_its_file(tmp_path: Path) -> None:
    documents = [[1] * 50, [1] * 20 + [99] + [1] * 20]
    source = PackedSource("a", TokenFile(write_token_file(tmp_path / "c", documents), 50), 10)
    ledger = Ledger(seed=1).opened({"a": 1}, {"a": source})
    loader = BatchLoader(
        {"a": source},
        ledger,
        RankShare(layout=_layout(1), rank=0, micro_batch_size=1),
        global_size_at=lambda _: source.size,
        timeout=30,
    )
    with loader, pytest.raises(DataError, match=r"c\.bin: token id 99"):
        loader.next_batch()


@dataclass
class _Gate:
    """A source that reads only when it is let."""

    name: str = "gate"
    identity: str = "gate/4"
    size: int = 100
    sequence_length: int = 4
    open: threading.Event = field(default_factory=threading.Event)

    def read(self, k: Ints, *, seed: int) -> Samples:
        self.open.wait(30)
        zeros = np.zeros((len(k), 4), np.int64)
        return Samples(zeros, zeros.copy(), None)


def test_loader_waiting_for_data_has_a_deadline() -> None:
    gate = _Gate()
    ledger = Ledger(seed=1).opened({"gate": 1}, {"gate": gate})
    loader = BatchLoader(
        {"gate": gate},
        ledger,
        RankShare(layout=_layout(1), rank=0, micro_batch_size=1),
        global_size_at=lambda _: 2,
        timeout=0.01,
    )
    with pytest.raises(DataError, match=r"rank 0: no batch at sample 0 after 0\.01 s of reading the sources gate"):
        loader.next_batch()
    with pytest.raises(DataError, match="did not stop"):
        loader.close()
    gate.open.set()


def test_loader_close_ends_the_thread() -> None:
    before = set(threading.enumerate())
    loader = _loader()
    loader.next_batch()
    assert any(thread.name == "batches-of-rank-0" for thread in set(threading.enumerate()) - before)
    loader.close()
    loader.close()
    assert set(threading.enumerate()) <= before
    assert loader.state()["position"] == 8


def test_prefetcher_stays_within_its_depth() -> None:
    """The thread may hold `depth` finished items and one in the making."""
    made = itertools.count()
    reached = threading.Event()

    def items() -> Iterator[int]:
        for number in made:
            if number == 3:
                reached.set()
            yield number

    ahead = Prefetcher(items(), 3, "test")
    assert reached.wait(30)
    assert ahead.take(30) == 0
    ahead.close(30)
    assert next(made) <= 6


def test_prefetcher_failure_comes_after_earlier_items() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise DataError("file: broken")

    ahead = Prefetcher(items(), 5, "test")
    assert ahead.take(30) == 1
    for _ in range(2):
        with pytest.raises(DataError, match="file: broken"):
            ahead.take(30)
    ahead.close(30)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.sampled_from([(1, 1, 4), (2, 1, 4), (4, 1, 8), (2, 3, 12)]))
def test_evaluation_every_layout_covers_the_same_targets(samples: int, how: tuple[int, int, int]) -> None:
    data, micro_batch_size, global_batch_size = how
    source = SOURCES["a"]
    wanted = source.windows(np.arange(min(samples, source.size))).targets
    counts, targets = [], []
    for rank in range(data):
        batches = list(
            evaluation_batches(
                source,
                samples,
                RankShare(layout=_layout(data), rank=rank, micro_batch_size=micro_batch_size),
                global_batch_size=global_batch_size,
            )
        )
        counts.append([batch.tokens.shape for batch in batches])
        targets += [row for batch in batches for row in batch.targets.reshape(-1, 4).tolist()]
    assert all(count == counts[0] for count in counts)
    kept = [row for row in targets if row != [IGNORED] * 4]
    assert sorted(kept) == sorted(wanted.tolist())
