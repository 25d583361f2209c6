from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.parallel.targets import IGNORED
from keepwarm.trainer.data.packing import PackedSource
from keepwarm.trainer.errors import DataError
from tests.support.corpus import MemoryTokens, counting_source

corpora = st.lists(
    st.lists(st.integers(0, 99), max_size=7).map(tuple), min_size=1, max_size=12
).map(tuple)  # fmt: skip


def _naive(documents: tuple[tuple[int, ...], ...], length: int, masked: bool) -> list[tuple[list[int], ...]]:
    """Token by token: inputs, targets and document numbers of every whole window."""
    flat = [(token, number) for number, document in enumerate(documents) for token in document]
    samples = []
    for begin in range(0, len(flat) - length, length):
        window = flat[begin : begin + length + 1]
        tokens = [token for token, _ in window[:-1]]
        crossing = [a[1] != b[1] for a, b in pairwise(window)]
        targets = [
            IGNORED if masked and cross else token for (token, _), cross in zip(window[1:], crossing, strict=True)
        ]
        numbers = [sum(crossing[:i]) for i in range(length)]
        samples.append((tokens, targets, numbers))
    return samples


@settings(deadline=None)
@given(corpora, st.integers(1, 6), st.booleans())
def test_packing_windows_equal_token_by_token_packing(
    documents: tuple[tuple[int, ...], ...], length: int, masked: bool
) -> None:
    total = sum(map(len, documents))
    expected = _naive(documents, length, masked)
    if not expected:
        with pytest.raises(DataError, match="too few"):
            PackedSource("x", MemoryTokens(documents), length, masked)
        return
    source = PackedSource("x", MemoryTokens(documents), length, masked)
    assert source.size == len(expected)
    assert source.size * length + 1 + source.dropped == total
    found = source.windows(np.arange(source.size))
    for row, (tokens, targets, numbers) in enumerate(expected):
        assert found.tokens[row].tolist() == tokens
        assert found.targets[row].tolist() == targets
        if masked:
            assert found.documents is not None
            assert found.documents.dtype == np.int32
            assert found.documents[row].tolist() == numbers
        else:
            assert found.documents is None


def test_packing_epoch_has_every_sample_once() -> None:
    source = counting_source("x", 30)
    epochs = source.read(np.arange(60), seed=1).tokens[:, 0] // 4
    assert sorted(epochs[:30].tolist()) == sorted(epochs[30:].tolist()) == list(range(30))
    assert epochs[:30].tolist() != epochs[30:].tolist()
