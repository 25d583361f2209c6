"""Paths and URLs in a job: tell them apart, and expand `~` and environment variables in paths. Torch-free."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

_URL = re.compile(r"[a-z][a-z0-9+.-]*(::|://)", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(?:(?P<escaped>\$)|(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\})?")

PATHS = tuple(
    tuple(key.split("."))
    for key in (
        "output", "init_from", "model", "model.transformers", "data.tokenizer", "data.sources.*", "data.validation.*",
        "cluster.slurm.conda", "cluster.slurm.venv",
        "cluster.slurm.container.image", "cluster.slurm.container.mounts.*", "cluster.slurm.container.python",
        "cluster.kubernetes.image", "cluster.kubernetes.mount", "cluster.kubernetes.python",
    )
)  # fmt: skip
"""Keys of a job that hold a path; `*` stands for a name or a position."""


def is_url(where: str | Path) -> bool:
    """Return whether `where` is an fsspec URL, such as `s3://bucket/run`, `memory://run` or `file:///run`."""
    return isinstance(where, str) and _URL.match(where) is not None


def is_remote(where: str | Path) -> bool:
    """Return whether `where` is a URL of another protocol than `file:`, which names a path on this machine."""
    return isinstance(where, str) and is_url(where) and not where.lower().startswith("file:")


def local_path(where: str | Path) -> Path:
    """Return the path that a `file:` URL names, also one that went through `Path`, which merges its slashes; any other
    path unchanged.
    """
    first, *rest = Path(where).parts or ("",)
    if first.lower() != "file:":
        return Path(where)
    path = Path("/", *rest)
    return path if path.exists() else Path(unquote(str(path)))


def expanded(path: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a path with `~`, `$NAME` and `${NAME}` replaced, also after the colon of a mount; `$$` is a dollar sign.

    Raises ValueError if a variable is not set, a user is not known, or a dollar sign begins neither.
    """

    def value(found: re.Match[str]) -> str:
        name = found["name"] or found["braced"]
        if found["escaped"]:
            return "$"
        if name is None:
            raise ValueError(f"{path!r}: a dollar sign must begin $NAME or ${{NAME}}; $$ stands for the sign itself")
        if name not in environment:
            raise ValueError(f"{path!r}: the environment variable {name} is not set")
        return environment[name]

    if is_url(path):
        return _VARIABLE.sub(value, path)
    parts = [_VARIABLE.sub(value, part if part[:1] != "~" else _home(part)) for part in path.split(":")]
    return ":".join(parts)


def _home(path: str) -> str:
    user = path.partition("/")[0]
    try:
        home = str(Path(user).expanduser())
    except RuntimeError as error:
        raise ValueError(
            f"{path!r}: there is no home directory for {user}; ./{user} is a folder of that name"
        ) from error
    return home.replace("$", "$$") + path[len(user) :]


def expand_paths(value: Any, keys: tuple[str, ...], refuse: Callable[[tuple[str, ...], str], Exception]) -> Any:
    """Return a value of a job with all paths in it expanded; `keys` is its place, `refuse` makes the error."""
    if isinstance(value, dict):
        return {key: expand_paths(inner, (*keys, key), refuse) for key, inner in value.items()}
    if isinstance(value, list):
        return [expand_paths(inner, (*keys, str(index)), refuse) for index, inner in enumerate(value)]
    if not (isinstance(value, str) and any(_matches(keys, path) for path in PATHS)):
        return value
    try:
        return expanded(value)
    except ValueError as error:
        raise refuse(keys, str(error)) from error


def path_override(key: str, path: str | Path) -> str:
    """Return the override that sets `key` to this very path, in which nothing is expanded."""
    text = str(path).replace("$", "$$")
    return f"{key}={json.dumps(text)}"


def _matches(keys: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    return len(keys) == len(pattern) and all(own in ("*", key) for key, own in zip(keys, pattern, strict=True))
