"""What planning and guarding must not load, shown in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "megatron", "transformers", "numpy")

TORCH_FREE = [
    "keepwarm.launch.cli.main",
    "keepwarm.launch.init.choices",
    "keepwarm.launch.init.document",
    "keepwarm.launch.plan.plan",
    "keepwarm.launch.plan.text",
    "keepwarm.launch.local.train",
    "keepwarm.trainer.job.cluster",
    "keepwarm.trainer.job.curve",
    "keepwarm.trainer.job.shrink",
    "keepwarm.trainer.job.estimate",
    "keepwarm.trainer.monitor.events",
    "keepwarm.trainer.job.run_folder",
    "keepwarm.trainer.job.learning_rate",
    "keepwarm.trainer.job.spec",
    "keepwarm.trainer.job.checks",
    "keepwarm.trainer.job.messages",
    "keepwarm.trainer.job.files",
    "keepwarm.trainer.job.overrides",
    "keepwarm.trainer.job.sections",
    "keepwarm.trainer.job.yaml",
    "keepwarm.trainer.job.stages",
    "keepwarm.trainer.job.url",
    "keepwarm.trainer.errors",
    "keepwarm.trainer.loop.callback",
    "keepwarm.trainer.job.extensions",
    "keepwarm.trainer.model.huggingface_config",
    "keepwarm.trainer.monitor.metric_sinks",
    "keepwarm.parallel.mesh.layout",
    "keepwarm.parallel.spec",
    "keepwarm.parallel.engine_registry",
    "keepwarm.parallel.engine_support",
    "keepwarm.parallel.memory",
    "keepwarm.parallel.native.info",
    "keepwarm.parallel.megatron.info",
    "keepwarm.parallel.deepspeed.info",
    "keepwarm.parallel.errors",
]


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=60).stdout


@pytest.mark.parametrize("module", TORCH_FREE)
def test_import_of_light_modules_loads_nothing_heavy(module: str) -> None:
    loaded = run(f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))")
    assert loaded.split() == []


def test_model_families_load_nothing_heavy() -> None:
    families = "from keepwarm.trainer.model.families.registry import FAMILIES, family_of; "
    families += "print(len([family_of(name) for name in FAMILIES.names()]))"
    loaded = run(f"{families}; import sys; print(*(name for name in {HEAVY!r} if name in sys.modules))")
    count, heavy = loaded.split("\n", 1)
    assert int(count) >= 7
    assert heavy.split() == []


def test_planning_loads_nothing_heavy() -> None:
    plan = "from pathlib import Path; from keepwarm.launch.plan.plan import Plan; "
    plan += "from keepwarm.launch.plan.text import print_plan; from keepwarm.trainer.job.files import load_job; "
    plan += "print_plan(Plan(load_job(Path('mt-nlg-530b'), [])))"
    loaded = run(f"{plan}; import sys; print(*(name for name in {HEAVY!r} if name in sys.modules))")
    assert loaded.splitlines()[-1].split() == []


def test_command_line_loads_neither_pydantic_nor_rich() -> None:
    """`keepwarm --version` and passing on to the data tools stay instant."""
    loaded = run(
        "import sys, keepwarm.launch.cli.main; print(*(name for name in ('pydantic', 'rich') if name in sys.modules))"
    )
    assert loaded.split() == []


def test_package_markers_are_empty() -> None:
    markers = [path for name in ("launch", "trainer", "parallel", "ft") for path in (ROOT / name).rglob("__init__.py")]
    assert len(markers) >= 4
    assert [path for path in markers if path.stat().st_size] == []
