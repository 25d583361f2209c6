"""Keys of `cluster.slurm` in sbatch's syntax, and options that a job may not add; tests/slurm asks a real sbatch."""

from pathlib import Path

import pytest

from keepwarm.launch.slurm.script import environment_lines, render
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.cluster import SlurmSpec
from keepwarm.trainer.job.files import load_job, load_run, save_job

ROOT = Path(__file__).parents[3]
TINY = ROOT / "configs" / "ci" / "tiny.yaml"
FOLDER = Path("/shared/runs/a run")


def slurm(*overrides: str) -> SlurmSpec:
    return load_job(TINY, [f"cluster.slurm.{text}" for text in overrides]).cluster.slurm


@pytest.mark.parametrize("value", ["node[1-3],bad7", "['node[1-3]', bad7]"])
def test_nodes_are_a_list_or_one_text(value: str) -> None:
    assert slurm(f"exclude={value}").exclude == ("node[1-3]", "bad7")
    assert slurm(f"nodelist={value}").nodelist == ("node[1-3]", "bad7")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("time=forever", "expected a time as sbatch has it, which is minutes, minutes:seconds, hours:minutes:seconds"),
        ("time=1:2:3:4", "days-hours:minutes:seconds, or UNLIMITED; got 1:2:3:4"),
        ("mem=plenty", "a size such as 500G"),
        ("exclude=/etc/passwd", "cluster.slurm.exclude.0: expected names of nodes"),
        ("gres=gpu:a100:many", "NAME:TYPE:COUNT, such as gpu:a100:8; got gpu:a100:many"),
        ("dependency=after", "afterok:20:21,afterany:23"),
        ("dependency='afterok:1,singleton?afterok:2'", "afterok:20?afterok:21"),
        ("begin=later", "now+2hours"),
        ("venv=my/venv", "expected an absolute path; got my/venv"),
        ("scratch=/scratch/$(id)", "expected an absolute path without spaces"),
        ("mail={type: [ENDS]}", "did you mean END?"),
    ],
)
def test_value_that_sbatch_would_not_take_is_refused_with_its_forms(override: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        slurm(override)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--nodes=1", "nodes"), ("--nod=1", "nodes"), ("-N1", "nodes"), ("-N 1", "nodes"), ("--nodes 1", "nodes"),
        ("-n4", "ntasks"), ("--ntasks=4", "ntasks"), ("--ntasks-per-node=2", "ntasks-per-node"),
        ("--ntasks-per-n=2", "ntasks-per-node"), ("-c2", "cpus-per-task"), ("--cpus-per-t=2", "cpus-per-task"),
        ("-G8", "gpus"), ("--gpus-per-node=8", "gpus-per-node"), ("--no-requeue", "no-requeue"),
        ("--requ", "requeue"), ("-a0-3", "array"), ("--arr=0-3", "array"), ("--signal=TERM@9", "signal"),
        ("--open-mode=truncate", "open-mode"), ("-o x.log", "output"), ("--out=x.log", "output"),
        ("-HN2", "nodes"), ("--comment=x -N2", "nodes"), ("--comment='a b' --nodes=2", "nodes"), ("-t5", "time"),
        ("--export=ALL", "export"), ("-D/tmp", "chdir"), ("-k", "no-kill"), ("--wrap=ls", "wrap"),
        ("-dsingleton", "dependency"),
    ],
)  # fmt: skip
def test_extra_that_the_layout_needs_is_refused_by_name(option: str, name: str) -> None:
    with pytest.raises(SpecError) as caught:
        slurm(f"extra=[{option!r}]" if "'" not in option else f'extra=["{option}"]')
    assert str(caught.value).startswith(f"command line: cluster.slurm.extra: {option}: sets --{name}, which keepwarm")


@pytest.mark.parametrize(
    "option",
    ["--mem=0", "--mail-type=END", "--licenses=a:2", "--comment=-N2", "--exclusive",
     "-s", "--nice", "--mem-per-cpu=2G", "--time-min=10", "--new-option-of-a-plugin=1", "--switches=1"],
)  # fmt: skip
def test_extra_besides_the_layout_is_accepted(option: str) -> None:
    assert slurm(f'extra=["{option}"]').extra == (option,)


def test_two_keys_for_one_thing_are_refused() -> None:
    for overrides, words in (
        (["mem=4G", "extra=['--mem=0']"], "extra: --mem=0: sets --mem, as cluster.slurm.mem does"),
        (["gpus_per_node=8", "gres=gpu:a100:8"], "gres: requests GPUs, as gpus_per_node = 8 does"),
        (["conda=train", "venv=/shared/venv"], "conda: there is an environment already, venv = /shared/venv"),
    ):
        with pytest.raises(SpecError) as caught:
            slurm(*overrides)
        assert f"cluster.slurm.{words}" in str(caught.value)
    assert slurm("gpus_per_node=8", "gres=shard:2").gpus == 8
    assert slurm("gres='gpu:a100:6,gpu:h100:2,shard:1'").gpus == 8


def test_stored_run_of_an_older_version_is_shown_but_not_submitted(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    save_job(load_job(TINY, ["cluster.slurm.extra=['--comment=x']"]), file)
    file.write_text(file.read_text().replace("--comment=x", "--nodes=9"))
    assert load_run(file).cluster.slurm.extra == ("--nodes=9",)
    with pytest.raises(SpecError, match=r"^cluster\.slurm\.extra: --nodes=9: sets --nodes"):
        render(load_run(file), tmp_path)


def test_environment_lines_name_conda_by_name_or_folder() -> None:
    assert environment_lines(slurm("conda=train"), "/v/bin/python")[-1] == "conda activate train"
    assert environment_lines(slurm("conda=/shared/envs/train"), "/v/bin/python") == [
        "export CONDA_PREFIX=/shared/envs/train",
        "export PATH=/shared/envs/train/bin:$PATH",
    ]
    script = render(load_job(TINY, ["cluster.slurm.conda=train", "cluster.slurm.modules=[conda]"]), FOLDER)
    assert script.index("module load conda") < script.index("conda activate") < script.index("exec python -P")
