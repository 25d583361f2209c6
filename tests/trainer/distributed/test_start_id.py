"""Ranks that start again and again over one store agree on a name for each start, whatever earlier ones left in it."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore

from keepwarm.trainer.distributed.start_id import agree
from keepwarm.trainer.errors import TrainerError

DEADLINE = timedelta(seconds=60)


def test_start_id_every_start_is_unique() -> None:
    store = HashStore()
    names = set()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = set(pool.map(lambda rank: agree(store, rank, 4, DEADLINE), [3, 1, 0, 2]))
            assert len(found) == 1
            names |= found
    assert len(names) == 5


def test_start_id_ranks_that_died_early_do_no_harm() -> None:
    store = HashStore()
    store.set("keepwarm/hello/1", "dead")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(agree, store, 0, 2, DEADLINE)
        assert store.get("keepwarm/name/dead")  # answered, and never confirmed
        assert agree(store, 1, 2, DEADLINE) == first.result(60)


def test_start_id_missing_ranks_are_named() -> None:
    store = HashStore()
    with pytest.raises(TrainerError, match=r"rank 0: waited .* for ranks 1, 2 to start"):
        agree(store, 0, 3, timedelta(seconds=0.05))
    with pytest.raises(TrainerError, match=r"rank 1: waited .* for rank 0"):
        agree(store, 1, 3, timedelta(seconds=0.05))
