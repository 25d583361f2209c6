"""Runs on a real cluster of four nodes: submitted, finished, interrupted, continued, to the bit as on one machine."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from keepwarm.launch.node import record as node_record
from keepwarm.trainer.job.files import load_job, save_job
from keepwarm.trainer.monitor import events
from tests.support.runs.slurm_cluster import SlurmCluster, await_that, losses, show

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "ci" / "tiny.yaml")
SLURM = str(ROOT / "configs" / "ci" / "slurm.yaml")
RANKS = "cluster.slurm.launcher=rank"
SMALL = ("stages.0.tokens=3072", "log.tensorboard=false", "evaluation.samples=2")
TWO = ("parallel.pipeline=2", "cluster.ranks_per_node=1")
FOUR = ("parallel.data=2", "parallel.pipeline=2", "cluster.ranks_per_node=1")
EIGHT = ("parallel.data=2", "parallel.pipeline=2", "parallel.tensor=2", "cluster.ranks_per_node=2")

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def submitted(cluster: SlurmCluster, run: Path, *overrides: str, job: str = TINY) -> str:
    result = cluster.keepwarm("submit", job, *SMALL, *overrides, f"output={run}")
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout.strip()


def words(run: Path) -> str:
    return show(sorted((run / "logs").iterdir()))


def on_this_machine(cluster: SlurmCluster, run: Path, *overrides: str, job: str = TINY) -> list[str]:
    """The same job under `keepwarm train`, on the login node alone."""
    result = cluster.keepwarm("train", job, *SMALL, *overrides, f"output={run}", timeout=600)
    assert result.returncode == 0, result.stderr
    return losses(run / "metrics.jsonl")


def await_run(run: Path, condition: Callable[[], bool], what: str, deadline: float = 300.0) -> None:
    """Until the condition holds; fails with what the run has written when the deadline passes."""
    try:
        await_that(condition, what, deadline)
    except AssertionError as error:
        shown = (run / "events.jsonl").read_text() if (run / "events.jsonl").exists() else ""
        raise AssertionError(f"{error}\n{shown}\n{words(run)}") from None


def happened(run: Path, event: str) -> list[dict[str, object]]:
    return [json.loads(msgspec.json.encode(each)) for each in events.read(run).of(events.KINDS[event])]


def step_of(run: Path) -> int:
    """The last step in the metrics; 0 before the first."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def store_of(run: Path) -> node_record.StoreRecord:
    """The store in use."""
    store = node_record.newest_store(run)
    assert store is not None
    return store


def store_host(run: Path) -> str:
    """The node with the store, as the records of nodes and stores name it."""
    return next(record.node for record in node_record.read_all(run) if record.host == store_of(run).host)


def slot_of(run: Path, node: str) -> int | None:
    """The slot of the layout that a node has; None for a spare."""
    return next((record.slot for record in node_record.read_all(run) if record.node == node), None)


@pytest.mark.parametrize(
    ("nodes", "layout"),
    [(2, TWO), pytest.param(4, FOUR, marks=pytest.mark.long), pytest.param(4, EIGHT, marks=pytest.mark.long)],
    ids=["two", "four", "eight"],
)
def test_slurm_several_nodes_train_as_one_machine(
    cluster: SlurmCluster, folder: Path, nodes: int, layout: tuple[str, ...]
) -> None:
    run = folder / "run"
    job = submitted(cluster, run, *layout)
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *layout)
    assert happened(run, "batch_started")[0]["nodes"] == [f"node{index}" for index in range(nodes)]
    cluster.await_idle()


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["rank", "node"])
@pytest.mark.parametrize(
    "command",
    [
        ("scancel", "--signal=USR1", "JOB"),
        ("scontrol", "requeue", "JOB"),
        ("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--wrap=true"),
    ],
    ids=["signal", "requeue", "preemption"],
)
def test_slurm_interrupted_run_continues_bitwise(
    cluster: SlurmCluster, folder: Path, command: tuple[str, ...], launcher: str
) -> None:
    run = folder / "run"
    four = ("parallel.data=4", "cluster.ranks_per_node=1", f"cluster.slurm.launcher={launcher}")
    longer = (*four, "stages.0.tokens=30_720", "checkpoint.every=2")
    job = submitted(cluster, run, *longer)
    await_run(run, lambda: step_of(run) >= 3, "three steps")
    cluster.login(*(job if word == "JOB" else word for word in command))
    await_run(run, lambda: len(happened(run, "batch_started")) == 2, "the second start")
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    # SLURM gives the ranks KillWait seconds: on a slow machine they may not get to save a last time.
    saved = happened(run, "interrupted")
    again = happened(run, "began")[1]
    assert again["source"] == "disk"
    if saved:
        assert again["step"] == saved[0]["step"]
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *longer)


@pytest.mark.long
def test_slurm_unfit_node_is_excluded_and_cancelled_run_saved(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    held = 'cluster.slurm.extra=["--hold", "--nodelist=node[0-2]"]'
    two = ("parallel.data=2", "cluster.ranks_per_node=1", "cluster.slurm.spares=1", "stages.0.tokens=1_024_000", RANKS)
    job = submitted(cluster, run, *two, held)
    assert cluster.on("node1", "mount", "-t", "tmpfs", "tmpfs", str(run)).returncode == 0
    try:
        cluster.login("scontrol", "release", job)
        await_run(run, lambda: step_of(run) >= 2, "two steps")
        (unfit,) = happened(run, "node_excluded")
        assert unfit["host"] == "node1"
        assert "starting 2 ranks on node0, node2" in cluster.keepwarm("logs", str(run)).stdout
        left = [line for line in cluster.processes("node1") if "slurmstepd" not in line]
        assert all("keepwarm.launch.slurm.watcher" in line for line in left), left
        shown = json.loads(cluster.keepwarm("runs", str(run), "--json").stdout)
        assert (shown[0]["state"], shown[0]["job"]["id"]) == ("running", job)
        said = cluster.keepwarm("cancel", str(run))
        assert "once its state is saved" in said.stdout, said.stderr
        assert cluster.await_end(job) == "CANCELLED", words(run)
    finally:
        cluster.on("node1", "umount", str(run))
    saved = happened(run, "interrupted")[0]["step"]
    assert (run / "checkpoints" / f"iter_{saved:07d}").is_dir()
    assert f"cancelled: the state after step {saved} is saved" in words(run)
    assert "no job of this run is pending or running" in cluster.keepwarm("cancel", str(run)).stderr
    cluster.await_idle()


@pytest.mark.long
def test_slurm_submission_waits_for_a_restarting_controller(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    assert cluster.login("pkill", "-x", "slurmctld").returncode == 0
    await_that(lambda: cluster.login("pgrep", "-x", "slurmctld").returncode == 1, "the controller to end")
    submission = cluster.start(
        *(sys.executable, "-P", "-m", "keepwarm", "submit", TINY, *SMALL, f"output={run}"), output=folder / "out"
    )
    cluster.start("slurmctld", "-D", output=folder / "controller")
    assert submission.wait(200) == 0, (folder / "out").read_text()
    job = (folder / "out").read_text().split()[-1]
    assert cluster.await_end(job, 300) == "COMPLETED", words(run)


@pytest.mark.long
def test_slurm_crashed_node_is_replaced_by_a_spare(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    two = ("parallel.data=2", "cluster.ranks_per_node=1", "stages.0.tokens=15_360", "checkpoint.every=5", RANKS)
    nodes = 'cluster.slurm.extra=["--nodelist=node[0-2]"]'
    job = submitted(cluster, run, *two, "cluster.slurm.spares=1", nodes)
    await_run(run, lambda: step_of(run) >= 7, "seven steps")
    cluster.crash("node1")
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    assert [line["requeues"] for line in happened(run, "batch_started")] == [0]
    assert happened(run, "node_excluded")[0]["host"] == "node1"
    assert [line["source"] for line in happened(run, "began")] == ["nothing", "disk"]
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *two)


@pytest.mark.long
def test_slurm_crashed_node_recovers_from_memory(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    longer = ("stages.0.tokens=23_040", "snapshot.durable=null")
    nodes = 'cluster.slurm.extra=["--nodelist=node[0-3]"]'
    job = submitted(cluster, run, *longer, nodes, job=SLURM)
    await_run(run, lambda: step_of(run) >= 7, "seven steps")
    holder = next(node for node in ("node1", "node2", "node3") if slot_of(run, node) is not None)
    cluster.crash(holder)
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    assert [line["requeues"] for line in happened(run, "batch_started")] == [0]
    assert [line["source"] for line in happened(run, "began")] == ["nothing", "memory"]
    assert len(happened(run, "batch_ended")) == 1
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *longer, job=SLURM)


def test_slurm_dead_host_of_the_store_is_named_and_its_slot_decoded(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    longer = ("stages.0.tokens=23_040", "snapshot.durable=null", "cluster.slurm.nodelist=node[0-3]")
    job = submitted(cluster, run, *longer, job=SLURM)
    await_run(run, lambda: step_of(run) >= 7, "seven steps")
    if slot_of(run, store_host(run)) is None:
        # The spare was the first to come. The next store is opened by an owner.
        assert cluster.on(store_host(run), "kill", "-KILL", str(store_of(run).pid)).returncode == 0
        await_run(run, lambda: slot_of(run, store_host(run)) is not None, "the store of an owner")
        await_run(run, lambda: bool(happened(run, "recovery")), "training under that store")
    host, before = store_host(run), len(happened(run, "recovery"))
    slot = slot_of(run, host)
    cluster.crash(host)
    await_run(run, lambda: len(happened(run, "recovery")) > before, "the recovery")
    recovery = happened(run, "recovery")[-1]
    assert (recovery["level"], recovery["source"], recovery["slots"]) == ("decoded", "memory", [slot])
    assert host in str(recovery["why"])
    assert [(line["node"], line["slots"]) for line in happened(run, "failure") if line["kind"] == "lost"] == [
        (host, [slot])
    ]
    shown = json.loads(cluster.keepwarm("status", str(run), "--json").stdout)
    assert {one["node"]: one["state"] for one in shown["nodes"]}[host] == "lost"
    await_run(run, lambda: bool(happened(run, "finished")), "the end of the run")
    cluster.login("scancel", job)


@pytest.mark.long
def test_slurm_crashed_node_without_a_spare_is_requeued(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    longer = ("stages.0.tokens=23_040", "cluster.slurm.spares=0")
    job = submitted(cluster, run, *longer, job=SLURM)
    await_run(run, lambda: step_of(run) >= 13, "two durable snapshots")
    cluster.crash("node1")
    await_run(run, lambda: len(happened(run, "batch_started")) == 2, "the second start")
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    assert [line["nodes"] for line in happened(run, "batch_started")] == [
        ["node0", "node1", "node2"],
        ["node0", "node2", "node3"],
    ]
    assert [line["source"] for line in happened(run, "began")] == ["nothing", "disk"]
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *longer, job=SLURM)


@pytest.mark.long
def test_slurm_run_over_its_time_limit_continues_bitwise(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    longer = (*TWO, "stages.0.tokens=614_400", "cluster.slurm.time=1", "cluster.slurm.save_before_limit=20")
    job = submitted(cluster, run, *longer)
    assert cluster.await_end(job, 800) == "COMPLETED", words(run)
    saved, again = happened(run, "interrupted"), happened(run, "began")[1:]
    assert saved
    assert [line["step"] for line in again] == [line["step"] for line in saved]
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *longer)


@pytest.mark.long
def test_slurm_drained_node_is_not_waited_for(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    cluster.login("scontrol", "update", "NodeName=node1", "State=DRAIN", "Reason=test")
    try:
        job = submitted(cluster, run, *TWO)
        assert cluster.await_end(job, 300) == "COMPLETED", words(run)
        assert "node1" not in str(happened(run, "batch_started")[0]["nodes"])
        four = cluster.keepwarm("submit", TINY, *SMALL, *FOUR, f"output={folder / 'all'}")
        assert four.returncode == 0, four.stderr
        assert "node1 is drained" in four.stderr
    finally:
        cluster.login("scontrol", "update", "NodeName=node1", "State=RESUME")
    assert cluster.await_end(four.stdout.strip(), 300) == "COMPLETED", words(folder / "all")


@pytest.mark.long
def test_slurm_srun_by_hand_trains_as_keepwarm(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    save_job(load_job(Path(TINY), [*SMALL, *TWO, f"output={run}"]), run / "run.json")
    ranks = (sys.executable, "-P", "-m", "keepwarm.trainer", str(run / "run.json"))
    done = cluster.login("srun", "--mpi=pmi2", "--nodes=2", "--ntasks-per-node=1", *ranks, timeout=600)
    assert done.returncode == 0, done.stderr
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *TWO)


@pytest.mark.long
def test_slurm_hanging_rank_is_named_and_replaced(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    longer = ("stages.0.tokens=23_040", "health.min_hang_timeout=10.0")
    job = submitted(cluster, run, *longer, job=SLURM)
    await_run(run, lambda: step_of(run) >= 7, "seven steps")
    node, worker = worker_of(run, 1)
    assert cluster.on(node, "kill", "-STOP", str(worker)).returncode == 0
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    (hang,) = happened(run, "hang")
    assert hang["silent"] == [1]
    assert "rank 1 did not answer" in str(hang["reason"])
    assert [line["source"] for line in happened(run, "began")] == ["nothing", "memory"]
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *longer, job=SLURM)


@pytest.mark.long
def test_slurm_rank_beside_a_cpu_hog_is_named(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    large = ("model.hidden_size=256", "data.sequence_length=256", "stages.0.tokens=768_000")
    job = submitted(cluster, run, *large, "health.straggler_every=10", job=SLURM)
    await_run(run, lambda: step_of(run) >= 3, "three steps")
    # The nodes share this machine's processors: one of them is the slow node's alone, with the hogs on it.
    for rank in range(3):
        node, worker = worker_of(run, rank)
        assert cluster.on(node, "taskset", "-apc", "0" if rank == 1 else "1", str(worker)).returncode == 0
    node, _ = worker_of(run, 1)
    # A session each: the kernel shares a processor between sessions, however many processes they have.
    hogs = "for i in 1 2 3 4 5 6; do setsid timeout 120 sh -c 'while :; do :; done' & done; wait"
    hog = cluster.start_on(node, "taskset", "-c", "0", "sh", "-c", hogs, output=folder / "hogs")
    try:
        await_run(run, lambda: bool(happened(run, "straggler")), "a straggler to be named", 200)
    finally:
        hog.kill()
        assert cluster.on(node, "pkill", "-f", "while :; do").returncode == 0
    named = happened(run, "straggler")
    assert {line["rank"] for line in named} == {1}
    assert named[0]["host"] == node
    assert f"rank 1 on {node} is slow" in words(run)
    assert cluster.keepwarm("cancel", str(run)).returncode == 0
    cluster.await_end(job, 300)
    cluster.await_idle()


@pytest.mark.long
def test_slurm_node_with_repeated_failures_is_excluded(cluster: SlurmCluster, folder: Path) -> None:
    run = folder / "run"
    two = ("parallel.data=2", "cluster.ranks_per_node=1", "stages.0.tokens=30_720", "checkpoint.every=2", RANKS)
    spare = ("cluster.slurm.spares=1", "cluster.max_node_failures=2", 'cluster.slurm.extra=["--nodelist=node[0-2]"]')
    job = submitted(cluster, run, *two, *spare)
    for start in (1, 2):
        await_run(run, lambda: len(happened(run, "began")) == start, f"start {start}")  # noqa: B023
        reached = step_of(run) + 3
        await_run(run, lambda: step_of(run) >= reached, "three more steps")  # noqa: B023
        assert cluster.on("node1", "pkill", "-KILL", "-f", "m keepwarm.trainer").returncode == 0
    assert cluster.await_end(job, 600) == "COMPLETED", words(run)
    (left_out,) = happened(run, "node_excluded")
    assert (left_out["host"], left_out["why"]) == ("node1", "ended 2 starts")
    assert "starting 2 ranks on node0, node2" in words(run)
    assert losses(run / "metrics.jsonl") == on_this_machine(cluster, folder / "local", *two)


@pytest.mark.long
def test_slurm_sweep_is_an_array_of_runs(cluster: SlurmCluster, folder: Path) -> None:
    root = folder / "sweep"
    asked = ("--sweep", "stages.0.lr.max=[1e-3, 3e-3]", "--sweep", "seed=[1, 2]", "--max-parallel", "2")
    hold = ("cluster.slurm.copy_code=true", "cluster.slurm.extra=['--hold']")
    result = cluster.keepwarm("submit", TINY, *SMALL, *TWO, *hold, *asked, f"output={root}")
    assert result.returncode == 0, result.stderr
    job = result.stdout.strip()
    # What runs is the copy, whatever becomes of the code that it was taken from.
    marker = root / "code" / "keepwarm" / "launch" / "slurm" / "job.py"
    marker.write_text('print("this is the copy")\n' + marker.read_text())
    cluster.login("scontrol", "release", job)
    for number in range(4):
        assert cluster.await_end(f"{job}_{number}", 600) == "COMPLETED", words(root / str(number))
        assert "this is the copy" in words(root / str(number))
    shown = json.loads(cluster.keepwarm("runs", str(root), "--json").stdout)
    assert [(one["name"], one["job"]["id"]) for one in shown] == [(f"tiny-{i}", f"{job}_{i}") for i in range(4)]
    assert json.loads((root / "sweep.json").read_text())["3"] == {"stages.0.lr.max": 3e-3, "seed": 2}
    last = on_this_machine(cluster, folder / "local", *TWO, "stages.0.lr.max=3e-3", "seed=2")
    assert losses(root / "3" / "metrics.jsonl") == last
    assert len({tuple(losses(root / str(number) / "metrics.jsonl")) for number in range(4)}) == 4


@pytest.mark.long
def test_slurm_fifty_submissions_leave_nothing_behind(cluster: SlurmCluster, folder: Path) -> None:
    small = ("stages.0.tokens=768", "snapshot={every: 1}", "cluster.slurm.launcher=node", "cluster.ranks_per_node=1")
    before = {name: cluster.on(name, "sh", "-c", LEFT).stdout for name in NODES}
    jobs = []
    for number in range(50):
        jobs.append(submitted(cluster, folder / f"run{number}", *small))
        # The queue never holds more than a few: what they write is looked at when all have ended.
        await_that(lambda: len(cluster.login("squeue", "--noheader").stdout.splitlines()) < 4, "room in the queue", 300)
    for number, job in enumerate(jobs):
        assert cluster.await_end(job, 300) == "COMPLETED", words(folder / f"run{number}")
    cluster.await_idle()
    assert {name: cluster.on(name, "sh", "-c", LEFT).stdout for name in NODES} == before
    kept = {tuple(sorted(path.name for path in (folder / f"run{number}").iterdir())) for number in range(50)}
    assert len(kept) == 1, kept


NODES = ("node0", "node1", "node2", "node3")
LEFT = "ls -A /tmp | grep -v ^keepwarm-; find /dev/shm /tmp/keepwarm-* -mindepth 1; grep keepwarm /proc/net/unix; true"
"""What a run may leave on a node: memory, sockets, folders."""


def worker_of(run: Path, rank: int) -> tuple[str, int]:
    """Node and pid, as the node itself counts, of a rank of a job with one rank on each node."""
    record = next(one for one in node_record.read_all(run) if rank in one.workers and one.slot == rank)
    return record.node, record.workers[rank]
