"""The examples of docs/extending.md, installed from outside the tree as one distribution, in real runs."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from keepwarm.trainer.job.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n# (my_package/\w+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ENTRY_POINTS = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
RECORDED = """
import os
from my_package.kernel import Translate

class Recorded(Translate):
    def accumulate(self, tables, column, source, output):
        with open(os.environ["KERNEL_CALLS"], "a") as file:
            file.write(f"{os.getpid()}\\n")
        super().accumulate(tables, column, source, output)
"""
"""The kernel of the page, which also says that it was called."""


class Machine:
    """A machine on which the distribution `my-package` is installed beside keepwarm."""

    def __init__(self, folder: Path) -> None:
        site, self.folder = folder / "site", folder
        info = site / "my_package-1.0.dist-info"
        info.mkdir(parents=True)
        (site / "my_package").mkdir()
        for name, code in EXAMPLES:
            (site / name).write_text(code)
        (site / "recorded.py").write_text(RECORDED)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
        sections = []
        for text in ENTRY_POINTS:
            for group, points in tomllib.loads(text)["project"]["entry-points"].items():
                sections += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
        written = "\n".join(sections).replace("my_package.kernel:Translate", "recorded:Recorded")
        (info / "entry_points.txt").write_text(written + "\n")
        self.calls = folder / "kernel_calls"
        self.environment = os.environ | {
            "PYTHONPATH": f"{site}{os.pathsep}{ROOT}/src",
            "KERNEL_CALLS": str(self.calls),
            "COLUMNS": "200",
        }

    def keepwarm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "keepwarm", *arguments],
            capture_output=True, text=True, cwd=self.folder, env=self.environment, timeout=280,
        )  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_page_has_an_example_and_an_entry_point_of_each_point_that_is_shown() -> None:
    modules = [Path(name).stem for name, _ in EXAMPLES]
    assert modules == ["curve", "csv", "stop", "kernel", "here"]
    targets = [
        target.partition(":")[0].replace(".", "/") + ".py"
        for text in ENTRY_POINTS
        for points in tomllib.loads(text)["project"]["entry-points"].values()
        for target in points.values()
    ]
    assert targets == [name for name, _ in EXAMPLES]


def test_page_lists_seven_points_that_touch_no_existing_file() -> None:
    rows = re.findall(r"^\| .*\| `(keepwarm\.\w+)` \|.*\| (\d+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 7
    assert {count for _, count in rows} == {"0"}


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_outside_curve_sink_callback_and_kernel_train_together(machine: Machine, tmp_path: Path) -> None:
    done = machine.keepwarm(
        "train", "ci/tiny", "parallel.data=2", "cluster.ranks_per_node=1", "log.tensorboard=false",
        "stages.0.lr={schedule: halving, max: 3e-3, half_life: 4}",
        "log.sinks={csv: {file: curves.csv}}",
        "callbacks={stop_below: {loss: 5.4}}",
        "snapshot={every: 1, bucket: 65536, code: {kernel: translate}}",
        "output=run",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "the loss is below 5.4" in done.stderr
    steps = [line for line in RunFolder(tmp_path / "run").metrics() if "lr" in line]
    assert [line["lr"] for line in steps] == [3e-3 * 0.5 ** (index // 4) for index in range(len(steps))]
    assert [line["loss"] < 5.4 for line in steps] == [False] * (len(steps) - 1) + [True]
    rows = (tmp_path / "run/curves.csv").read_text().splitlines()
    assert [row for row in rows if ",loss," in row] == [f"{line['step']},loss,{line['loss']}" for line in steps]
    assert len(set(machine.calls.read_text().split())) == 2, "both agents must have used the kernel"


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_outside_batch_system_runs_a_submitted_job(machine: Machine, tmp_path: Path) -> None:
    short = ("stages.0.tokens=1024", "log.tensorboard=false", "evaluation.samples=2", "cluster.here.nice=1")
    done = machine.keepwarm("submit", "ci/tiny", *short, "output=run", "--backend", "here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
    assert "the job runs here, now" in done.stderr
    assert "nice -n 1 " in (tmp_path / "run/job.sh").read_text()
    assert RunFolder(tmp_path / "run").last_step() == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.0.lr={schedule: halving, max: 1, half_live: 4}", "did you mean stages.0.lr.half_life?"),
        ("log.sinks={csv: {fil: x}}", "log.sinks.csv.fil: unknown key; did you mean file?"),
        ("callbacks={stop_belo: {loss: 1}}", "did you mean 'stop_below'?"),
        ("snapshot={code: {kernel: translat}}", "did you mean 'translate'?"),
        ("cluster.here.nic=1", "did you mean cluster.here.nice?"),
    ],
)
def test_wrong_option_of_an_outside_component_names_the_nearest(machine: Machine, override: str, said: str) -> None:
    refused = machine.keepwarm("plan", "ci/tiny", override)
    assert refused.returncode == 2
    assert said in refused.stderr
