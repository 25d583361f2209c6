"""Validation errors of a spec as sentences that name the key, its place and what would be right. Torch-free."""

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
    """One line for every problem, `PLACE: KEY: what is wrong`, in the order of the spec.

    `prefix` is where the validated values lie in the document.
    """
    lines = []
    found = error.errors(include_url=False)
    for details in found:
        if details["type"] == "too_short" and any(_is_inside(other["loc"], details["loc"]) for other in found):
            continue
        found_at = _locate(details["loc"], spec, document, prefix)
        if found_at is None:
            continue
        keys = found_at.keys
        if details["type"] == "missing" and has_old_key(keys[-1], found_at.beside):
            continue
        place = document.place(prefix + keys)
        shown = ".".join(prefix + keys)
        for sentence in _sentence(details, found_at, spec).split("\n"):
            lines.append(f"{place}: {shown}: {sentence}" if shown else f"{place}: {sentence}")
    return list(dict.fromkeys(lines))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an error belongs."""

    keys: Keys
    """Without pydantic's names for the members of a union."""
    sections: list[type[BaseModel]]
    """Sections that the value there may be."""
    around: list[type[BaseModel]]
    """Sections that the last key stands in."""
    beside: Any
    """What stands there: the last key with its value and its neighbours."""


def _locate(location: tuple[int | str, ...], spec: type[BaseModel], document: Document, prefix: Keys) -> _Place | None:
    """The place of an error; None where it belongs to a member of a union that the value was not meant for."""
    value: Any = document.values
    for key in prefix:
        value = value[key]
    annotations: list[Any] = [spec]
    keys: Keys = ()
    around: list[Any] = []
    beside: Any = None
    for part in location:
        members = [_chosen(member, value) for annotation in annotations for member in _members(annotation)]
        if len(members) > 1 and not _is_key(part, value):
            of_section = any(_is_tag_of(part, member) for member in members if _is_section(member))
            if _is_tag(part, members) and of_section != isinstance(value, dict):
                return None
            if _is_tag(part, members):
                continue
        keys, around, beside = (*keys, str(part)), [m for m in members if _is_section(m)], value
        value = _inside(value, part)
        annotations = [inner for member in members for inner in _children(member, part)]
    sections = [m for annotation in annotations for m in _members(annotation) if _is_section(m)]
    return _Place(keys, sections, around, beside)


def _chosen(annotation: Any, value: Any) -> Any:
    """The section that a name among its values chooses."""
    is_ours = isinstance(annotation, type) and issubclass(annotation, Section)
    return annotation.variant(value) if is_ours else annotation


def _is_inside(location: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(location) > len(outer) and location[: len(outer)] == outer


def _is_tag(part: int | str, members: list[Any]) -> bool:
    names = {getattr(member, "__name__", None) for member in members}
    return part in names or (isinstance(part, str) and part not in _fields(members) and not part.isidentifier())


def _is_tag_of(part: int | str, member: Any) -> bool:
    """Whether pydantic means this member; one with validators of its own is called `function-after[..., NAME]`."""
    name = getattr(member, "__name__", None)
    return part == name or (isinstance(part, str) and part.endswith(f", {name}]"))


def _is_key(part: int | str, value: Any) -> bool:
    return isinstance(value, dict) and part in value


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _fields(annotations: list[Any]) -> set[str]:
    return {name for annotation in annotations if _is_section(annotation) for name in annotation.model_fields}


def _members(annotation: Any) -> list[Any]:
    """Members of a union other than None; of anything else, itself. `Annotated` is looked through."""
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
    """The section that another package added to this one under a name, if any."""
    found = section.added_section(name) if hasattr(section, "added_section") else None
    return [] if found is None else [found]


def _inside(value: Any, part: int | str) -> Any:
    try:
        return value[part]
    except (KeyError, IndexError, TypeError):
        return None


def _sentence(details: ErrorDetails, place: _Place, spec: type[BaseModel]) -> str:
    kind, value = details["type"], details["input"]
    said = details["msg"].removeprefix("Value error, ")
    wanted = said.removeprefix("Input should be ")
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
    if wanted != said:
        wanted = {"int_type": "a whole number", "string_type": "text"}.get(kind, wanted)
        return f"expected {wanted}, got {describe(value)}"
    return said


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _hint(place: _Place, spec: type[BaseModel]) -> str:
    """What may have been meant by an unknown key: its new name, what its section says, else the nearest key."""
    known = [name for section in place.around for name in section.model_fields]
    new = new_key(place.keys[-1], known)
    if new is not None:
        return f": it was renamed; write {'.'.join((*place.keys[:-1], new))}"
    for section in place.around:
        said = section.unknown_key(place.keys[-1], place.beside) if issubclass(section, Section) else None
        if said is not None:
            return f" {said}"
    return f"; {_nearest(place, spec)}"


def _nearest(place: _Place, spec: type[BaseModel]) -> str:
    """A key that may have been meant: a similar one beside it, then the same or a similar one elsewhere."""
    *parents, name = place.keys
    names = [field.alias or own for section in place.around for own, field in section.model_fields.items()]
    beside = {own: (*parents, own) for own in names}
    elsewhere = {path[-1]: path for path in reversed(list(_paths([spec], ()))) if "*" not in path}
    for candidates in (beside, elsewhere):
        near = difflib.get_close_matches(name, candidates, 1)
        if near:
            path = candidates[near[0]]
            return f"did you mean {'.'.join(path)}?"
    return f"valid keys here: {', '.join(sorted(beside))}"


def _paths(annotations: list[Any], keys: Keys) -> Iterator[Keys]:
    """Every key of a spec; `*` stands for a list position or a free name."""
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
