"""The names that `keepwarm` exports: lazy, documented, typed, and usable as docs/api.md shows them."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest

import keepwarm

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
NAMES = [name for name in keepwarm.__all__ if name != "__version__"]


def run(code: str, cwd: Path = ROOT) -> str:
    """Run `code` in a process of its own and return what it prints."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}/src"}
    command = [sys.executable, "-P", "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_import_loads_nothing_of_ours_and_nothing_heavy() -> None:
    loaded = run("import sys, keepwarm; print(*sys.modules)").split()
    assert [name for name in loaded if name.startswith("keepwarm")] == ["keepwarm"]
    assert {"torch", "pydantic", "numpy", "importlib.metadata"}.isdisjoint(loaded)


def test_listing_the_names_loads_nothing_heavy() -> None:
    code = "import sys, keepwarm; print(*dir(keepwarm)); print(*sorted({'torch', 'pydantic'} & set(sys.modules)))"
    names, heavy = run(code).split("\n")[:2]
    assert names.split() == sorted(keepwarm.__all__)
    assert heavy == ""


@pytest.mark.parametrize("name", ["load_job", "Plan", "train", "RunFolder", "Registry", "Section", "SnapshotSpec"])
def test_name_of_the_torch_free_part_loads_no_torch(name: str) -> None:
    assert run(f"import sys; from keepwarm import {name}; print('torch' in sys.modules)") == "False\n"


def test_version_is_that_of_the_distribution() -> None:
    assert keepwarm.__version__ == metadata.version("keepwarm")


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'keepwarm' has no attribute 'Motor'"):
        _ = keepwarm.Motor  # type: ignore[attr-defined]


def stub() -> tuple[dict[str, tuple[str, str]], list[str]]:
    """(module, attribute) by the name that the stub imports it as, and the stub's `__all__`."""
    imported: dict[str, tuple[str, str]] = {}
    exported: list[str] = []
    for node in ast.parse((ROOT / "src/keepwarm/__init__.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            imported |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Assign):
            exported = ast.literal_eval(node.value)
    return imported, exported


def test_stub_names_what_is_exported() -> None:
    imported, exported = stub()
    assert sorted(exported) == sorted(keepwarm.__all__)
    assert sorted(imported) == sorted(NAMES)
    for name, (module, attribute) in imported.items():
        assert getattr(keepwarm, name) is getattr(import_module(module), attribute), name


def test_page_lists_every_name_once() -> None:
    rows = re.findall(r"^\| `(?:keepwarm\.)?(\w+)", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(keepwarm.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_public_name_has_a_docstring(name: str) -> None:
    assert getattr(keepwarm, name).__doc__


@pytest.mark.dist
def test_examples_of_the_page_run_one_after_the_other(tmp_path: Path) -> None:
    assert len(EXAMPLES) == 3
    plan_and_train, checkpointer, codec = EXAMPLES
    printed = run(plan_and_train, tmp_path)
    assert printed.splitlines()[-1] == "20 20"
    assert json.loads((tmp_path / "runs/api/run.json").read_text())["name"] == "tiny"
    assert run(checkpointer, tmp_path) in ("restored step 2\n", "restored step 3\n")
    assert run(codec, tmp_path) == "True\n"
