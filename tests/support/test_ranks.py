"""The process harness itself: what it returns, and what it says when a rank fails."""

import os
import warnings

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.dist


def _sum_of_ranks(scale: float) -> tuple[int, torch.Tensor, np.ndarray, int]:
    total = torch.full((3,), scale * dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), total, np.arange(2), os.getpid()


def _raise_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the second rank is unwell")
    dist.barrier()


def _hang_on_rank_one() -> None:
    if dist.get_rank() == 1:
        _wait_for_nobody()


def _wait_for_nobody() -> None:
    dist.barrier()


def _exit_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _crash_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), 11)
    dist.barrier()


def _warn() -> None:
    warnings.warn("careful", UserWarning, stacklevel=1)


def _pid_server_threads_and_own_threads() -> tuple[int, int, int]:
    return os.getpid(), psutil.Process(os.getppid()).num_threads(), torch.get_num_threads()


def test_run_ranks_results_are_in_rank_order() -> None:
    results = run_ranks(2, _sum_of_ranks, 2.0)
    assert [rank for rank, *_ in results] == [0, 1]
    for _, total, array, _ in results:
        assert total.tolist() == [2.0, 2.0, 2.0]
        assert array.tolist() == [0, 1]


def test_run_ranks_processes_are_reused_with_one_thread() -> None:
    before = run_ranks(2, _pid_server_threads_and_own_threads)
    assert run_ranks(2, _pid_server_threads_and_own_threads) == before
    assert {(server, own) for _, server, own in before} == {(1, 1)}


def test_run_ranks_exception_names_its_rank_and_ends_the_others() -> None:
    pids = [pid for *_, pid in run_ranks(2, _sum_of_ranks, 1.0)]
    with pytest.raises(RankFailure, match=r"rank 1 of 2 raised:[\s\S]*_raise_on_rank_one[\s\S]*rank is unwell"):
        run_ranks(2, _raise_on_rank_one)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    run_ranks(2, _sum_of_ranks, 1.0)


def test_run_ranks_hanging_rank_is_named_with_its_stack() -> None:
    with pytest.raises(RankFailure, match=r"ranks \[1\] of 2 not finished after 2 s[\s\S]*_wait_for_nobody"):
        run_ranks(2, _hang_on_rank_one, deadline=2.0)


def test_run_ranks_exit_is_named_with_its_code() -> None:
    with pytest.raises(RankFailure, match="rank 1 of 2 exited with code 7"):
        run_ranks(2, _exit_on_rank_one)


def test_run_ranks_crash_is_named_with_signal_and_stack() -> None:
    with pytest.raises(RankFailure, match=r"rank 1 of 2 was ended by SIGSEGV[\s\S]*_crash_on_rank_one"):
        run_ranks(2, _crash_on_rank_one)


def test_run_ranks_warning_fails_the_rank() -> None:
    with pytest.raises(RankFailure, match="UserWarning: careful"):
        run_ranks(1, _warn)
