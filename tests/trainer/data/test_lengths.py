"""Stages of different sequence lengths: what is replayed keeps its recorded length and is packed or split into rows."""

import json
from dataclasses import replace

import numpy as np
import pytest

from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.loader import BatchLoader, RankShare
from keepwarm.trainer.data.packing import PackedSource
from keepwarm.trainer.data.spec import ReplaySpec
from keepwarm.trainer.errors import DataError
from tests.support.corpus import MemoryTokens, counting_source

OLD, NEW = counting_source("old", 240), counting_source("new", 400, first=100_000)
SOURCES = {"old": OLD, "new": NEW}
FIRST, SECOND = 40, 64


def clause(**values: object) -> ReplaySpec:
    return ReplaySpec.model_validate({"from": ("first",), "fraction": 0.5, **values})


LAWS = {"uniform": clause(), "power": clause(distribution="power", exponent=0.5)}


def rows(
    lengths: tuple[int, int], law: str, stops: tuple[tuple[int, int], ...], sources: dict[str, PackedSource] = SOURCES
) -> tuple[list[list[int]], list[list[int]], Ledger]:
    """Tokens and targets of every row of the second stage, killed at each stop: (position, data-parallel ranks)."""
    state = json.dumps(Ledger(seed=3).save())
    found: dict[int, tuple[list[int], list[int]]] = {}
    for until, data in stops:
        layout = Layout(data=data, pipeline=1, tensor=1, ranks_per_node=data)
        for rank in range(data):
            loader = BatchLoader(
                sources, Ledger.load(json.loads(state)), RankShare(layout=layout, rank=rank, micro_batch_size=1),
                global_size_at=lambda _: 8, timeout=60,
            )  # fmt: skip
            with loader:
                for name, start, end, mixture, length, replay in (
                    ("first", 0, FIRST, {"old": 1.0}, lengths[0], ()),
                    ("second", FIRST, FIRST + SECOND, {"new": 1.0}, lengths[1], (LAWS[law],)),
                ):
                    if end > loader.consumed:
                        begin = max(start, loader.consumed)
                        loader.open_segment(mixture, start=begin, stage=name, replay=replay, sequence_length=length)
                while loader.consumed < until:
                    position = loader.consumed
                    batch = loader.next_batch()
                    if position >= FIRST:
                        width = batch.tokens.shape[-1]
                        both = zip(batch.tokens.reshape(-1, width).tolist(), batch.targets.reshape(-1, width).tolist(),
                                   strict=True)  # fmt: skip
                        for place, row in enumerate(both, position + rank * 8 // data):
                            found[place] = row
                after = json.dumps(loader.state())
                ledger = loader.ledger
        state = after
    tokens, targets = zip(*(found[place] for place in sorted(found)), strict=True)
    return list(tokens), list(targets), ledger


WHOLE = ((FIRST + SECOND, 1),)
KILLED = ((24, 2), (FIRST + 16, 4), (FIRST + 40, 1), (FIRST + SECOND, 8))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("lengths", [(4, 12), (4, 6), (12, 4), (6, 4), (5, 3)])
def test_lengths_replayed_samples_are_packed_in_order(lengths: tuple[int, int], law: str) -> None:
    old, new = lengths
    tokens, targets, ledger = rows(lengths, law, WHOLE)
    again = [row for row in tokens if row[0] < 100_000]
    assert len(again) == SECOND // 2
    assert all(len(row) == new for row in tokens)
    (replay,) = ledger.replays
    assert replay.cut == (old, new)
    draws = -(-len(again) * new // old)
    source, k = replay.draw(np.arange(draws))
    assert set(source.tolist()) == {0}
    stream = OLD.at_length(old).read(k, seed=3).tokens.reshape(-1)
    assert np.array_equal(np.concatenate(again), stream[: len(again) * new])
    seen = set(ledger.samples_at(np.arange(FIRST)).k.tolist())
    assert set(k.tolist()) <= seen
    for row, following in zip(tokens, targets, strict=True):
        assert following == [token + 1 for token in row]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("lengths", [(4, 12), (12, 4), (5, 3)])
def test_lengths_stop_inside_a_stage_gives_bitwise_same_rows(lengths: tuple[int, int], law: str) -> None:
    assert rows(lengths, law, KILLED)[:2] == rows(lengths, law, WHOLE)[:2]


def test_lengths_document_mask_ends_documents_at_pieces() -> None:
    documents = tuple(tuple(range(first, first + 7)) for first in range(0, 700, 7))
    old = PackedSource("old", MemoryTokens(documents), 4, document_mask=True)
    sources = {"old": old, "new": replace(NEW, document_mask=True)}
    layout = Layout(data=1, pipeline=1, tensor=1, ranks_per_node=1)
    loader = BatchLoader(
        sources, Ledger(seed=3), RankShare(layout=layout, rank=0, micro_batch_size=8), global_size_at=lambda _: 8
    )
    with loader:
        loader.open_segment({"old": 1.0}, stage="first")
        for _ in range(5):
            loader.next_batch()
        loader.open_segment({"new": 1.0}, stage="second", replay=[clause()], sequence_length=12)
        batch = loader.next_batch()
    assert batch.documents is not None
    rows = zip(
        *(values.reshape(8, 12).tolist() for values in (batch.tokens, batch.targets, batch.documents)), strict=True
    )
    for tokens, targets, numbers in rows:
        if tokens[0] >= 100_000:
            continue
        for column in range(12):
            begins = column > 0 and (column % 4 == 0 or tokens[column] % 7 == 0)
            assert numbers[column] == (numbers[column - 1] + begins if column else 0)
            last = tokens[column] % 7 == 6
            assert targets[column] == (IGNORED if last else tokens[column] + 1)


def test_lengths_samples_of_two_lengths_need_two_clauses() -> None:
    layout = Layout(data=1, pipeline=1, tensor=1, ranks_per_node=1)
    loader = BatchLoader(
        SOURCES, Ledger(seed=3), RankShare(layout=layout, rank=0, micro_batch_size=8), global_size_at=lambda _: 8
    )
    with loader:
        for stage, length in (("first", 4), ("second", 8)):
            loader.open_segment({"old": 1.0}, stage=stage, sequence_length=length)
            loader.next_batch()
        with pytest.raises(DataError, match="samples of 4 and 8 tokens were seen there; write one clause"):
            loader.open_segment({"new": 1.0}, stage="third", replay=[ReplaySpec(fraction=0.25)], sequence_length=8)
        both = [clause(fraction=0.25), ReplaySpec.model_validate({"from": ("second",), "fraction": 0.25})]
        loader.open_segment({"new": 1.0}, stage="third", replay=both, sequence_length=8)
        loader.next_batch()


def test_lengths_skipped_samples_are_skipped_once() -> None:
    ledger = Ledger(seed=3).opened({"old": 1.0}, SOURCES, stage="first").advanced(10)
    planned = ledger.opened({"old": 1.0, "new": 1.0}, SOURCES, start=20, stage="second", skip=7)
    later = planned.opened({"old": 3.0, "new": 1.0}, SOURCES, start=40, stage="second", skip=7)
    shares = {share.source: share.offset for share in later.segments[1].shares}
    assert shares == {OLD.identity: 27, NEW.identity: 7}
    assert {share.source: share.offset for share in later.segments[2].shares} == {OLD.identity: 37, NEW.identity: 17}
    inside = later.advanced(25)
    assert inside.opened({"old": 1.0, "new": 1.0}, SOURCES, start=35, stage="second", skip=7) == planned.advanced(25)
    assert later.opened({"old": 1.0, "new": 1.0}, SOURCES, start=20, stage="second", skip=7) == planned
