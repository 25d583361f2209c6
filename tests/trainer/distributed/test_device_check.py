"""A product and a sum with known results find devices that compute wrong, and links that corrupt."""

import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
import torch.distributed as dist

from keepwarm.trainer.distributed import device_check, nccl
from keepwarm.trainer.distributed.device_errors import BROKEN
from keepwarm.trainer.distributed.in_process_restart import ControlChannel, Park
from keepwarm.trainer.distributed.world import COLLECTIVE_TIMEOUT, World
from keepwarm.trainer.errors import DeviceBroken, RendezvousFailed
from keepwarm.trainer.job.sections import HealthSpec
from keepwarm.trainer.loop.health_check import HealthCheck
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, device=CPU)


def test_check_healthy_device_passes() -> None:
    device_check.check(ALONE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_one_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = torch.matmul(left, right)
        if product.dtype == getattr(torch, dtype):
            product[17, 5] += product[17, 5] / 64
        return product

    monkeypatch.setattr(device_check, "_multiply", multiply)
    with pytest.raises(DeviceBroken, match=f"rank 0: cpu computes 1 numbers of a {dtype} product wrong") as caught:
        device_check.check(ALONE)
    assert caught.value.exit_code == 1


def _check(corrupt: int) -> str:
    """Check as a rank; the link of one rank corrupts what it receives."""
    rank, real = dist.get_rank(), dist.all_reduce

    def all_reduce(tensor: torch.Tensor) -> None:
        real(tensor)
        if corrupt == rank:
            tensor[3] += 1

    dist.all_reduce = all_reduce  # type: ignore[assignment]
    try:
        device_check.check(World(rank=rank, size=2, local_rank=rank, device=CPU))
    except RendezvousFailed as error:
        return str(error)
    finally:
        dist.all_reduce = real
    return ""


@pytest.mark.dist
def test_check_sum_over_all_ranks_is_known_on_every_rank() -> None:
    assert run_ranks(2, _check, -1) == ["", ""]
    right, wrong = run_ranks(2, _check, 1)
    assert right == ""
    assert wrong.startswith("rank 1: a sum over all 2 ranks is wrong: a device or a link")


def test_callback_checks_every_n_steps_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    run = SimpleNamespace(world=ALONE, state=SimpleNamespace(step=0), job=SimpleNamespace(health=HealthSpec()))
    monkeypatch.setattr(device_check, "check", lambda world: checked.append(run.state.step))
    for every in (None, 3):
        run.job.health = HealthSpec(device_check_every=every)
        for run.state.step in range(8):
            HealthCheck().before_step(run)  # type: ignore[arg-type]
    assert checked == [3, 6]


@pytest.mark.parametrize(("in_process", "handling"), [(False, "3"), (True, "0")])
def test_settings_of_nccl_leave_errors_to_torch_unless_workers_restart_in_place(
    monkeypatch: pytest.MonkeyPatch, in_process: bool, handling: str
) -> None:
    for name in nccl.SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_ENABLE_MONITORING", "0")
    nccl.configure(in_process=in_process)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == handling
    assert os.environ["TORCH_NCCL_ENABLE_MONITORING"] == "0"  # the user's
    assert float(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > COLLECTIVE_TIMEOUT.total_seconds()


def test_settings_of_nccl_are_listed_in_the_documentation() -> None:
    text = (Path(__file__).parents[3] / "docs" / "gpu.md").read_text()
    for name, value in {**nccl.SETTINGS, "TORCH_NCCL_ENABLE_TIMING": "1", "TORCH_FR_BUFFER_SIZE": "20000"}.items():
        assert f"`{name}={value}`" in text


def test_interrupt_aborts_nccl_before_it_shuts_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """What NCCL computes after an abort is garbage: nothing of such a step may be recorded."""
    order: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: order.append("abort"))
    monkeypatch.setattr("keepwarm.trainer.distributed.world._shut", lambda descriptor: order.append("shut"))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda device: order.append("device"))
    world = World(rank=0, size=2, local_rank=0, device=torch.device("cuda", 0))
    world.check_interrupted()
    with socket.socket():
        world.interrupt()
    assert order[:2] == ["device", "abort"]
    assert "shut" in order
    with pytest.raises(RuntimeError, match="a collective was aborted"):
        world.check_interrupted()


def test_broken_gpu_does_not_wait_for_an_order_to_park() -> None:
    """Its process cannot use the GPU again."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asked = threading.Event()

    def train() -> None:
        with control.training(asked.set):
            assert asked.wait(60.0)
            raise torch.AcceleratorError(f"CUDA error: {BROKEN[214]}")

    with ours:
        with theirs:
            control = ControlChannel(ours)
            theirs.send(msgspec.json.encode(Park()))
            with pytest.raises(torch.AcceleratorError, match=BROKEN[214]):
                train()
        for thread in threading.enumerate():  # it reads from this end until the other one is closed
            if thread.name == "control":
                thread.join(60.0)
