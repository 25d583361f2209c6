"""Which rank stores what: together they store every byte, whatever else each of them holds."""

import math
from collections import defaultdict

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.ft.worker.snapshotter import plan_part
from keepwarm.parallel.shard import Shard


@settings(max_examples=60, deadline=None)
@given(
    own=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    elements=st.lists(st.sampled_from([0, 1, 7, 1000, 16_384, 20_001]), min_size=1, max_size=4),
    data=st.data(),
)
def test_snapshot_plan_every_byte_is_stored_by_one_replica(
    own: list[int], elements: list[int], data: st.DataObject
) -> None:
    """`own` tensors of each rank's own come before those that several ranks hold, as with pipeline stages."""
    ranks = range(len(own))
    holders = [sorted(data.draw(st.sets(st.sampled_from(ranks), min_size=1))) for _ in elements]
    stored: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for rank in ranks:
        state = {f"own.{rank}.{index}": shard(f"own.{rank}.{index}", 3, [rank]) for index in range(own[rank])}
        for index, (size, who) in enumerate(zip(elements, holders, strict=True)):
            if rank in who:
                state[f"shared.{index}"] = shard(f"shared.{index}", size, who)
        for piece, _ in plan_part(state, rank, 4096).entries:
            stored[piece.name].append(piece.flat or (0, math.prod(piece.shape)))
    for index, size in enumerate(elements):
        covered = sorted(one for one in stored[f"shared.{index}"] if one[0] < one[1])
        assert [start for start, _ in covered] == [0, *(stop for _, stop in covered)][: len(covered)]
        assert (covered[-1][1] if covered else 0) == size
    for rank in ranks:
        assert all(stored[f"own.{rank}.{index}"] == [(0, 3)] for index in range(own[rank]))


def shard(name: str, size: int, replicas: list[int]) -> Shard:
    return Shard(
        name=name, global_shape=(size,), offsets=(0,), shape=(size,), local=torch.zeros(size), replicas=tuple(replicas)
    )  # fmt: skip
