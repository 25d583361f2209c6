"""Mesh arithmetic without processes."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.parallel.errors import LayoutError
from keepwarm.parallel.mesh.axes import AXES
from keepwarm.parallel.mesh.layout import Layout, check_micro_batches, split_layers, stages_of
from keepwarm.parallel.spec import ParallelSpec

sizes = st.integers(1, 6)
layouts = st.builds(
    lambda data, pipeline, tensor, groups: Layout(
        data=data, pipeline=pipeline, tensor=tensor, ranks_per_node=tensor * (groups if pipeline % groups == 0 else 1)
    ),
    sizes,
    sizes,
    sizes,
    sizes,
)


@given(layouts)
def test_layout_ranks_and_coordinates_are_a_bijection(layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [layout.rank_at(at) for at in places] == list(range(layout.world_size))
    assert set(places) == set(itertools.product(range(layout.data), range(layout.pipeline), range(layout.tensor)))


@given(layouts, st.sampled_from(AXES))
def test_layout_groups_of_an_axis_partition_the_world(layout: Layout, axis: str) -> None:
    groups = layout.groups(axis)
    assert sorted(itertools.chain(*groups)) == list(range(layout.world_size))
    for group in groups:
        assert [getattr(layout.coordinates(rank), axis) for rank in group] == list(range(getattr(layout, axis)))
        assert len({layout.coordinates(rank)._replace(**{axis: 0}) for rank in group}) == 1


@given(layouts)
def test_layout_groups_of_two_axes_meet_in_one_rank(layout: Layout) -> None:
    for a, b in itertools.combinations(AXES, 2):
        of_a = {rank: set(group) for group in layout.groups(a) for rank in group}
        of_b = {rank: set(group) for group in layout.groups(b) for rank in group}
        assert all(of_a[rank] & of_b[rank] == {rank} for rank in range(layout.world_size))


@pytest.mark.parametrize(("data", "ranks"), [(8, 2240), (10, 2800), (12, 3360)])
def test_layout_megatron_turing_placement_matches_paper(data: int, ranks: int) -> None:
    layout = Layout.of(ParallelSpec(tensor=8, pipeline=35, data=data), ranks_per_node=8)
    assert (layout.world_size, layout.nodes) == (ranks, ranks // 8)
    for group in layout.groups("tensor"):
        assert len({layout.node_of(rank) for rank in group}) == 1
    for group in layout.groups("pipeline"):
        nodes = [layout.node_of(rank) for rank in group]
        assert all(b - a == 1 for a, b in itertools.pairwise(nodes))
    for group in layout.groups("data"):
        nodes = [layout.node_of(rank) for rank in group]
        assert len(set(nodes)) == data
        assert all(b - a == 35 for a, b in itertools.pairwise(nodes))


def test_layout_tensor_group_over_two_nodes_is_refused() -> None:
    with pytest.raises(LayoutError, match="tensor group would span two nodes"):
        Layout.of(ParallelSpec(tensor=3, data=4), ranks_per_node=4)
    with pytest.raises(LayoutError, match=r"= 6 ranks do not fill whole nodes of cluster.ranks_per_node = 4"):
        Layout.of(ParallelSpec(tensor=2, data=3), ranks_per_node=4)


@pytest.mark.parametrize("rank", [-1, 8])
def test_layout_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(LayoutError, match=f"rank {rank} is outside the world of 8 ranks"):
        Layout.of(ParallelSpec(data=8)).coordinates(rank)


@given(st.integers(1, 4), st.sampled_from(["1f1b", "interleaved", "zero_bubble"]))
def test_layout_stages_are_assigned_round_robin(pipeline: int, schedule: str) -> None:
    spec = ParallelSpec(pipeline=pipeline, schedule=schedule)  # type: ignore[arg-type]
    dealt = [stages_of(coordinate, spec) for coordinate in range(pipeline)]
    assert sorted(itertools.chain(*dealt)) == list(range(spec.stages))
    assert 0 in dealt[0]
    assert spec.stages - 1 in dealt[-1]
    layers = split_layers(3 * spec.stages, spec)
    assert list(itertools.chain(*layers)) == list(range(3 * spec.stages))


def test_layout_uneven_layer_split_is_followed() -> None:
    spec = ParallelSpec(pipeline=2, layer_split=(1, 3))
    assert split_layers(4, spec) == [range(0, 1), range(1, 4)]
    with pytest.raises(LayoutError, match=re.escape("must hold 2 numbers that add up to model.layers = 5")):
        split_layers(5, spec)
    with pytest.raises(LayoutError, match=r"model.layers = 5 does not divide by 2 pipeline stages"):
        split_layers(5, ParallelSpec(pipeline=2))


def test_layout_micro_batches_unsuited_to_schedule_are_refused() -> None:
    check_micro_batches(1, ParallelSpec(schedule="interleaved"))
    check_micro_batches(4, ParallelSpec(pipeline=4))
    with pytest.raises(LayoutError, match="needs at least 4 micro-batches per data-parallel rank, got 3"):
        check_micro_batches(3, ParallelSpec(pipeline=4))
    for schedule in ("interleaved", "zero_bubble"):
        spec = ParallelSpec(pipeline=2, schedule=schedule)  # type: ignore[arg-type]
        for count in (1, 2, 3, 4, 6):
            check_micro_batches(count, spec)
        with pytest.raises(LayoutError, match=r"runs 5 micro-batches .* in 2 rounds .* choose a multiple of 2"):
            check_micro_batches(5, spec)
