"""Overrides of a job spec from the command line: `a.b=c` and `--a.b=c`. Torch-free."""

import difflib
from dataclasses import dataclass
from typing import Any, Self

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.renames import refuse_old_options
from keepwarm.trainer.job.yaml import Document, Keys, describe, parse_value

COMMAND_LINE = "command line"
"""Place of a value set by an override."""
_SHOWN = 200
"""Characters of an override that an error shows."""


@dataclass(frozen=True, slots=True)
class Override:
    """A key and its new value. List items are addressed by position or by their `name`."""

    keys: Keys
    value: Any

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `a.b=c` or `--a.b=c`; `c` is read as YAML, so `3e-4` is a number and `[1, 2]` a list.

        Raises:
            SpecError: no `=`, an empty key, a value that is not YAML, or a renamed option.
        """
        refuse_old_options([text])
        name, equals, value = text.removeprefix("--").partition("=")
        keys = tuple(name.split("."))
        shown = f"override {text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}"
        if not equals or not all(keys):
            raise SpecError(f"{shown}: expected KEY=VALUE, as in parallel.tensor=2")
        return cls(keys, parse_value(value, shown))

    def __str__(self) -> str:
        return f"override {'.'.join(self.keys)}"

    def apply(self, document: Document) -> None:
        """Write the value into the document, creating sections on the path that are absent or null. The first free
        position of a list takes a new item.

        Raises:
            SpecError: a key on the path holds a plain value, or a list has no such item.
        """
        *parents, last = self.keys
        walked: Keys = ()
        container: Any = document.values
        for key in parents:
            slot = self._index(container, key, walked)
            walked = (*walked, str(slot))
            if isinstance(container, dict) and container.get(key) is None:
                container[key] = {}
                document.places[walked] = COMMAND_LINE
            container = container[slot]
        if isinstance(container, list) and last == str(len(container)):
            container.append(None)
        slot = self._index(container, last, walked)
        container[slot] = self.value
        written = (*walked, str(slot))
        document.places = {at: place for at, place in document.places.items() if at[: len(written)] != written}
        document.places[written] = COMMAND_LINE

    def _index(self, container: Any, key: str, walked: Keys) -> str | int:
        """Return the key or position of `key` in `container`."""
        match container:
            case dict():
                return key
            case list():
                if key.isdecimal() and int(key) < len(container):
                    return int(key)
                names = [item.get("name") if isinstance(item, dict) else None for item in container]
                if key in names:
                    return names.index(key)
                known = [str(name) for name in names if name is not None]
                near = difflib.get_close_matches(key, known, 1)
                at = ".".join(walked)
                hint = f"did you mean {near[0]}?" if near else f"it has {len(container)}: {', '.join(known)}"
                raise SpecError(f"{self}: {at} has no item {key}; {hint}; {at}.{len(container)}={{...}} adds one")
        raise SpecError(f"{self}: {'.'.join(walked)} is {describe(container)}, not a section")
