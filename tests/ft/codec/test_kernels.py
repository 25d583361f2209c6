"""Kernels by name: those of other distributions, in real agents and a real run, and what is refused."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keepwarm.ft.codec.galois import NumpyKernel
from keepwarm.ft.codec.kernel import KERNELS, Region
from keepwarm.ft.codec.reed_solomon import Codec
from keepwarm.ft.errors import AgentError, KernelUnavailable
from keepwarm.ft.spec import CodeSpec
from tests.support import outside_kernel
from tests.support.ft.nodes import BUCKET, Nodes, equal, nodes, random_state, together
from tests.support.runs.node_run import runs
from tests.support.runs.registered import registered


@pytest.fixture
def register() -> Iterator[Callable[[str, Any], None]]:
    """Registers kernels of this process, for the length of a test."""
    with contextlib.ExitStack() as stack:
        yield lambda name, make: stack.enter_context(registered(KERNELS, name, make))


def test_agents_outside_kernel_codes_and_repairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside_kernel.install(tmp_path / "outside", monkeypatch)
    with nodes(tmp_path, 3, groups=[((0, 1, 2), 1)], state_bytes=1 << 20, kernel=outside_kernel.NAME) as world:
        world.commit([random_state(rank, 3) for rank in range(3)], 5)
        coded = {pid for pid, operation, size in outside_kernel.calls(tmp_path / "outside") if size == BUCKET}
        assert coded == set(world.pids.values())
        world.kill(1)
        world.start(1)
        fresh = [random_state(rank, 3, seed=9) for rank in range(3)]
        restored = together(lambda each: each.restore(2), world.snapshotters(fresh))
        assert [each.step for each in restored] == [5, 5, 5]
        assert all(equal(state, random_state(rank, 3)) for rank, state in enumerate(fresh))
    decoded = {op for _, op, size in outside_kernel.calls(tmp_path / "outside") if op == "multiply" and size > 1000}
    assert decoded == {"multiply"}


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_job_kernel_key_reaches_the_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside_kernel.install(tmp_path / "outside", monkeypatch)
    options = ("parallel.data=2", "stages.0.tokens=4096", f"snapshot.code={{kernel: {outside_kernel.NAME}}}")
    with runs(tmp_path) as begin:
        begin("--nodes", "2", *options, cold=True).done()
    found = [call for call in outside_kernel.calls(tmp_path / "outside") if call[2] != 1000]
    assert len({pid for pid, _, _ in found}) == 2
    assert {operation for _, operation, _ in found} == {"accumulate"}


def test_agent_unknown_kernel_is_refused_at_start(tmp_path: Path) -> None:
    world = Nodes(tmp_path, 1, kernel="isall")
    with pytest.raises(AgentError, match=r"unknown codec kernel 'isall'; did you mean 'isal'\?"):
        world.start(0)


def test_spec_unknown_kernel_lists_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'isal'\? there are: isal, numpy, auto"):
        CodeSpec(kernel="isall")
    assert CodeSpec(kernel="numpy").kernel == "numpy"


def test_kernel_of_another_field_is_refused(register: Callable[[str, Any], None]) -> None:
    class Crooked(NumpyKernel):
        """Right in all but the last byte of what it adds."""

        def accumulate(self, tables: Any, column: int, source: Region, output: Region) -> None:
            super().accumulate(tables, column, source, output)
            output[0].cast("B")[-1] ^= 1

    register("crooked", Crooked)
    with pytest.raises(KernelUnavailable, match="'crooked' does not compute"):
        Codec(2, 1, kernel="crooked")


def test_kernel_that_cannot_start_is_refused(register: Callable[[str, Any], None]) -> None:
    def broken() -> NumpyKernel:
        raise OSError("no such device")

    register("broken", broken)
    with pytest.raises(KernelUnavailable, match="'broken' cannot be used: no such device"):
        Codec(2, 1, kernel="broken")
