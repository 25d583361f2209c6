"""Components with options of their own, and the check of such options while a job is read. Torch-free."""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from keepwarm.registry import Registry, UnknownName, UnusableComponent
from keepwarm.section import Section

Model = TypeVar("Model", bound=BaseModel)


class Component:
    """Base of every registered class that a job configures: `Options` is the section with its keys."""

    Options: ClassVar[type[Section]] = Section


def check_name(registry: Registry[Any], name: str, *besides: str) -> None:
    """Raise ValueError unless a component of this name can be imported, or it is `besides`; for validators of a job."""
    if name in besides:
        return
    try:
        registry.get(name)
    except UnknownName as error:
        raise ValueError(", ".join([str(error), *besides])) from error
    except UnusableComponent as error:
        raise ValueError(str(error)) from error


def validated(section: type[Model], values: Any, mode: str) -> Model:
    """Return the section with these values, read as in the validation that asks for it: `mode` is its `info.mode`.

    Raises ValidationError.
    """
    # JSON has lists where strict Python values must be tuples.
    return section.model_validate_json(json.dumps(values)) if mode == "json" else section.model_validate(values)


def parse_options(component: type[Component], values: Mapping[str, Any]) -> Any:
    """Return the component's `Options` with these values, which come from YAML or JSON.

    Raises ValidationError.
    """
    return validated(component.Options, values, "json")


def check_options(registry: Registry[type[Component]], chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """Check a mapping NAME -> options of registered components, each against the component's own section.

    Imports the modules of the components that are named, and no others. Raises ValidationError with every problem at
    the place (NAME, KEY, ...), so that a validator of a job may let it pass.
    """
    problems = [problem for name, values in chosen.items() for problem in _problems(registry, name, values)]
    if problems:
        raise ValidationError.from_exception_data(registry.kind, problems, input_type="json")


def _problems(registry: Registry[type[Component]], name: str, values: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    try:
        component = registry.get(name)
    except (UnknownName, UnusableComponent) as error:
        yield _problem((name,), str(error), values)
        return
    try:
        parse_options(component, values)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            message = details["msg"].removeprefix("Value error, ")
            if details["type"] == "extra_forbidden":
                message = _unknown_key(str(details["loc"][-1]), sorted(component.Options.model_fields))
            elif details["type"] == "missing":
                message = "this key is required"
            yield _problem((name, *details["loc"]), message, details["input"])


def _problem(location: tuple[int | str, ...], message: str, value: Any) -> InitErrorDetails:
    error = PydanticCustomError("component", "{message}", {"message": message})
    return InitErrorDetails(type=error, loc=location, input=value)


def _unknown_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    if near:
        return f"unknown key; did you mean {near[0]}?"
    return f"unknown key; valid keys here: {', '.join(known)}" if known else "unknown key; there are no options"
