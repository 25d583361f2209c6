"""Write the pages that follow from the code: every key of a job, every command.

python -m tests.project.reference_pages
"""

import inspect
import re
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import typer
from pydantic.fields import FieldInfo
from typer.main import get_command

from keepwarm.launch.cli.main import app
from keepwarm.launch.cli.programs import DATA_PROGRAMS, PROGRAMS
from keepwarm.launch.drill.command import app as drill
from keepwarm.launch.simulation.command import app as simulate
from keepwarm.parallel.engine_registry import ENGINES
from keepwarm.section import Section
from keepwarm.trainer.job.curve import CURVES, LrSpec
from keepwarm.trainer.job.extensions import METRIC_SINKS
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.model.spec import ModelSpec
from keepwarm.trainer.model.transformers_spec import TransformersSpec

ROOT = Path(__file__).parents[2]
KINDS = {ModelSpec: "keepwarm's own decoder", TransformersSpec: "a class of transformers"}
KEYS, COMMANDS = ROOT / "docs/job-keys.md", ROOT / "docs/commands.md"
MADE = "<!-- made by `make reference`; edit the docstrings and descriptions in the code instead -->"
SHORT = {"NoneType": "null", "bool": "true or false", "int": "whole number", "float": "number", "str": "text"}

# ---- keys of a job


def job_keys() -> str:
    """Return the page of every key of a job file."""
    head = (
        f"# Keys of a job file\n\n{MADE}\n\nEvery section of a job with its keys. "
        "Sections of engines, curves and metric sinks that other packages add are not listed.\n"
    )
    return "\n".join([head, *(section(path, kind) for path, kind in sections())])


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Yield every section with the path of its keys, each class once."""
    waiting: list[tuple[str, type[Section]]] = [("", JobSpec)]
    seen: set[type[Section]] = set()
    while waiting:
        path, kind = waiting.pop(0)
        if kind in seen:
            continue
        seen.add(kind)
        yield path, kind
        inner = [(f"{path}.{name}".lstrip("."), one) for name, one in inner_sections(kind)]
        waiting = [*inner, *waiting]


def inner_sections(kind: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """Yield the sections inside a section; those that a name chooses, by that name."""
    for name, field in kind.model_fields.items():
        key = field.alias or name
        found = list(dict.fromkeys(sections_in(field.annotation)))
        if name == "description":  # written by keepwarm
            continue
        if LrSpec in found:
            yield from ((f"{key} ({curve})", CURVES.get(curve).Options) for curve in CURVES.names())
        elif Section in found:
            yield from ((f"{key} ({engine})", ENGINES.get(engine).Options) for engine in ENGINES.names())
        elif name == "sinks":
            yield from ((f"{key}.{sink}", METRIC_SINKS.get(sink).Options) for sink in METRIC_SINKS.names())
        else:
            yield from ((key if len(found) == 1 else f"{key} ({KINDS[one]})", one) for one in found)


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in typing.get_args(annotation):
        yield from sections_in(part)


def section(path: str, kind: type[Section]) -> str:
    """Return one section: its docstring and a table of its keys."""
    title = f"## {path}" if path else "## The job"
    rows = [
        f"| `{field.alias or name}` | {cell(shown(field.annotation))} | {default(field)} | {cell(meaning(field))} |"
        for name, field in kind.model_fields.items()
    ]
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows] if rows else ["No keys."]
    return "\n".join([title, "", prose(inspect.getdoc(kind) or ""), "", *table, ""])


def shown(annotation: Any) -> str:
    """Return a type as a reader of YAML knows it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return shown(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(shown(one) for one in arguments))
    if origin is tuple and Ellipsis not in arguments:
        return f"list of {len(arguments)}: {', '.join(map(shown, arguments))}"
    if origin in (tuple, list):
        return f"list of {shown(arguments[0])}"
    if origin is dict:
        return f"mapping to {shown(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    name = getattr(annotation, "__name__", str(annotation))
    return SHORT.get(name, "any value" if name == "Any" else name)


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Section):
        return "its defaults"
    if value is None:
        return "null"
    return f"`{str(value).lower() if isinstance(value, bool) else list(value) if isinstance(value, tuple) else value}`"


def meaning(field: FieldInfo) -> str:
    return field.description or ""


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def prose(text: str) -> str:
    """Return a docstring without what is for those who read code."""
    return text.partition("\n\nRaises:")[0]


# ---- commands


def commands() -> str:
    """Return the page of every command with its arguments and options."""
    head = f"# Commands\n\n{MADE}\n\nEvery command with its arguments and options, as `--help` shows them.\n"
    return "\n".join([head, *(command(name, one) for name, one in sorted(found_commands()))])


def found_commands() -> Iterator[tuple[str, Any]]:
    """Yield every command that does something, by its full name."""
    programs = {f"keepwarm {name}": module for name, (module, _) in PROGRAMS.items()}
    programs |= {f"keepwarm data {name}": module for name, (module, _) in DATA_PROGRAMS.items()}
    own: dict[str, Any] = {name: get_command(program_of(module)) for name, module in programs.items()}
    own |= {"keepwarm drill": get_command(drill), "keepwarm simulate": get_command(simulate)}
    waiting = [("keepwarm", get_command(app))]
    while waiting:
        name, one = waiting.pop()
        one = own.get(name, one)
        inner = getattr(one, "commands", {})
        waiting += [(f"{name} {key}", each) for key, each in inner.items() if not each.hidden]
        if not inner:
            yield name, one


def program_of(module: str) -> typer.Typer:
    try:
        found: typer.Typer = import_module(module).app
    except AttributeError:
        found = import_module(f"{module}.__main__").app
    return found


def command(name: str, one: Any) -> str:
    """Return one command: its help and a table of its parameters."""
    rows = []
    for parameter in one.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        is_option = parameter.param_type_name == "option"
        names = ", ".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts))
        if not is_option:
            names = f"`{parameter.metavar or parameter.name.upper()}`"
        rows.append(f"| {names} | {value_of(parameter)} | {cell(parameter.help or '')} |")
    table = ["| argument or option | value | meaning |", "|---|---|---|", *rows] if rows else []
    text = "\n".join(help_lines(one.help or "")).strip()
    return "\n".join([f"## {name}", "", text, "", *table, ""])


def value_of(parameter: Any) -> str:
    """Return what a parameter takes, and what it is without."""
    if parameter.required:
        return "required"
    plain = parameter.default
    is_plain = isinstance(plain, (int, float, str, Path)) and not isinstance(plain, bool) and str(plain)
    return f"default `{plain}`" if is_plain else ""


def help_lines(text: str) -> Iterator[str]:
    """Yield the help as Markdown: examples as one block each run of them, everything else as it is."""
    lines = [line.rstrip() for line in inspect.cleandoc(text).splitlines()]
    examples: list[str] = []
    for line in [*lines, None]:
        if line is not None and (re.match(r" *(keepwarm|torchrun) ", line) or (examples and not line)):
            examples += [line.strip()] if line else []
            continue
        if examples:
            yield from (
                "<!-- not run: examples of the help; files and runs are the reader's -->",
                "```sh",
                *examples,
                "```",
                "",
            )
            examples = []
        if line is not None:
            yield line


def main() -> None:
    """Write both pages."""
    KEYS.write_text(job_keys(), encoding="utf-8")
    COMMANDS.write_text(commands(), encoding="utf-8")


if __name__ == "__main__":
    main()
