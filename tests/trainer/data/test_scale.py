"""A source of 10^9 samples costs no more memory than a small one: a synthetic index, no data."""

import tracemalloc
from dataclasses import dataclass

import numpy as np

from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.packing import PackedSource
from keepwarm.trainer.data.spec import ReplaySpec
from keepwarm.trainer.data.table import Ints
from tests.support.corpus import counting_source

SAMPLES, LENGTH = 10**9, 128


@dataclass(frozen=True)
class Endless:
    """Tokens that are their own place in the stream."""

    count: int = SAMPLES * LENGTH + 1
    path: str = "endless"
    content: str = "endless"

    def read(self, start: int, count: int) -> Ints:
        return np.arange(start, start + count)

    def prefixes_between(self, start: int, end: int) -> list[tuple[int, int]]:
        return []

    def starts_between(self, start: int, end: int) -> Ints:
        return np.arange(-(-start // 1000) * 1000, end, 1000)


def peak_of(source: PackedSource) -> int:
    """Bytes at most, for opening, planning replay of everything seen and drawing from the far end."""
    small = counting_source("small", 50)
    tracemalloc.start()
    try:
        sources = {"large": source, "small": small}
        seen = source.size * 3 // 4
        ledger = Ledger(seed=1).opened({"large": 1.0}, sources, stage="first").advanced(seen)
        replay = [ReplaySpec(fraction=0.25), ReplaySpec(fraction=0.25, distribution="power", exponent=0.5)]
        ledger = ledger.opened({"large": 1.0, "small": 1.0}, sources, stage="second", replay=replay)
        draw = ledger.samples_at(seen + source.size // 5 + np.arange(256))
        assert (draw.k[draw.replayed] < seen).all()
        samples = source.read(draw.k[draw.source == 0], seed=1)
        assert (samples.targets == samples.tokens + 1).all()
        assert ledger.advanced(256).save()["position"] == seen + 256
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_packed_source_memory_is_independent_of_sample_count() -> None:
    large = PackedSource("large", Endless(), LENGTH)
    assert large.size == SAMPLES
    less = PackedSource("large", Endless(count=10**4 * LENGTH + 1), LENGTH)
    peak_of(less)
    assert peak_of(large) <= 1.5 * peak_of(less) + 2**20
