"""What `keepwarm train` says at the start."""

import os

import pytest

from keepwarm.launch.local import train
from keepwarm.launch.local.train import idle_cores


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "sentence"),
    [
        (8, 1, 1, "1 of 8 cores is used; numerics.threads_per_rank=8 uses all"),
        (8, 2, 2, "4 of 8 cores are used; numerics.threads_per_rank=4 uses all"),
        (8, 3, 1, "3 of 8 cores are used; numerics.threads_per_rank=2 uses 6"),
        (8, 8, 1, None),
        (8, 5, 1, None),
        (2, 8, 1, None),
        (8, 1, 16, None),
    ],
)
def test_idle_cores_are_named_with_the_key(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: int, sentence: str | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(train, "gpu_count", lambda: 0)
    assert idle_cores(ranks, threads) == sentence


@pytest.mark.parametrize("gpus", [1, 8])
def test_idle_cores_do_not_matter_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(train, "gpu_count", lambda: gpus)
    assert idle_cores(1, 1) is None
