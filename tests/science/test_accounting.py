"""A3: compute-equivalent replay counts exactly, whatever stops the run and however it is laid out."""

import json

import numpy as np
import pytest

from keepwarm.parallel.mesh.layout import Layout
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.loader import BatchLoader, RankShare
from keepwarm.trainer.data.spec import ReplaySpec
from keepwarm.trainer.job.sections import BatchSpec
from tests.support.corpus import counting_source

pytestmark = pytest.mark.science

SOURCES = {"en": counting_source("en", 500), "de": counting_source("de", 700, first=100_000)}
BATCH = BatchSpec(global_batch_size=8)
FIRST, SECOND = 160, 240
"""Samples of stage 0 and of each later one."""
LAWS = {
    "uniform": {"distribution": "uniform"},
    "power": {"distribution": "power", "exponent": 1.0},
}


def loader_of(ledger: Ledger, data: int = 1, rank: int = 0) -> BatchLoader:
    layout = Layout(data=data, pipeline=1, tensor=1, ranks_per_node=data)
    return BatchLoader(
        SOURCES,
        ledger,
        RankShare(layout=layout, rank=rank, micro_batch_size=1),
        global_size_at=lambda _: BATCH.global_batch_size,
        timeout=60,
    )


def planned(loader: BatchLoader, fraction: float, law: str) -> None:
    """English, then German twice with replay: every stage that is not over."""
    replay = (ReplaySpec.model_validate({"from": ("first",), "fraction": fraction, **LAWS[law]}),) if fraction else ()
    for name, begin, end, mixture in (
        ("first", 0, FIRST, {"en": 1.0}),
        ("second", FIRST, FIRST + SECOND, {"de": 1.0}),
        ("third", FIRST + SECOND, FIRST + 2 * SECOND, {"de": 1.0}),
    ):
        if end > loader.consumed:
            start = max(begin, loader.consumed)
            loader.open_segment(mixture, start=start, stage=name, replay=() if name == "first" else replay)


def stream(fraction: float, law: str, stops: tuple[tuple[int, int], ...]) -> list[int]:
    """First token of every sample, in order; at each stop (position, data-parallel ranks) the run is killed and its
    saved state goes on with that many ranks."""
    state = json.dumps(Ledger(seed=3).save())
    seen: list[int] = []
    for until, data in stops:
        loaders = [loader_of(Ledger.load(json.loads(state)), data, rank) for rank in range(data)]
        for loader in loaders:
            planned(loader, fraction, law)
        while loaders[0].consumed < until:
            for loader in loaders:
                seen += loader.next_batch().tokens[..., 0].reshape(-1).tolist()
        state = json.dumps(loaders[-1].state())
        for loader in loaders:
            loader.close()
    return seen


WHOLE = ((FIRST + 2 * SECOND, 1),)
KILLED = ((72, 2), (FIRST + 40, 4), (FIRST + 104, 1), (FIRST + SECOND + 8, 8), (FIRST + 2 * SECOND, 2))


@pytest.mark.parametrize("law", LAWS)
def test_a3_stop_with_other_data_sizes_gives_same_stream(law: str) -> None:
    assert stream(0.25, law, KILLED) == stream(0.25, law, WHOLE)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.05, 0.25, 0.5])
def test_a3_replay_has_exact_budget_share_and_origin(fraction: float, law: str) -> None:
    seen = np.array(stream(fraction, law, WHOLE))
    assert len(seen) == FIRST + 2 * SECOND
    first, second, third = np.split(seen, [FIRST, FIRST + SECOND])
    assert (first < 100_000).all()
    for stage in (second, third):
        again = stage[stage < 100_000]
        assert abs(len(again) - fraction * SECOND) <= 1
        assert set(again.tolist()) <= set(first.tolist())
    if fraction == 0.5:
        orders = [stage[stage < 100_000].tolist() for stage in (second, third)]
        assert orders[0] != orders[1]
        if law == "uniform":
            assert len(set(orders[0])) == len(orders[0])
