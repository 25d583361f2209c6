"""A component that is registered inside a `with` block."""

import contextlib
from collections.abc import Iterator
from typing import Any

from keepwarm.registry import Registry


@contextlib.contextmanager
def registered(registry: Registry[Any], name: str, component: Any) -> Iterator[None]:
    registry.register(name)(component)
    try:
        yield
    finally:
        del registry._loaded[name]
