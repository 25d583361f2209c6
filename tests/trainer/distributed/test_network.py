"""Ranks that cannot reach each other end with one sentence that names the variable and what there is."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from keepwarm.trainer.distributed import world
from keepwarm.trainer.errors import SpecError

KNOWN = ["lo", "eth0", "ib0", "ib1"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"GLOO_SOCKET_IFNAME": "eth0"},
        {"GLOO_SOCKET_IFNAME": "ib0,ib1"},
        {"NCCL_SOCKET_IFNAME": "ib"},
        {"NCCL_SOCKET_IFNAME": "^docker"},
        {"NCCL_SOCKET_IFNAME": "=eth0,ens1"},
    ],
)
def test_check_interfaces_existing_ones_are_accepted(environment: dict[str, str]) -> None:
    world.check_interfaces(environment, KNOWN, cuda=True)


@pytest.mark.parametrize(
    "environment",
    [
        {"GLOO_SOCKET_IFNAME": "ens1"},
        {"GLOO_SOCKET_IFNAME": "ib"},
        {"GLOO_SOCKET_IFNAME": "eth0,ens1"},
        {"NCCL_SOCKET_IFNAME": "ens"},
        {"NCCL_SOCKET_IFNAME": "=ib"},
    ],
)
def test_check_interfaces_others_are_refused_with_those_that_exist(environment: dict[str, str]) -> None:
    (name, value), *_ = environment.items()
    with pytest.raises(SpecError, match=f"{name}={value}: .* has no such network interface: lo, eth0, ib0, ib1"):
        world.check_interfaces(environment, KNOWN, cuda=True)


def test_check_interfaces_of_nccl_do_not_matter_without_a_gpu() -> None:
    world.check_interfaces({"NCCL_SOCKET_IFNAME": "ens"}, KNOWN, cuda=False)


RANK = """
import sys
from keepwarm.parallel.spec import NumericsSpec
from keepwarm.trainer.distributed import world
from keepwarm.trainer.errors import TrainerError
world.NAME_TIMEOUT_S = 0.0
try:
    world.join(2, NumericsSpec())
except TrainerError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("variables", "code", "words"),
    [
        ({"GLOO_SOCKET_IFNAME": "nope0"}, 2, f"GLOO_SOCKET_IFNAME=nope0: {socket.gethostname()} has no such"),
        ({"MASTER_ADDR": "no-such-host.invalid"}, 2, "MASTER_ADDR=no-such-host.invalid: no such host"),
        ({"MASTER_PORT": "http"}, 2, "MASTER_PORT=http: expected a whole number"),
        ({"MASTER_PORT": "99999"}, 2, "MASTER_PORT=99999"),
        ({"RANK": "-1"}, 2, "RANK=-1: expected a whole number"),
    ],
)
def test_join_unusable_network_is_refused_in_one_sentence(
    variables: dict[str, str], code: int, words: str, tmp_path: Path
) -> None:
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KEEPWARM")}
    ran = subprocess.run(
        [sys.executable, "-P", "-c", RANK], env=environment | launcher | variables, cwd=tmp_path, timeout=60,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.count("\n")) == (code, 1), ran.stderr
    assert words in ran.stdout
    assert "Traceback" not in ran.stderr


def test_join_port_in_use_says_where_the_ranks_were_to_meet(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as held:
        launcher = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        launcher["MASTER_PORT"] = str(held.getsockname()[1])
        environment = {key: value for key, value in os.environ.items() if not key.startswith("KEEPWARM")}
        ran = subprocess.run(
            [sys.executable, "-P", "-c", RANK], env=environment | launcher, cwd=tmp_path, timeout=60,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert ran.returncode == 1
    assert ran.stdout.startswith("the ranks do not reach each other at MASTER_ADDR=127.0.0.1: ")
