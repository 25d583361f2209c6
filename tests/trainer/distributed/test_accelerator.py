"""Whole runs on a device that is not the CPU: training, snapshots while it goes on, and the loss of a worker.

Its kernels are those of the CPU, so that the bits are too. Its copies to the host come as late as they may.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.rows import TINY, losses_of
from tests.gpu_stand_in import accelerator
from tests.support.runs.run_contents import tensors_of

SHAPE = ("stages.0.tokens=2560", "evaluation.samples=2", "log.tensorboard=false", "cluster.max_restarts=1")
SNAPSHOTS = ("snapshot.every=1", "snapshot.bucket=65536")
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of processes that have the device."""
    return accelerator.build(tmp_path_factory.mktemp("accelerator"))


def run(variables: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-P", *arguments]
    ended = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def train(variables: dict[str, str], output: Path, *more: str) -> tuple[list[float], dict[str, str]]:
    """Return the losses of a run, and the checksums of what it stored."""
    run(variables, "-m", "keepwarm", "train", str(TINY), *SHAPE, *SNAPSHOTS, f"output={output}", *more)
    stored = {str(place): checksum for place, checksum in tensors_of(output).items()}
    return losses_of(output).tolist(), stored


COPIES = """
import torch
from tests.gpu_stand_in.accelerator import NAME
device, side = torch.device(NAME, 1), torch.Stream(f"{NAME}:1")
torch.accelerator.set_device_index(device)
source = torch.full((3,), 7.0, device=device)
asked = torch.Event(device)

target = torch.zeros(3, pin_memory=True)
assert target.is_pinned() and not torch.zeros(3).is_pinned()
with side:
    target.copy_(source, non_blocking=True)
    asked.record(side)
assert target.tolist() == [0, 0, 0], "a copy is there before it was waited for"
source += 1
asked.synchronize()
assert target.tolist() == [8, 8, 8], "a copy beside other work brings what is there when it is made"

target.copy_(source, non_blocking=True)
assert target.tolist() == [8, 8, 8]
source += 1
torch.accelerator.synchronize()
assert target.tolist() == [8, 8, 8], "work of the same stream overtook a copy"

target.zero_()
with side:
    target.copy_(source, non_blocking=True)
torch.accelerator.current_stream().wait_stream(side)
assert target.tolist() == [0, 0, 0], "the host has not waited"
source += 1
assert target.tolist() == [9, 9, 9], "a stream did not wait for another one"

torch.zeros(3).copy_(source, non_blocking=True)
assert torch.ops.standin.late_copies() == 3, "only copies to pinned memory are late"

drawn = torch.rand(3, device=device)
torch.manual_seed(4)
assert not torch.equal(torch.rand(3, device=device), drawn)
state = torch.get_device_module(device).get_rng_state(device)
drawn = torch.rand(3, device=device)
torch.rand(3), torch.rand(3, device=f"{NAME}:0")
torch.get_device_module(device).set_rng_state(state, device)
assert torch.equal(torch.rand(3, device=device), drawn), "the CPU or another device drew with its generator"
"""


def test_accelerator_stand_in_copies_late_and_draws_with_generators_of_its_own(variables: dict[str, str]) -> None:
    run(variables, "-c", COPIES)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((), id="one rank", marks=pytest.mark.long),
        pytest.param(("parallel.data=2",), id="two ranks, fsdp"),
    ],
)
def test_accelerator_trains_to_the_bits_of_the_cpu(
    shape: tuple[str, ...], variables: dict[str, str], tmp_path: Path
) -> None:
    losses, stored = train(variables, tmp_path / "device", *shape)
    expected, reference = train(variables, tmp_path / "cpu", "cluster.device=cpu", *shape)
    assert losses == expected
    generators = {place for place in stored if "random.standin." in place}
    assert generators  # it did train there
    assert {place: checksum for place, checksum in stored.items() if place not in generators} == reference


def test_accelerator_run_whose_worker_is_killed_ends_with_the_same_bits(
    variables: dict[str, str], tmp_path: Path
) -> None:
    drill = ["-m", "keepwarm", "drill", str(TINY), *SHAPE, *SNAPSHOTS, f"output={tmp_path / 'drill'}"]
    found = json.loads(run(variables, *drill, "--kill", "worker:0@3", "--json"))
    assert found["bitwise_equal"], found["differences"]
    assert [fault["level"] for fault in found["faults"]] == ["local"]
