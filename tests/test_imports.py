"""What planning and guarding must not load, shown in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "megatron", "transformers", "numpy")

TORCH_FREE = [
    "launch.cli",
    "launch.plan",
    "launch.plan_text",
    "launch.train",
    "trainer.cluster_spec",
    "trainer.curve",
    "trainer.elastic",
    "trainer.estimate",
    "trainer.events",
    "trainer.run_folder",
    "trainer.schedule",
    "trainer.spec",
    "trainer.spec_checks",
    "trainer.spec_errors",
    "trainer.spec_file",
    "trainer.spec_override",
    "trainer.spec_sections",
    "trainer.spec_yaml",
    "trainer.stages",
    "trainer.url",
    "trainer.errors",
    "trainer.callback",
    "trainer.extensions",
    "trainer.metric_sinks",
    "parallel.layout",
    "parallel.spec",
    "parallel.engine_support",
    "parallel.errors",
]


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=60).stdout


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_loads_nothing_heavy(module: str) -> None:
    loaded = run(f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))")
    assert loaded.split() == []


def test_planning_loads_nothing_heavy() -> None:
    plan = (
        "from launch.plan import Plan; from launch.plan_text import print_plan; from trainer.spec_file import load_job"
    )
    plan += "; from pathlib import Path; print_plan(Plan(load_job(Path('mt-nlg-530b'), [])))"
    loaded = run(f"{plan}; import sys; print(*(name for name in {HEAVY!r} if name in sys.modules))")
    assert loaded.splitlines()[-1].split() == []


def test_the_command_line_loads_neither_pydantic_nor_rich() -> None:
    """`keepwarm --version` and passing on to the data tools stay instant."""
    loaded = run("import sys, launch.cli; print(*(name for name in ('pydantic', 'rich') if name in sys.modules))")
    assert loaded.split() == []


def test_package_markers_are_empty() -> None:
    markers = [path for name in ("launch", "trainer", "parallel", "ft") for path in (ROOT / name).rglob("__init__.py")]
    assert len(markers) >= 4
    assert [path for path in markers if path.stat().st_size] == []
