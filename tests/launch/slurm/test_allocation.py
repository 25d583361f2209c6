"""Which nodes of an allocation take part, and why others do not; tests/slurm has it on real nodes."""

import socket
import threading

import pytest

from keepwarm.launch.run import network_check
from keepwarm.launch.slurm.allocation import culprit, left_out
from keepwarm.trainer.monitor.events import BatchStarted, NodeExcluded


@pytest.mark.parametrize(
    ("line", "node"),
    [
        ("srun: error: node1: task 3: Killed\n", "node1"),
        ("srun: error: gpu-07: tasks 8-15: Exited with exit code 1\n", "gpu-07"),
        ("srun: error: n2: tasks 1,[4-6]: Aborted\n", "n2"),
        ("srun: error: n2: task 1: Exited with exit code 130\n", None),
        ("srun: error: n2: task 1: Terminated\n", None),
        ("srun: error: Node failure on node1\n", None),
        ("srun: Job step aborted: Waiting up to 22 seconds for job step to finish.\n", None),
        ("iteration 3: srun: error: node1: task 3: Killed\n", None),
    ],
)
def test_culprit_srun_line_names_the_failed_node(line: str, node: str | None) -> None:
    assert culprit(line) == node


def test_excluded_nodes_stay_out_until_resubmission() -> None:
    start, requeued = (BatchStarted(slurm_job="7", nodes=("n1", "n2"), requeues=count) for count in (0, 1))
    gone = NodeExcluded(host="n1", why="its workers ended 3 starts")
    unfit = NodeExcluded(host="n2", why="does not answer", slurm_job="7")
    assert left_out([start, gone, unfit, requeued]) == {"n1": "its workers ended 3 starts"}
    assert left_out([start, gone, start]) == {}


def test_network_check_echo_serves_many_at_once() -> None:
    found: list[tuple[float | None, str | None]] = []
    with network_check.echo("127.0.0.1") as address:
        threads = [threading.Thread(target=lambda: found.append(network_check.ask(address))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [wrong for _, wrong in found] == [None] * 4
    assert all(speed is not None and speed > 0 for speed, _ in found)
    speed, wrong = network_check.ask(address)
    assert speed is None
    assert f"cannot reach {address}" in str(wrong)


def test_network_check_lost_bytes_are_noticed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def deaf() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"x" * 100)
                connection.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=deaf)
        thread.start()
        speed, wrong = network_check.ask(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join(60)
    assert speed is None
    assert wrong is not None


def test_network_check_apart_names_the_unreachable_node() -> None:
    fine = dict.fromkeys(["n0", "n1", "n2", "n3"])
    assert network_check.apart(fine, "n0") == {}
    assert network_check.apart(fine | {"n2": "cannot"}, "n0") == {"n2": "cannot"}
    assert network_check.apart(fine | {"n1": "cannot", "n3": "cannot"}, "n0") == {"n0": "is not reached by n1, n3"}
    assert network_check.apart({"n0": None, "n1": "cannot"}, "n0") == {"n1": "cannot"}
