"""Every name of torch with an underscore that the product uses exists in the torch that is installed."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from keepwarm.trainer.monitor.flight_recorder import DUMPS

ROOT = Path(__file__).parents[1]
FOLDERS = ("trainer", "parallel", "ft", "launch")


def used() -> set[str]:
    """Return the dotted private names."""
    names = {f"torch._C._distributed_c10d.{name}" for name in DUMPS}  # looked up by name
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            names |= set(_private(ast.parse(path.read_text())))
    return names


def _private(tree: ast.AST) -> Iterator[str]:
    aliases = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch" and not node.level:
            for one in node.names:
                whole = f"{node.module}.{one.name}"
                aliases[one.asname or one.name] = whole
                if _is_private(whole):
                    yield whole
        elif isinstance(node, ast.Import):
            aliases |= {one.asname: one.name for one in node.names if one.asname and one.name.startswith("torch")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node, aliases)) is not None and _is_private(name):
            yield name


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value, aliases)
        return None if before is None else f"{before}.{node.attr}"
    return None


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def _find(name: str) -> object:
    """Return what a dotted name means, importing as much of it as is a module."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def test_private_names_are_found_in_the_source() -> None:
    names = used()
    assert {"torch.distributed.distributed_c10d._abort_process_group", "torch._foreach_norm"} <= names


@pytest.mark.parametrize("name", sorted(used()))
def test_private_name_of_torch_exists(name: str) -> None:
    if "nccl" in name and torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is built without CUDA, which {name} needs")
    assert _find(name) is not None
