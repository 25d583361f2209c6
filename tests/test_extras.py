"""What is optional says how to install it where it is missing."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
START = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import importlib.metadata
version = importlib.metadata.version
def missing(name):
    if name in {distributions!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = missing
from pathlib import Path
"""

ENGINE = """
from keepwarm.launch.run.preflight import check_engine
from keepwarm.trainer.job.files import load_job
check_engine(load_job(Path("configs/ci/tiny.yaml"), ["parallel.engine={engine}"]))
"""

CASES = {
    "megatron": (["megatron"], ["megatron-core"], ENGINE.format(engine="megatron")),
    "deepspeed": (["deepspeed"], ["deepspeed"], ENGINE.format(engine="deepspeed")),
    "mpi": (
        ["mpi4py"],
        [],
        "from keepwarm.trainer.distributed.mpi import address_of_rank_0\naddress_of_rank_0('mpirun', 2)",
    ),
    "eval": (
        ["lm_eval"],
        [],
        "from keepwarm.trainer.inference.lm_eval import command\n"
        "command(Path('{folder}'), text=['en=configs/corpora/handbook_en.valid.jsonl.zst'])",
    ),
    "hf": (
        ["transformers"],
        ["transformers"],
        "from keepwarm.trainer.job.files import load_job\nload_job(Path('configs/ci/gemma-3-tiny.yaml'))",
    ),
    "gpu": (["pynvml"], [], "from keepwarm.launch.run.gpu_health import library\nlibrary()"),
    "s3": (
        ["s3fs"],
        ["s3fs"],
        "from keepwarm.trainer.checkpoint.store import filesystem\nfilesystem('s3://bucket/run')",
    ),
    "wandb": (
        ["wandb"],
        ["wandb"],
        "from keepwarm.trainer.monitor.metric_sinks import SinkContext, WeightsAndBiases, WeightsAndBiasesOptions\n"
        "context = SinkContext(folder=Path('.'), run='name', resume_step=None)\n"
        "WeightsAndBiases(WeightsAndBiasesOptions(project='project'), context)",
    ),
}
"""By extra: modules and distributions that are hidden, and what needs them."""

FOR_TESTS = {"test", "dev", "long", "fuzz", "docs"}


@pytest.mark.parametrize("extra", CASES)
def test_missing_extra_names_its_install_line(extra: str, tmp_path: Path) -> None:
    blocked, distributions, needs = CASES[extra]
    for name in ("config.json", "tokenizer.json"):  # what lm-eval is asked for
        (tmp_path / name).write_text("{}")
    code = START.format(blocked=blocked, distributions=distributions) + needs.replace("{folder}", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env=os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}"},
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(rf"pip install 'keepwarm\[{extra}\]'", last), done.stderr


def test_every_extra_has_a_case() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) == {*CASES, *FOR_TESTS}
