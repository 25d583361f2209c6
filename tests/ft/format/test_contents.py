"""Filling one layout from another: every element once, from whatever pieces there are."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.ft.errors import IncompleteError
from keepwarm.ft.format.contents import Piece, as_bytes, boxes, move_bytes, plan, split


def content(piece: Piece, whole: Any) -> Any:
    part = whole[tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.shape, strict=True))]
    flat = np.ascontiguousarray(part).reshape(-1)
    return flat if piece.flat is None else flat[piece.flat[0] : piece.flat[1]].copy()


def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    points = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
    return list(itertools.pairwise(points)) or [(0, 0)]


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], dtype: str) -> list[Piece]:
    """A partition of a tensor into boxes, each cut into flat ranges or not."""
    grid: list[list[tuple[int, int]]] = [[]]
    for size in shape:
        grid = [[*before, cut] for before in grid for cut in cuts(draw, size)]
    pieces = []
    for box in grid:
        extent = tuple(b - a for a, b in box)
        flats = [None] if draw(st.booleans()) else cuts(draw, math.prod(extent))
        pieces += [
            Piece(name="w", global_shape=shape, offsets=tuple(a for a, _ in box), shape=extent, dtype=dtype, flat=flat)
            for flat in flats
        ]
    return pieces


@st.composite
def pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], str, list[Piece], list[Piece]]:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    dtype = draw(st.sampled_from(["F32", "BF16", "I64", "U8"]))
    return shape, dtype, draw(layouts(shape, dtype)), draw(layouts(shape, dtype))


@given(pairs(), st.randoms(use_true_random=False))
def test_plan_any_layout_is_filled_from_any_other(case: Any, random: Any) -> None:
    shape, dtype, old, new = case
    width = {"F32": np.uint32, "BF16": np.uint16, "I64": np.uint64, "U8": np.uint8}[dtype]
    whole = np.arange(math.prod(shape)).astype(width).reshape(shape)
    random.shuffle(old)
    for piece in new:
        out = np.full(piece.elements, 255, width)
        moved = 0
        for move in plan(piece, old):
            source = as_bytes(content(old[move.source], whole))
            start, stop = move.span
            move_bytes(move, source[start:stop], out.view(np.uint8))
            moved += math.prod(move.shape)
        assert moved == piece.elements
        np.testing.assert_array_equal(out, content(piece, whole))


@given(pairs(), st.integers(1, 64))
def test_split_moves_copy_the_same_and_read_little_at_once(case: Any, limit: int) -> None:
    shape, dtype, old, new = case
    width = {"F32": np.uint32, "BF16": np.uint16, "I64": np.uint64, "U8": np.uint8}[dtype]
    whole = np.arange(math.prod(shape)).astype(width).reshape(shape)
    for piece in new:
        out = np.full(piece.elements, 255, width)
        for move in plan(piece, old):
            source = as_bytes(content(old[move.source], whole))
            for part in split(move, limit):
                start, stop = part.span
                assert stop - start <= max(limit, move.item_size)
                move_bytes(part, source[start:stop], out.view(np.uint8))
        np.testing.assert_array_equal(out, content(piece, whole))


@given(pairs())
def test_boxes_hold_elements_in_order(case: Any) -> None:
    shape, _, pieces, _ = case
    whole = np.arange(math.prod(shape)).reshape(shape)
    for piece in pieces:
        seen = [
            whole[tuple(slice(o, o + s) for o, s in zip(b.offsets, b.shape, strict=True))].reshape(-1)
            for b in boxes(piece)
        ]
        assert len(seen) <= max(1, 2 * len(shape) - 1)
        np.testing.assert_array_equal(np.concatenate([*seen, np.empty(0, whole.dtype)]), content(piece, whole))


def piece(**change: Any) -> Piece:
    return Piece(**{"name": "w", "global_shape": (4, 4), "offsets": (0, 0), "shape": (4, 4), "dtype": "F32"} | change)


def test_plan_hole_is_named() -> None:
    with pytest.raises(IncompleteError, match=r"w: no stored piece holds \[2, 4\] at \[2, 0\]"):
        plan(piece(), [piece(shape=(2, 4))])


def test_plan_another_model_is_refused() -> None:
    with pytest.raises(IncompleteError, match="another model"):
        plan(piece(), [piece(global_shape=(4, 5), shape=(4, 5))])


@pytest.mark.parametrize(
    "wrong", [{"dtype": "F31"}, {"offsets": (1, 0)}, {"flat": (0, 17)}, {"flat": (3, 2)}, {"shape": (4,)}]
)
def test_piece_outside_its_tensor_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="w: "):
        piece(**wrong)
