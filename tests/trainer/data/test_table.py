from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.trainer.data.table import table
from keepwarm.trainer.data.weights import UNITS, quantise
from keepwarm.trainer.errors import SpecError

mixtures = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.floats(0.1, 1000), min_size=1, max_size=6)
unit_tuples = st.lists(st.integers(1, 400), min_size=1, max_size=7).map(tuple)


@given(mixtures)
def test_quantise_weights_sum_and_stay_close(mixture: dict[str, float]) -> None:
    units = quantise(mixture)
    total = sum(Fraction(weight) for weight in mixture.values())
    assert sum(units.values()) == UNITS
    assert list(units) == sorted(mixture)
    for name, weight in mixture.items():
        assert abs(units[name] - Fraction(weight) / total * UNITS) < 1


def test_quantise_is_independent_of_order() -> None:
    assert quantise({"a": 1, "b": 2}) == quantise({"b": 4, "a": 2})


@pytest.mark.parametrize("weights", [{"big": 1.0, "tiny": 1e-6}, {"big": 65536.0, "tiny": 0.9999}])
def test_quantise_weight_below_one_unit_is_refused(weights: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=r"mixture\.tiny .* smallest share"):
        quantise(weights)


def test_quantise_smallest_weight_is_kept() -> None:
    assert quantise({"big": 65535.0, "tiny": 1.0}) == {"big": 65535, "tiny": 1}


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}])
def test_quantise_invalid_weight_is_refused(weights: dict[str, float]) -> None:
    with pytest.raises(SpecError, match="mixture"):
        quantise(weights)


def _deviation(units: tuple[int, ...]) -> Fraction:
    """Largest distance of any prefix, over one period, from its exact share."""
    turns = table(units).turns
    worst = Fraction(0)
    for source, unit in enumerate(units):
        given_so_far = np.cumsum(turns == source)
        # Exact in integers: |given * total - unit * t|.
        distance = np.abs(given_so_far * sum(units) - unit * np.arange(1, len(turns) + 1)).max()
        worst = max(worst, Fraction(int(distance), sum(units)))
    return worst


@settings(deadline=None)
@given(unit_tuples)
def test_table_every_prefix_stays_within_tijdeman_bound(units: tuple[int, ...]) -> None:
    sources = len(units)
    assert _deviation(units) <= (1 - Fraction(1, 2 * sources - 2) if sources > 1 else 0)


@pytest.mark.parametrize("weights", [(0.9, 0.09, 0.01), (5, 4, 3, 2, 1), (0.5, 0.3, 0.1, 0.05, 0.05), (65535, 1)])
def test_table_whole_period_keeps_shares(weights: tuple[float, ...]) -> None:
    units = tuple(quantise({chr(97 + i): w for i, w in enumerate(weights)}).values())
    assert _deviation(units) < 1


@settings(deadline=None)
@given(unit_tuples, st.integers(0, 10**12), st.integers(1, 50))
def test_table_random_access_equals_counting(units: tuple[int, ...], start: int, count: int) -> None:
    order = table(units)
    positions = np.arange(start, start + count)
    sources, numbers = order.samples_at(positions)
    given_before = list(order.counts_before(start))
    assert sum(given_before) == start
    for position, source, number in zip(positions.tolist(), sources.tolist(), numbers.tolist(), strict=True):
        assert list(order.counts_before(position)) == given_before
        assert number == given_before[source]
        given_before[source] += 1


def test_table_period_is_minimal() -> None:
    assert table((32768, 32768)).period == 2
    assert table((49152, 16384)).period == 4
    for one, next_one in pairwise(table((1, 1)).turns.tolist() * 3):
        assert one != next_one
