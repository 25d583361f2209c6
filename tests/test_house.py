"""The shape of the code: sizes of folders and functions, import cycles, and the paths in docs/architecture.md."""

import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("launch", "trainer", "parallel", "ft")
FILES_IN_A_FOLDER = 18
LINES_OF_A_FUNCTION = 60
PARAMETERS = 6

COMMANDS = {
    "launch/cli/cluster.py:submit",
    "launch/cli/init.py:init",
    "launch/cli/main.py:plan",
    "launch/drill/command.py:drill",
    "launch/simulation/command.py:simulate",
    "trainer/convert/__main__.py:command",
    "trainer/data/preprocess/tokenize.py:command",
    "trainer/inference/lm_eval.py:command",
    "trainer/inference/sample.py:command",
    "trainer/surgery/__main__.py:vocabulary_",
    "trainer/surgery/__main__.py:widen",
}
"""Commands with more than `PARAMETERS` options."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def product_files() -> tuple[Path, ...]:
    """Every module of the product but package markers."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files += (ROOT / "src/keepwarm").glob("*.py")
    return tuple(sorted(path for path in files if path.name != "__init__.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def functions() -> dict[str, list[Function]]:
    """All functions by `FILE:NAME`."""
    found: dict[str, list[Function]] = {}
    for path in product_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                found.setdefault(f"{name_of(path)}:{node.name}", []).append(node)
    return found


def parameters(function: Function) -> int:
    """Number of parameters without `self` and `cls`."""
    arguments = function.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return sum(name not in ("self", "cls") for name in names)


def is_command(function: Function) -> bool:
    return any(".command" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_folder_is_crowded() -> None:
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "__init__.py"]
    sizes = Counter(name_of(path.parent) for path in (*product_files(), *tests))
    assert {folder for folder, size in sizes.items() if size > FILES_IN_A_FOLDER} == set()


def test_no_function_is_long() -> None:
    lines = {name: max((one.end_lineno or 0) - one.lineno + 1 for one in all_) for name, all_ in functions().items()}
    assert {name for name, count in lines.items() if count > LINES_OF_A_FUNCTION} == set()


def test_few_functions_have_many_parameters() -> None:
    many = {name: each for name, found in functions().items() for each in found if parameters(each) > PARAMETERS}
    assert {name for name, each in many.items() if is_command(each)} == COMMANDS
    assert [name for name, each in many.items() if not is_command(each)] == []


# ---- imports


@cache
def imports() -> frozenset[tuple[str, str]]:
    """(importer, imported) of all modules, lazy imports included; those for type checkers alone never run."""
    graph = grimp.build_graph("keepwarm", cache_dir=None, exclude_type_checking_imports=True)
    return frozenset(
        (importer, imported)
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
    )


def sibling_imports(package: str) -> dict[str, dict[str, set[str]]]:
    """For every folder of `package`: which of its members, files or folders, import which others."""
    found: dict[str, dict[str, set[str]]] = {}
    for importer, imported in imports():
        if not all(f"{name}.".startswith(f"keepwarm.{package}.") for name in (importer, imported)):
            continue
        first, second = importer.split("."), imported.split(".")
        parting = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if parting is not None:
            found.setdefault(".".join(first[:parting]), {}).setdefault(first[parting], set()).add(second[parting])
    return found


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """The members of `edges` that are left when those that import no other are taken out, again and again."""
    left = {name: {other for other in others if other in edges} for name, others in edges.items()}
    while free := {name for name, others in left.items() if not others}:
        left = {name: others - free for name, others in left.items() if name not in free}
    return sorted(left)


@pytest.mark.parametrize("package", PACKAGES)
def test_files_and_folders_import_one_another_in_no_circle(package: str) -> None:
    siblings = sibling_imports(package)
    assert siblings
    circles = {folder for folder, edges in siblings.items() if cycle(edges)}
    assert circles == set()


def test_cycle_is_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}}) == ["a", "b", "c", "d"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) == []


# ---- the paths of docs/architecture.md


PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
DIAGRAMS = re.findall(r"^```mermaid\n(sequenceDiagram\n.*?)^```\n+(.*?)$", PAGE, re.MULTILINE | re.DOTALL)


BATCH = re.search(r"^(loop\._step -> .*?)^```\n\n(.*? returns\.)", PAGE, re.MULTILINE | re.DOTALL)


def named(diagram: str) -> list[str]:
    """The functions that a diagram names, in order: `file.function` or `file.Class.method`."""
    messages = re.findall(r"^ *\w+ *--?>>\w+: *(.*)$", diagram, re.MULTILINE)
    return [name for message in messages for name in re.findall(r"\b[a-z_]+(?:\.\w+)+", message)]


@cache
def definitions() -> dict[str, set[str]]:
    """Files by every `file.function`, `file.Class` and `file.Class.method` that they define."""
    found: dict[str, set[str]] = {}
    for path in product_files():
        for name in defined(ast.parse(path.read_text(encoding="utf-8")).body, path.stem):
            found.setdefault(name, set()).add(name_of(path))
    return found


def defined(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            yield f"{prefix}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from defined(node.body, f"{prefix}.{node.name}")


def returns(files: list[str]) -> int:
    """How often a path comes back to a file that it has left."""
    return sum(
        here != before and here in files[:index] for index, (before, here) in enumerate(itertools.pairwise(files), 1)
    )


def test_returns_counts_what_comes_back() -> None:
    assert returns(["a", "a", "b", "a", "c", "b"]) == 2


def test_architecture_draws_two_paths() -> None:
    assert len(DIAGRAMS) == 2


@pytest.mark.parametrize(("diagram", "count"), DIAGRAMS, ids=["killed node", "tensor"])
def test_every_function_of_a_path_exists(diagram: str, count: str) -> None:
    check(named(diagram), count)


def test_every_function_of_the_path_of_a_batch_exists() -> None:
    assert BATCH is not None
    check(BATCH[1].replace("->", " ").split(), BATCH[2])


def check(names: list[str], count: str) -> None:
    """Assert that every name is defined in one file, and that the page counts files and returns right."""
    assert len(names) > 10
    assert [name for name in names if len(definitions().get(name, ())) != 1] == []
    files = [next(iter(definitions()[name])) for name in names]
    assert count == f"{len(names)} functions in {len(set(files))} files, {returns(files)} returns."
