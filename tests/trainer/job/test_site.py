"""The site file: defaults of `cluster` below the job, the user's above the system's, replaced when a run is resumed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from keepwarm.launch.plan.plan import Plan
from keepwarm.launch.run.prepare import changes, stored_job
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.files import load_job, load_run, save_job
from keepwarm.trainer.job.site import site_file
from keepwarm.trainer.job.site.site_file import VARIABLE, site_files
from keepwarm.trainer.job.spec import JobSpec

ROOT = Path(__file__).parents[3]
TINY = ROOT / "configs" / "ci" / "tiny.yaml"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and a system without a site file, in which the usual places are looked at."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(site_file, "SYSTEM_FILE", tmp_path / "etc" / "site.yaml")
    return tmp_path


def written(path: Path, slurm: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"cluster:\n  slurm:\n    {slurm}\n")
    return path


def job(*overrides: str) -> JobSpec:
    return load_job(TINY, [f"cluster.slurm.{text}" for text in overrides])


def stored(job: JobSpec, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_job(job, folder / "run.json")
    return folder


def test_user_stands_over_system_and_job_over_both(home: Path) -> None:
    user = written(home / ".config/keepwarm/site.yaml", "{account: mine, partition: gpu, mem: 8G}")
    system = written(home / "etc/site.yaml", "{account: all, qos: long, mem: 4G}")
    slurm = (made := job("mem=1G")).cluster.slurm
    assert (slurm.account, slurm.partition, slurm.qos, slurm.mem) == ("mine", "gpu", "long", "1G")
    assert made.cluster.sources == {
        "slurm.mem": "job",
        "slurm.account": str(user),
        "slurm.partition": str(user),
        "slurm.qos": str(system),
    }
    assert Plan(made).site["cluster.slurm.qos"] == {"value": "long", "source": str(system)}


def test_xdg_config_home_is_respected_and_variable_names_the_only_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "xdg"))
    own = written(home / "xdg/keepwarm/site.yaml", "account: xdg")
    other = written(home / "other.yaml", "account: other")
    assert site_files() == [own]
    assert site_files({"HOME": str(home), VARIABLE: ""}) == []
    assert site_files({VARIABLE: str(other)}) == [other]
    with pytest.raises(SpecError, match=f"{VARIABLE}=/none: no such file"):
        site_files({VARIABLE: "/none"})


def test_site_changes_nothing_but_defaults_of_cluster(home: Path) -> None:
    without = job("account=a")
    written(home / "etc/site.yaml", "{account: b, partition: gpu, container: {image: /i.sqsh}}")
    with_site = job("account=a")
    assert with_site.model_dump(exclude={"cluster"}) == without.model_dump(exclude={"cluster"})
    changed = changes(without, with_site)
    assert changed[0] == 'cluster.slurm.partition: null -> "gpu"'
    assert all(line.startswith("cluster.slurm.container") for line in changed[1:])


@pytest.mark.parametrize(
    ("site", "override", "key", "value"),
    [
        ("venv: /shared/venv", "conda=train", "venv", None),
        ("gres: 'gpu:a100:8,shard:1'", "gpus_per_node=2", "gres", ("shard:1",)),
        ("gpus_per_node: 8", "gres=gpu:h100:4", "gpus_per_node", None),
        ("gpus_per_node: 8", "gres=shard:1", "gpus_per_node", 8),
        ("mem: 8G", "extra=['--mem=0']", "mem", None),
        ("mail: {user: a@b}", "extra=['--mail-user=c@d']", "mail", None),
        ("extra: [--mem=0, --comment=x]", "mem=8G", "extra", ("--comment=x",)),
        ("partition: gpu", "partition=null", "partition", None),
        ("container: {image: /a, runtime: apptainer}", "container=null", "container", None),
    ],
)
def test_job_replaces_a_default_also_by_another_key(
    home: Path, site: str, override: str, key: str, value: object
) -> None:
    written(home / "etc/site.yaml", site)
    assert getattr(job(override).cluster.slurm, key) == value


def test_sections_of_the_site_are_merged_key_by_key(home: Path) -> None:
    written(home / "etc/site.yaml", "container: {image: /a.sif, runtime: apptainer, mounts: ['/data:/data']}")
    container = job("container.python=/opt/python").cluster.slurm.container
    assert container is not None
    assert (container.image, container.runtime, container.python) == ("/a.sif", "apptainer", "/opt/python")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cluster:\n  slurm:\n    acount: lab\n", "site.yaml:3: cluster.slurm.acount: unknown key; did you mean"),
        ("cluster:\n  slurm:\n    time: soon\n", "site.yaml:3: cluster.slurm.time: expected a time as sbatch has it"),
        ("cluster:\n  slurm:\n    extra: [-N1]\n", "site.yaml:3: cluster.slurm.extra: -N1: sets --nodes"),
        ("cluster:\n  elastic: shrink\n", "site.yaml:2: cluster.elastic: a site file has only the sections of batch"),
        ("seed: 3\n", "site.yaml:1: seed: a site file has no other key than cluster"),
        ("cluster: [1]\n", "site.yaml:1: cluster: expected a section with keys, got a list"),
        ("cluster:\n  slurm:\n    venv: $NO_SUCH/v\n", "site.yaml:3: cluster.slurm.venv: "),
        ("cluster: {", "site.yaml:1: not YAML"),
    ],
)
def test_error_in_a_site_file_names_file_line_and_key(home: Path, text: str, words: str) -> None:
    file = written(home / "etc/site.yaml", "account: lab")
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        job()
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(file.parent))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "cluster:\n", "cluster:\n  slurm:\n    # account: x\n"])
def test_site_file_of_comments_sets_nothing(home: Path, text: str) -> None:
    written(home / "etc/site.yaml", "account: lab").write_text(text)
    assert job().cluster.sources == {}


def test_stored_run_keeps_its_values_without_the_site_file(home: Path) -> None:
    site = written(home / "etc/site.yaml", "{account: lab, setup: [ulimit -l unlimited]}")
    folder = stored(made := job("partition=gpu"), home / "run")
    site.unlink()
    assert load_run(folder / "run.json").cluster == made.cluster
    assert json.loads((folder / "run.json").read_text())["cluster"]["sources"]["slurm.account"] == str(site)


def test_resumed_run_takes_the_defaults_of_the_present_site_and_keeps_what_its_user_wrote(home: Path) -> None:
    site = written(home / "etc/site.yaml", "{account: here, qos: long, container: {image: /a.sif}}")
    folder = stored(job("partition=gpu", "reservation=null", "begin=now+1hour", "dependency=afterok:7"), home / "run")
    written(site, "{account: there, partition: other, reservation: week, mem: 8G}")
    before, after = stored_job(folder, ["cluster.slurm.time=60"])
    slurm = after.cluster.slurm
    assert (slurm.account, slurm.qos, slurm.mem, slurm.container) == ("there", None, "8G", None)
    assert (slurm.partition, slurm.reservation, slurm.time) == ("gpu", None, "60")
    assert (slurm.begin, slurm.dependency) == (None, None)
    assert before.cluster.slurm.account == "here"
    assert not any("sources" in line for line in changes(before, after))
    again = stored_job(stored(after, folder), [])
    assert again[0] == again[1]


def test_resumed_run_of_an_older_version_keeps_all_of_its_values(home: Path) -> None:
    folder = stored(job("partition=gpu"), home / "run")
    values = json.loads((folder / "run.json").read_text())
    del values["cluster"]["sources"]
    (folder / "run.json").write_text(json.dumps(values))
    written(home / "etc/site.yaml", "{account: lab, partition: other}")
    before, after = stored_job(folder, [])
    assert changes(before, after) == []


def test_site_show_and_plan_name_the_place_of_each_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "my site.yaml", "{account: lab, partition: gpu}")
    monkeypatch.setenv(VARIABLE, str(file))

    def keepwarm(*arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "keepwarm", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(keepwarm("site", "show", "--json")) == {
        "files": [str(file)],
        "defaults": [
            {"key": "cluster.slurm.account", "value": "lab", "source": f"{file}:3"},
            {"key": "cluster.slurm.partition", "value": "gpu", "source": f"{file}:3"},
        ],
    }
    shown = keepwarm("plan", str(TINY), "cluster.slurm.partition=own")
    assert f'  cluster.slurm.account  "lab"  {file}\n' in shown
    assert "cluster.slurm.partition  " not in shown
