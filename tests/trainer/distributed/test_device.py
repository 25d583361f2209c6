"""All ranks take the same kind of device, or all end with one sentence that names the ranks and the host at fault."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from keepwarm.trainer.distributed import world
from keepwarm.trainer.distributed.device import Request, Seen, agree, decide, index_of, look
from keepwarm.trainer.errors import DeviceBroken, RendezvousFailed, SpecError
from keepwarm.trainer.job.cluster import KubernetesSpec, SlurmSpec
from keepwarm.trainer.job.sections import ClusterSpec

DEADLINE = timedelta(seconds=60)
CUDA = Request(device="cuda", key="cluster.slurm.gpus_per_node = 2")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def node(host: str, first: int, visible: int, *, cards: int | None = None, restarts: int = 0) -> list[Seen]:
    """Return two ranks of a host with `visible` GPUs."""
    reason = "" if visible else "the driver is gone"
    return [
        Seen(
            rank=first + local,
            host=host,
            visible=visible,
            card=f"{host}-{local % (cards or visible)}" if visible else "",
            reason=reason,
            restarts=restarts,
        )
        for local in range(2)
    ]


def see(patch: pytest.MonkeyPatch, kind: str, count: int) -> None:
    """Let torch find some accelerators."""
    patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    patch.setattr(torch.accelerator, "device_count", lambda: count)


def test_request_batch_system_with_gpus_asks_for_cuda_unless_the_job_says_cpu() -> None:
    slurm = SlurmSpec(gpus_per_node=8)
    pods = KubernetesSpec(image="image", claim="claim", mount="/data", gpus_per_node=4)
    assert Request.of(ClusterSpec()).device == "auto"
    assert Request.of(ClusterSpec(slurm=slurm)) == Request(device="cuda", key="cluster.slurm.gpus_per_node = 8")
    assert Request.of(ClusterSpec(kubernetes=pods)).key == "cluster.kubernetes.gpus_per_node = 4"
    assert Request.of(ClusterSpec(slurm=slurm, device="cpu")).device == "cpu"


@pytest.mark.parametrize(
    ("request_", "visible", "kind"),
    [
        (Request(), (2, 2), "cuda"),
        (Request(), (0, 0), "cpu"),
        (Request(device="cpu"), (2, 0), "cpu"),
        (CUDA, (2, 2), "cuda"),
        (CUDA, (1, 1), None),  # both ranks of a host see the same GPU
    ],
)
def test_decide_kind_by_request_and_what_is_visible(
    request_: Request, visible: tuple[int, int], kind: str | None
) -> None:
    verdict = decide(request_, [*node("a", 0, visible[0]), *node("b", 2, visible[1])])
    assert (verdict.kind if not verdict.problem else None) == kind


def test_decide_ranks_without_a_gpu_are_named_with_their_host() -> None:
    for asked in (CUDA, Request()):
        verdict = decide(asked, [*node("a", 0, 2), *node("b", 2, 0)])
        assert verdict.at_fault == (2, 3)
        assert verdict.problem == (
            f"{asked.key}: no GPU is visible to ranks 2, 3 on b, but to the other ranks one is: the driver is gone; "
            "mend that, or set cluster.device = cpu"
        )


def test_decide_many_hosts_without_a_gpu_are_counted() -> None:
    seen = [one for host in range(100) for one in node(f"n{host}", 2 * host, 0)]
    assert "; ranks 6, 7 on n3; ranks of 96 more hosts: the driver" in decide(CUDA, seen).problem


def test_decide_one_gpu_less_than_ranks_names_those_that_would_share() -> None:
    verdict = decide(CUDA, [*node("a", 0, 2), *node("b", 2, 2, cards=1)])
    assert verdict.at_fault == (3,)
    assert "ranks 2, 3 on b would share one GPU, 2 visible to each" in verdict.problem


def test_index_of_one_visible_device_serves_every_local_rank() -> None:
    assert [index_of(local, 1) for local in range(4)] == [0, 0, 0, 0]
    assert [index_of(local, 4) for local in range(4)] == [0, 1, 2, 3]


def test_look_one_visible_device_belongs_to_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def properties(index: int) -> object:
        asked.append(index)
        return type("Properties", (), {"uuid": "GPU-7"})()

    see(monkeypatch, "cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    seen = look(CUDA, rank=5, local_rank=5, restarts=0)
    assert (seen.visible, asked) == (1, [0])
    assert seen.card.endswith(" GPU-7")
    assert look(Request(device="cpu"), 5, 5, 0).visible == 0


def test_look_gpu_that_cannot_be_used_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> object:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with ...")

    see(monkeypatch, "cuda", 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    seen = look(CUDA, rank=5, local_rank=5, restarts=0)
    assert (seen.visible, seen.reason) == (0, "CUDA error: uncorrectable ECC error encountered")


def test_look_other_accelerators_serve_a_job_that_does_not_ask_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, "xpu", 2)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: object())
    seen = look(Request(), 1, 1, 0)
    assert (seen.visible, seen.kind) == (2, "xpu")
    assert decide(Request(), [seen]).kind == "xpu"
    assert look(CUDA, 1, 1, 0).visible == 0


def test_decide_devices_of_different_kinds_are_refused() -> None:
    seen = [Seen(rank=0, host="a", visible=1, kind="cuda"), Seen(rank=1, host="b", visible=1, kind="xpu")]
    problem = "cluster.device = auto: the devices are of different kinds: cuda for rank 0 on a; xpu for rank 1 on b"
    assert decide(Request(), seen).problem == problem


@NO_GPU
def test_look_without_a_gpu_says_why() -> None:
    assert look(CUDA, 0, 0, 0).reason.startswith(f"torch {torch.__version__} is built without CUDA")


def everyone(request: Request, seen: list[Seen], size: int | None = None) -> list[str | Exception]:
    """Return what `agree` returns or raises on every rank."""
    store = HashStore()

    def one(mine: Seen) -> str | Exception:
        try:
            return agree(store, request, mine, size or len(seen), DEADLINE)
        except (SpecError, RendezvousFailed, DeviceBroken) as error:
            return error

    with ThreadPoolExecutor(len(seen)) as pool:
        return list(pool.map(one, seen))


def test_agree_every_rank_refuses_with_the_same_sentence() -> None:
    answers = everyone(CUDA, [*node("a", 0, 2), *node("b", 2, 0)])
    assert all(isinstance(answer, SpecError) and answer.exit_code == 2 for answer in answers)
    assert len({str(answer) for answer in answers}) == 1
    assert everyone(CUDA, [*node("a", 0, 2), *node("b", 2, 2)]) == ["cuda"] * 4


def test_agree_after_a_restart_only_ranks_that_lost_their_gpu_fail_and_restart() -> None:
    answers = everyone(CUDA, [*node("a", 0, 2, restarts=1), *node("b", 2, 0)])
    assert answers[:2] == ["cuda", "cuda"]
    assert all(isinstance(answer, DeviceBroken) and answer.exit_code == 1 for answer in answers[2:])


def test_agree_missing_rank_is_named() -> None:
    with pytest.raises(RendezvousFailed, match=r"rank 0: waited .* for rank 1 to look for its GPU"):
        agree(HashStore(), CUDA, node("a", 0, 2)[0], 2, timedelta(seconds=0.05))
    with pytest.raises(RendezvousFailed, match=r"rank 1: waited .* for rank 0 to choose"):
        agree(HashStore(), CUDA, node("a", 0, 2)[1], 2, timedelta(seconds=0.05))


def test_connect_names_the_device_to_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def init(backend: str, **more: object) -> None:
        given.update(more, backend=backend)

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    world._connect(HashStore(), 0, 2, torch.device("cuda", 3))
    assert (given["backend"], given["device_id"]) == ("cpu:gloo,cuda:nccl", torch.device("cuda", 3))
    world._connect(HashStore(), 0, 2, torch.device("cpu"))
    assert (given["backend"], given["device_id"]) == ("gloo", None)


def test_interrupt_aborts_nccl_on_this_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that interrupts begins on the first GPU, which another rank uses."""
    calls: list[object] = []
    monkeypatch.setattr(world, "_shut", lambda descriptor: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.accelerator, "set_device_index", calls.append)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_abort_process_group", lambda: calls.append("abort"))
    device = torch.device("cuda", 3)
    world.World(rank=3, size=8, local_rank=3, device=device).interrupt()
    world.World(rank=3, size=8, local_rank=3, device=torch.device("cpu")).interrupt()
    monkeypatch.undo()  # before other fixtures ask
    assert calls == [device, "abort"]


RANK = """
import sys
from keepwarm.parallel.spec import NumericsSpec
from keepwarm.trainer.distributed import world
from keepwarm.trainer.distributed.device import Request
from keepwarm.trainer.errors import TrainerError
try:
    world.join(2, NumericsSpec(), Request(device="cuda", key="cluster.device = cuda"))
except TrainerError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@NO_GPU
def test_join_without_the_gpu_that_was_asked_for_ends_every_rank_with_2(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KEEPWARM")}
    environment |= {"WORLD_SIZE": "2", "KEEPWARM_STORE": str(tmp_path / "store"), "KEEPWARM_NODE": "node-7"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert said[0] == said[1]
    assert said[0].startswith("cluster.device = cuda: no GPU is visible to ranks 0, 1 on node-7: torch")
