"""Turn validation errors of a spec into sentences with the key, its place and the expected value. Torch-free."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from keepwarm.section import Section
from keepwarm.trainer.job.renames import VALUES, has_old_key, new_key
from keepwarm.trainer.job.yaml import Document, Keys, describe


def explain(error: ValidationError, spec: type[BaseModel], document: Document, prefix: Keys = ()) -> list[str]:
    """Return one line per problem, `PLACE: KEY: what is wrong`, in the order of the spec.

    `prefix` is the position of the validated values in the document.
    """
    lines = []
    problems = error.errors(include_url=False)
    for details in problems:
        if details["type"] == "too_short" and any(_is_inside(other["loc"], details["loc"]) for other in problems):
            continue
        target = _locate(details["loc"], spec, document, prefix)
        if target is None:
            continue
        keys = target.keys
        if details["type"] == "missing" and has_old_key(keys[-1], target.siblings):
            continue
        place = document.place(prefix + keys)
        shown = ".".join(prefix + keys)
        for sentence in _sentence(details, target, spec).split("\n"):
            lines.append(f"{place}: {shown}: {sentence}" if shown else f"{place}: {sentence}")
    return list(dict.fromkeys(lines))


@dataclass(frozen=True, slots=True)
class _Place:
    """The position of an error in the document."""

    keys: Keys
    """Without pydantic's names for union members."""
    sections: list[type[BaseModel]]
    """Sections that are valid at this position."""
    enclosing: list[type[BaseModel]]
    """Sections that contain the last key."""
    siblings: Any
    """The mapping or list that contains the last key: its value and its siblings."""


def _locate(location: tuple[int | str, ...], spec: type[BaseModel], document: Document, prefix: Keys) -> _Place | None:
    """Return the position of an error; None if it belongs to a union member that the value was not meant for."""
    value: Any = document.values
    for key in prefix:
        value = value[key]
    annotations: list[Any] = [spec]
    keys: Keys = ()
    enclosing: list[Any] = []
    siblings: Any = None
    for part in location:
        members = [_chosen(member, value) for annotation in annotations for member in _members(annotation)]
        members = [member for member in members if _is_meant(member, value)]
        if len(members) > 1 and not _is_key(part, value):
            of_section = any(_is_tag_of(part, member) for member in members if _is_section(member))
            if _is_tag(part, members) and of_section != isinstance(value, dict):
                return None
            if _is_tag(part, members):
                continue
        keys, enclosing, siblings = (*keys, str(part)), [m for m in members if _is_section(m)], value
        value = _inside(value, part)
        annotations = [inner for member in members for inner in _children(member, part)]
    sections = [m for annotation in annotations for m in _members(annotation) if _is_section(m)]
    return _Place(keys, sections, enclosing, siblings)


def _chosen(annotation: Any, value: Any) -> Any:
    """Return the section that a name among its values selects."""
    is_ours = isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation.variant(value) if is_ours else annotation


def _is_meant(annotation: Any, value: Any) -> bool:
    """Return whether the value may be meant for this member of a union."""
    is_ours = isinstance(annotation, type) and issubclass(annotation, Section)
    return not is_ours or annotation.is_meant(value)


def _is_inside(location: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(location) > len(outer) and location[: len(outer)] == outer


def _is_tag(part: int | str, members: list[Any]) -> bool:
    names = {getattr(member, "__name__", None) for member in members}
    return part in names or (isinstance(part, str) and part not in _fields(members) and not part.isidentifier())


def _is_tag_of(part: int | str, member: Any) -> bool:
    """Return whether pydantic means this member; one with its own validators is called `function-after[..., NAME]`."""
    name = getattr(member, "__name__", None)
    return part == name or (isinstance(part, str) and part.endswith(f", {name}]"))


def _is_key(part: int | str, value: Any) -> bool:
    return isinstance(value, dict) and part in value


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _fields(annotations: list[Any]) -> set[str]:
    return {name for annotation in annotations if _is_section(annotation) for name in annotation.model_fields}


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union except None; for anything else, itself. Unwraps `Annotated`."""
    if hasattr(annotation, "__metadata__"):
        return _members(annotation.__origin__)
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) if member is not NoneType for inner in _members(member)]
    return [annotation]


def _children(annotation: Any, part: int | str) -> list[Any]:
    if _is_section(annotation):
        fields = {field.alias or name: field for name, field in annotation.model_fields.items()}
        return [fields[str(part)].annotation] if part in fields else _added(annotation, str(part))
    if get_origin(annotation) in (tuple, list):
        return [argument for argument in get_args(annotation) if argument is not Ellipsis]
    if get_origin(annotation) is dict:
        return [get_args(annotation)[1]]
    return []


def _added(section: Any, name: str) -> list[Any]:
    """Return the section that another package added under this name, if any."""
    added = section.added_section(name) if hasattr(section, "added_section") else None
    return [] if added is None else [added]


def _inside(value: Any, part: int | str) -> Any:
    try:
        return value[part]
    except (KeyError, IndexError, TypeError):
        return None


def _sentence(details: ErrorDetails, place: _Place, spec: type[BaseModel]) -> str:
    kind, value = details["type"], details["input"]
    message = details["msg"].removeprefix("Value error, ")
    wanted = message.removeprefix("Input should be ")
    if kind == "extra_forbidden":
        return f"unknown key{_hint(place, spec)}"
    if kind == "missing":
        return "this key is required"
    if kind == "literal_error":
        near = difflib.get_close_matches(value, details["ctx"]["expected"].split("'")[1::2]) if _is_text(value) else []
        hint = f"; did you mean {near[0]}?" if near else ""
        new = VALUES.get(place.keys[-1], {}).get(value) if _is_text(value) else None
        if new is not None:
            return f"{value} was renamed: write {new}"
        return f"expected {wanted}, got {describe(value)}{hint}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"expected a whole number, got {value}; write {int(value)}"
    if kind.startswith("model_") and place.sections:
        return f"expected a section with keys, got {describe(value)}"
    if kind == "too_short":
        return f"expected at least {details['ctx']['min_length']} of them, got {details['ctx']['actual_length']}"
    if wanted != message:
        wanted = {"int_type": "a whole number", "string_type": "text"}.get(kind, wanted)
        return f"expected {wanted}, got {describe(value)}"
    return message


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _hint(place: _Place, spec: type[BaseModel]) -> str:
    """Suggest a replacement for an unknown key: its new name, its section's hint, or the nearest key."""
    known = [name for section in place.enclosing for name in section.model_fields]
    new = new_key(place.keys[-1], known)
    if new is not None:
        return f": it was renamed; write {'.'.join((*place.keys[:-1], new))}"
    for section in place.enclosing:
        message = section.unknown_key(place.keys[-1], place.siblings) if issubclass(section, Section) else None
        if message is not None:
            return f" {message}"
    return f"; {_nearest(place, spec)}"


def _nearest(place: _Place, spec: type[BaseModel]) -> str:
    """Suggest a key: a similar sibling, then an equal or similar key elsewhere."""
    *parents, name = place.keys
    names = [field.alias or own for section in place.enclosing for own, field in section.model_fields.items()]
    siblings = {own: (*parents, own) for own in names}
    elsewhere = {path[-1]: path for path in reversed(list(_paths([spec], ()))) if "*" not in path}
    for candidates in (siblings, elsewhere):
        near = difflib.get_close_matches(name, candidates, 1)
        if near:
            path = candidates[near[0]]
            return f"did you mean {'.'.join(path)}?"
    return f"valid keys here: {', '.join(sorted(siblings))}"


def _paths(annotations: list[Any], keys: Keys) -> Iterator[Keys]:
    """Yield every key of a spec; `*` stands for a list position or a free name."""
    for annotation in annotations:
        for member in _members(annotation):
            if _is_section(member):
                for name, field in member.model_fields.items():
                    yield (*keys, field.alias or name)
                    yield from _paths([field.annotation], (*keys, field.alias or name))
                for name in member.added_names() if hasattr(member, "added_names") else ():
                    yield (*keys, name)
                    yield from _paths(_added(member, name), (*keys, name))
            elif get_origin(member) in (tuple, list, dict):
                yield from _paths(_children(member, 0), (*keys, "*"))
