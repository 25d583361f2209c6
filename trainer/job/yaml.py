"""YAML 1.2 and JSON as plain data that remembers the source line of every value. Torch-free."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from keepwarm.foreign_json import parse_json
from keepwarm.trainer.errors import SpecError

_LARGEST_FILE = 64 << 20
_LARGEST_COUNT = 1_000_000
Keys = tuple[str, ...]
"""Path of a value: mapping keys, and list positions as text."""


@dataclass
class Document:
    """The values of a file, as mappings, lists, text, numbers, booleans and None, with the place of each."""

    values: dict[str, Any]
    places: dict[Keys, str] = field(default_factory=dict)

    def place(self, keys: Keys) -> str:
        """Return where the value at `keys`, or the nearest enclosing one, was written: `FILE:LINE` or an override."""
        for length in range(len(keys), -1, -1):
            if keys[:length] in self.places:
                return self.places[keys[:length]]
        return "job"

    def graft(self, keys: Keys, value: Any, places: dict[Keys, str]) -> None:
        """Set the value of the top-level key `keys[0]`, with the places inside it."""
        self.values[keys[0]] = value
        self.places = {at: place for at, place in self.places.items() if at[: len(keys)] != keys}
        self.places |= {keys + at: place for at, place in places.items()}


def read_document(path: Path, *, may_be_empty: bool = False) -> Document:
    """Read the mapping in a YAML or JSON file; with `may_be_empty`, a file of comments alone is an empty one.

    Raises:
        SpecError: the file is missing, unreadable, empty, not a mapping, not YAML 1.2, or repeats a key.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise SpecError(f"{path}: larger than {_LARGEST_FILE >> 20} MiB, which is no job or model file")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    places: dict[Keys, str] = {(): str(path)}
    values = _parse_json(text, path) if path.suffix == ".json" else _parse(text, str(path), places)
    if values is None and may_be_empty:
        values = {}
    if values is None:
        raise SpecError(f"{path}: the file is empty")
    if not isinstance(values, dict):
        raise SpecError(f"{path}: expected a mapping of keys to values, got {describe(values)}")
    return Document(values, places)


def parse_value(text: str, source: str) -> Any:
    """Parse one YAML value, as on the right-hand side of an override; `source` names it in errors."""
    return _parse(text, source, None)


def describe(value: Any) -> str:
    """Describe a value for an error message, with its type if that is not obvious."""
    match value:
        case None:
            return "nothing (null)"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the text {value!r}"
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
    return str(value)


class _Constructor(SafeConstructor):
    """YAML 1.2's core schema: a date is text."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def _parse(text: str, source: str, places: dict[Keys, str] | None) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        node = yaml.compose(text)
        if node is None:
            return None
        if _expanded_size(node, {}) > _LARGEST_COUNT:
            raise SpecError(f"{source}: more than {_LARGEST_COUNT:,} values, with those that aliases repeat")
        values = _plain(yaml.constructor.construct_document(node), (), source)
        if places is not None:
            _mark(node, (), source, places)
    except DuplicateKeyError as error:
        raise SpecError(f"{_at(error, source)}: {str(error.problem).partition(' with value')[0]}") from error
    except MarkedYAMLError as error:
        raise SpecError(f"{_at(error, source)}: not YAML: {error.problem or error.context}") from error
    except (YAMLError, ValueError) as error:
        raise SpecError(f"{source}: not YAML: {error}") from error
    except RecursionError as error:
        raise SpecError(f"{source}: nested too deep, or an alias that contains itself") from error
    return values


def _parse_json(text: str, path: Path) -> Any:
    # Not every JSON text is YAML: DEL and other control characters are allowed in JSON.
    try:
        values = parse_json(text.encode())
    except ValueError as error:
        raise SpecError(f"{path}: {error}") from error
    return _plain(values, (), str(path))


def _at(error: MarkedYAMLError, source: str) -> str:
    mark = error.problem_mark or error.context_mark
    is_file = not source.startswith("override ")
    return f"{source}:{mark.line + 1}" if mark and is_file else source


def _plain(value: Any, keys: Keys, source: str) -> Any:
    """Return the value with text keys; refuse anything that JSON cannot represent."""
    match value:
        case dict():
            for key in value:
                if not isinstance(key, str | int) or isinstance(key, bool):
                    raise SpecError(f"{_named(source, keys)}: {describe(key)} cannot be a key")
            return {str(key): _plain(inner, (*keys, str(key)), source) for key, inner in value.items()}
        case list():
            return [_plain(inner, (*keys, str(i)), source) for i, inner in enumerate(value)]
        case float() if not math.isfinite(value):
            raise SpecError(f"{_named(source, keys)}: expected a finite number, got {value}")
        case int() if value.bit_length() > 64:
            raise SpecError(
                f"{_named(source, keys)}: expected a number of at most 64 bits, got {value.bit_length()} bits"
            )
        case None | bool() | int() | float() | str():
            return value
    raise SpecError(f"{_named(source, keys)}: expected text, a number, a list or a mapping, got {value!r}")


def _named(source: str, keys: Keys) -> str:
    return f"{source}: {'.'.join(keys)}" if keys else source


def _expanded_size(node: Node, known: dict[int, float]) -> float:
    """Return the number of values in a node where each alias is replaced by what it names; infinite in a circle."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until its parts are counted: it lies in itself
        parts = (
            [part for pair in node.value for part in pair]
            if isinstance(node, MappingNode)
            else (node.value if isinstance(node, SequenceNode) else [])
        )
        known[id(node)] = 1 + sum(_expanded_size(part, known) for part in parts)
    return known[id(node)]


def _mark(node: Node, keys: Keys, source: str, places: dict[Keys, str]) -> None:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            inner = (*keys, str(key.value))
            places[inner] = f"{source}:{key.start_mark.line + 1}"
            _mark(value, inner, source, places)
    elif isinstance(node, SequenceNode):
        for i, value in enumerate(node.value):
            inner = (*keys, str(i))
            places[inner] = f"{source}:{value.start_mark.line + 1}"
            _mark(value, inner, source, places)
