"""Runs that lose a node for which there is no spare: they go on with fewer replicas, and grow when a node is back."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.shrink import layouts, resized
from tests.support.runs import warm
from tests.support.runs.node_run import DEADLINE, ROOT, Run, assert_nothing_left, command, runs
from tests.support.runs.run_contents import steps_of

SHRINK = ("cluster.elastic=shrink", "cluster.shrink_after=0.5")
TWO = ("parallel.data=2", "snapshot.code=null", "numerics.precision=fp64", "stages.0.tokens=153_600", *SHRINK)


SHORT = ("snapshot.durable.every=1000", "stages.0.tokens=30_720")


@contextlib.contextmanager
def spare(run: Run) -> Iterator[subprocess.Popen[bytes]]:
    """A node that joins a run of two."""
    back = [sys.executable, "-P", "-m", "keepwarm.launch.node", str(run.folder), "--slots=2", "--node=back", "--spare"]
    path = os.environ.get("PYTHONPATH", str(ROOT / "src"))
    node = subprocess.Popen(back, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})
    try:
        yield node
    finally:
        node.kill()
        node.wait(DEADLINE)


def test_shrink_layouts_fit_the_batch_and_the_nodes() -> None:
    job = load_job(Path("ci/snapshot"), SHRINK)
    found = layouts(job)
    assert {nodes: one.parallel.data for nodes, one in found.items()} == {4: 4, 2: 2, 1: 1}  # 8 samples, not by 3
    assert found[4] is job
    assert all(one.batch == job.batch and one.stages == job.stages for one in found.values())
    assert resized(job, 2) == found[2]
    assert resized(job, 3) is job
    assert list(layouts(load_job(Path("ci/snapshot"), [*SHRINK, "cluster.min_data_parallel=2"]))) == [4, 2]
    assert list(layouts(load_job(Path("ci/snapshot")))) == [4]


def test_shrink_impossible_request_is_refused() -> None:
    with pytest.raises(SpecError, match=r"set snapshot\.durable\.every or checkpoint\.every"):
        load_job(Path("ci/snapshot"), [*SHRINK, "snapshot.durable=null"])
    with pytest.raises(SpecError, match=r"min_data_parallel = 5: of 4 replicas"):
        load_job(Path("ci/snapshot"), [*SHRINK, "cluster.min_data_parallel=5"])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    with runs(tmp_path) as begin:
        yield begin


@pytest.mark.dist
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_shrink_two_replicas_become_one_and_two_again(tmp_path: Path, start: Callable[..., Run]) -> None:
    whole = tmp_path / "whole"
    done = warm.run(command(whole, *TWO, "--nodes", "2"), timeout=DEADLINE)
    assert done.returncode == 0, done.stdout

    run = start(*TWO, "--nodes", "2")
    run.after(15)
    run.lose_node(0)
    smaller = run.recovered(1)
    assert (smaller["level"], smaller["source"]) == ("resized", "memory")
    (kept,) = run.events("memory_kept")
    assert smaller["step"] == kept["step"] >= 14  # of the 15 that were done at least
    assert run.owner(0).node == "node-1"
    with spare(run) as node:
        larger = run.recovered(2)
        assert (larger["level"], larger["source"]) == ("resized", "memory")
        handed_over = run.events("memory_kept")[1]
        assert larger["step"] == handed_over["step"] > smaller["step"]  # nothing was lost
        run.done()
        assert node.wait(DEADLINE) == 0
    assert run.events("memory_not_kept") == run.events("interrupted") == []
    assert [event["slots"] for event in run.events("resized")] == [1, 2]
    assert [event["ranks"] for event in run.events("training_started")] == [2, 1, 2]
    assert_close(run.folder, whole)
    assert_nothing_left(run)


FOUR = ("numerics.precision=fp64", *SHRINK)


@pytest.mark.dist
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lost", [(1,), (0, 2), (0, 1, 2)], ids=str)
def test_shrink_four_replicas_lose_more_than_parity(
    tmp_path: Path, start: Callable[..., Run], lost: tuple[int, ...]
) -> None:
    """Nodes with code (2, 2): up to two are decoded and saved first, of three the durable checkpoint is left."""
    whole = tmp_path / "whole"
    done = warm.run(command(whole, *FOUR, "--nodes", "4"), timeout=DEADLINE)
    assert done.returncode == 0, done.stdout

    run = start(*FOUR, "--nodes", "4")
    run.after(15)
    for slot in lost:
        run.owner(slot)
    for slot in lost:
        run.lose_node(slot)
    smaller = run.recovered(1)
    assert smaller["level"] == "resized"
    if len(lost) <= 2:
        (kept,) = run.events("memory_kept")
        assert kept["slots"] == list(lost)
        assert smaller["source"] == "memory"
        assert smaller["step"] == kept["step"] >= 14
        assert smaller["bytes_decoded"] > 0
    else:
        assert smaller["source"] == "disk"
        (event,) = run.events("memory_not_saved")
        assert "needs 2 good chunks and has 1; those of slots [0, 1, 2] are lost" in event["why"]
        assert smaller["step"] == 10
    run.done()
    assert_close(run.folder, whole)
    assert_nothing_left(run)


FAILS_ONCE = """
import os, signal
from pathlib import Path
from keepwarm import Section
from keepwarm.trainer.loop.callback import Callback, Run, StepDone


class FailsOnceOptions(Section):
    marker: str
    ranks: int


class FailsOnce(Callback):
    Options = FailsOnceOptions

    def after_step(self, run: Run, done: StepDone) -> None:
        # Before the snapshot of this step is offered.
        if (run.world.size, run.world.rank) == (self.options.ranks, 0) and Path(self.options.marker).exists():
            Path(self.options.marker).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def fails_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The marker for which rank 0 ends itself after a step in a layout."""
    info = tmp_path / "site" / "fails_once-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "fails_once.py").write_text(FAILS_ONCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fails-once\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[keepwarm.callbacks]\nfails_once = fails_once:FailsOnce\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{ROOT / 'src'}")
    return tmp_path / "marker"


@pytest.mark.dist
@pytest.mark.long
@pytest.mark.timeout(900)
def test_shrink_that_fails_before_the_first_commit_goes_through_the_disk(
    start: Callable[..., Run], fails_once: Path
) -> None:
    """The old layout's memory is still there: no step that it had committed is lost."""
    fails_once.touch()
    options = (f"callbacks.fails_once.marker={fails_once}", "callbacks.fails_once.ranks=1")
    run = start(*TWO, *options, *SHORT, "--nodes", "2", cold=True)
    run.after(15)
    run.lose_node(0)
    smaller = run.recovered(1)
    run.done()
    (kept,) = run.events("memory_kept")
    (saved,) = run.events("memory_saved")
    # The first recovery reports once its first step is done, and that is the one which ends its rank.
    assert (smaller["source"], smaller["step"]) == ("disk", kept["step"])
    assert saved["step"] == kept["step"] >= 14
    assert run.events("memory_not_saved") == []
    assert [line["step"] for line in steps_of(run.folder) if "loss" in line] == list(range(1, 61))
    assert_nothing_left(run)


@pytest.mark.dist
@pytest.mark.long
@pytest.mark.timeout(900)
def test_growth_that_fails_before_the_first_commit_goes_through_the_disk(
    start: Callable[..., Run], fails_once: Path
) -> None:
    """The smaller layout's memory is still there: no step that it had committed is lost."""
    options = (f"callbacks.fails_once.marker={fails_once}", "callbacks.fails_once.ranks=2")
    run = start(*TWO, *options, *SHORT, "stages.0.tokens=61_440", "--nodes", "2", cold=True)
    run.after(15)
    run.lose_node(0)
    assert run.recovered(1)["source"] == "memory"
    fails_once.touch()
    with spare(run) as node:
        again = run.recovered(2)
        run.done()
        assert node.wait(DEADLINE) == 0
    handed_over = run.events("memory_kept")[1]
    (saved,) = run.events("memory_saved")
    # The layout that has grown reports once its first step is done, and that is the one which ends its rank.
    assert (again["level"], again["source"], again["step"]) == ("disk", "disk", handed_over["step"])
    assert saved["step"] == handed_over["step"] > 15
    assert run.events("memory_not_saved") == run.events("memory_not_kept") == []
    assert [line["step"] for line in steps_of(run.folder) if "loss" in line] == list(range(1, 121))
    assert_nothing_left(run)


def assert_close(run: Path, whole: Path) -> None:
    """Losses to 1e-5, and the very same samples."""
    for mine, theirs in zip(steps_of(run), steps_of(whole), strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine.keys() - {"stage"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), (mine["step"], key)
    assert ledger_of(run) == ledger_of(whole)


def ledger_of(folder: Path) -> object:
    """What was drawn, as the last checkpoint records it."""
    newest = publication.latest(folder / "checkpoints")
    assert newest is not None
    return read_manifest(newest).meta["ledger"]
