"""Registries of components that third parties can add by name, without a change to this project.

Each extension point has one `Registry`: our components by name and place, and those that installed packages offer in an
entry-point group. Nothing is imported before it is asked for by name, so that a registry costs nothing where torch and
the like must not be loaded.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Added = TypeVar("Added")


class UnknownName(LookupError):
    """No component of this name is registered; the message names the nearest and all that there are."""


class UnusableComponent(RuntimeError):
    """A component is registered but cannot be imported or is not of the expected type; names its distribution."""


class Registry(Generic[T]):
    """Components of one extension point by name.

    kind      what a component is, for messages: "engine", "learning-rate curve"
    group     entry-point group in which other distributions offer theirs: "keepwarm.engines"
    builtin   ours: name -> "module:attribute", imported on first use
    expected  the class that a component is an instance or subclass of; None accepts anything
    """

    def __init__(self, kind: str, group: str, builtin: Mapping[str, str], expected: type | None = None) -> None:
        self.kind = kind
        self.group = group
        self._targets = dict(builtin)
        self._expected = expected
        self._loaded: dict[str, T] = {}
        self._offered: dict[str, EntryPoint] | None = None

    def __contains__(self, name: object) -> bool:
        return name in self._targets or name in self._loaded or name in self._entry_points()

    def names(self) -> list[str]:
        """Names of all components, ours first; imports none of them."""
        return list(dict.fromkeys([*self._targets, *self._loaded, *self._entry_points()]))

    def get(self, name: str) -> T:
        """Return the component, importing it on first use.

        Raises UnknownName, or UnusableComponent where it cannot be imported.
        """
        if name not in self._loaded:
            self._loaded[name] = self._checked(name, self._load(name))
        return self._loaded[name]

    def usable(self) -> Iterator[tuple[str, T]]:
        """Yield the components that can be imported, with their names; for hints, which a broken one must not spoil."""
        for name in self.names():
            try:
                yield name, self.get(name)
            except UnusableComponent:
                continue

    def register(self, name: str) -> Callable[[Added], Added]:
        """Decorate a component of the running process, as in a notebook or a test; installed ones use entry points."""

        def add(component: Added) -> Added:
            if name in self:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._loaded[name] = self._checked(name, component)
            return component

        return add

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._offered is None:
            self._offered = {point.name: point for point in entry_points(group=self.group)}
        return self._offered

    def _load(self, name: str) -> Any:
        if name in self._targets:
            module, _, attribute = self._targets[name].partition(":")
            return getattr(import_module(module), attribute)
        point = self._entry_points().get(name)
        if point is None:
            near = difflib.get_close_matches(name, self.names(), 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            listed = ", ".join(self.names())
            known = f"there are: {listed}" if listed else f"no installed package offers one in {self.group}"
            raise UnknownName(f"unknown {self.kind} {name!r}; {hint}{known}")
        try:
            return point.load()
        except Exception as error:
            raise UnusableComponent(f"{self._origin(name)} cannot be loaded: {error}") from error

    def _checked(self, name: str, component: Any) -> T:
        expected = self._expected
        if expected is None or isinstance(component, expected):
            return component  # type: ignore[no-any-return]
        if isinstance(component, type) and issubclass(component, expected):
            return component  # type: ignore[return-value]
        raise UnusableComponent(f"{self._origin(name)} is no {expected.__name__}")

    def _origin(self, name: str) -> str:
        point = self._entry_points().get(name)
        distribution = point.dist.name if point is not None and point.dist is not None else None
        return f"{self.kind} {name!r}" + (f" of the package {distribution}" if distribution else "")
