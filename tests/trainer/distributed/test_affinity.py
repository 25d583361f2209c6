"""Ranks on GPUs run on the CPUs near them, by drawn trees of /sys; other processes of the node on all."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.ft.memory.cpus import CPUS, format_cpus, near_cpus, parse_cpus, unbound_cpus
from keepwarm.launch.plan.plan import Plan
from keepwarm.launch.plan.rank_cpus import gpus_of, lines, rank_cpus
from keepwarm.launch.plan.text import print_plan
from keepwarm.trainer.distributed.affinity import choose
from keepwarm.trainer.job.files import load_job

CPU_SETS = st.frozensets(st.integers(0, 40), max_size=40)


def tree(sysfs: Path, near: Sequence[str], driver: str = "nvidia") -> list[str]:
    """Make devices of a driver, each with its list of near CPUs, and return their addresses."""
    found = []
    (sysfs / "bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
    for number, cpus in enumerate(near):
        address = f"0000:{16 * number + 0x19:02x}:00.0"
        device = sysfs / "bus/pci/devices" / address
        device.mkdir(parents=True)
        (device / "local_cpulist").write_text(cpus + "\n")
        (device / "driver").symlink_to(Path("../../drivers") / driver)
        found.append(address)
    return found


@given(CPU_SETS)
def test_cpus_list_of_the_kernel_is_read_as_written(cpus: frozenset[int]) -> None:
    assert parse_cpus(format_cpus(cpus) + "\n") == cpus


def test_cpus_list_has_the_form_of_the_kernel() -> None:
    assert format_cpus({0, 1, 2, 8, 10, 11}) == "0-2,8,10-11"
    assert parse_cpus("0-47,96-143\n") == {*range(48), *range(96, 144)}


@given(CPU_SETS, CPU_SETS.filter(len), st.integers(1, 4))
def test_choose_takes_allowed_cpus_alone_and_enough_of_them(
    near: frozenset[int], allowed: frozenset[int], threads: int
) -> None:
    choice = choose(near, allowed, threads)
    assert choice.cpus in (allowed, near & allowed)
    assert choice.cpus <= allowed
    assert len(choice.cpus) >= min(threads, len(allowed))
    # There is something to say only where near ones exist, and others are taken.
    assert bool(choice.why) == (bool(near) and len(near & allowed) < threads and choice.cpus != near & allowed)


def test_near_cpus_unknown_device_or_kernel_has_none(tmp_path: Path) -> None:
    (address,) = tree(tmp_path, [""])
    assert near_cpus(address, tmp_path) == near_cpus("0000:00:00.0", tmp_path) == frozenset()
    (tmp_path / "bus/pci/devices" / address / "local_cpulist").write_text("unknown\n")
    assert near_cpus(address, tmp_path) == frozenset()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ["0-3"] * 4 + ["4-7"] * 4),
        (["cluster.device=cpu"], []),
        (["cluster.numa=off"], []),
        (["numerics.threads_per_rank=5"], ["0-7"] * 8),
    ],
)
def test_plan_ranks_of_two_sockets_get_their_own(tmp_path: Path, overrides: list[str], expected: list[str]) -> None:
    tree(tmp_path, ["0-3"] * 4 + ["4-7"] * 4)
    shape = ["parallel.data=8", "batch.global_batch_size=8"]
    job = load_job(Path("ci/tiny"), [*shape, *overrides])
    here = rank_cpus(job, set(range(8)), tmp_path)
    assert [one.cpus for one in here] == expected
    assert [bool(one.why) for one in here] == ["threads" in "".join(overrides)] * len(here)
    if not overrides:
        assert "  here rank 4 of a node, on GPU 0000:59:00.0: 4-7" in lines(job, here)


def test_plan_names_the_ranks_whose_cpus_are_on_the_other_socket(tmp_path: Path) -> None:
    """As where a batch system has bound them to cores without asking where the GPUs are."""
    tree(tmp_path, ["0-3", "4-7"])
    job = load_job(Path("ci/tiny"), ["parallel.data=2"])
    first, second = rank_cpus(job, {0, 1}, tmp_path)
    assert (first.cpus, first.why) == ("0-1", "")
    assert second.cpus == "0-1"
    assert second.why.startswith("of the CPUs 4-7 near its GPU it may use none")


def test_plan_devices_of_other_drivers_are_no_gpus(tmp_path: Path) -> None:
    tree(tmp_path, ["0-3"], driver="mlx5_core")
    assert gpus_of(tmp_path) == []


def test_plan_text_says_what_each_rank_gets(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(Plan(load_job(Path("ci/tiny"), ["numerics.threads_per_rank=2"])))
    print_plan(Plan(load_job(Path("ci/tiny"), ["cluster.device=cpu"])))
    text = capsys.readouterr().out
    assert "2 threads (numerics.threads_per_rank); with a GPU, bound to those near it (cluster.numa: auto)" in text
    assert "CPUs of each rank: 1 thread (numerics.threads_per_rank)\n" in text


RANK = """
import os, subprocess, sys, threading
from pathlib import Path
from keepwarm.trainer.distributed.affinity import bind_near
end = threading.Event()
thread = threading.Thread(target=end.wait)
thread.start()
first = bind_near(sys.argv[1], 1, Path(sys.argv[2]))
again = bind_near(sys.argv[1], 1, Path(sys.argv[2]))
assert first == again and not first.why, (first, again)
for task in os.listdir("/proc/self/task"):
    assert os.sched_getaffinity(int(task)) == first.cpus, task
end.set()
AGENT = "import os; from keepwarm.ft.memory.cpus import unbind; unbind(); print(*sorted(os.sched_getaffinity(0)))"
print(*sorted(first.cpus), flush=True)
subprocess.run([sys.executable, "-c", AGENT], check=True)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_rank_is_bound_with_all_its_threads_and_its_agent_is_not(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    (address,) = tree(tmp_path, [format_cpus(allowed[:1])])
    environment = {key: value for key, value in os.environ.items() if key != CPUS}
    command = [sys.executable, "-c", RANK, address, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert [[int(cpu) for cpu in line.split()] for line in ended.stdout.splitlines()] == [allowed[:1], allowed]


def test_unbound_cpus_are_those_of_the_process_unless_it_was_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CPUS, raising=False)
    assert unbound_cpus() == os.sched_getaffinity(0)
    monkeypatch.setenv(CPUS, "0-5")
    assert unbound_cpus() == set(range(6))
    monkeypatch.setenv(CPUS, "all")
    assert unbound_cpus() == os.sched_getaffinity(0)
