"""Values of the `cluster.slurm` section in sbatch's own syntax. Torch-free."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, StringConstraints

from keepwarm.trainer.job.slurm.hostlist import expand

_TIME = re.compile(r"(?:\d{1,6}-\d{1,6}(?::\d{1,6}){0,2}|\d{1,9}(?::\d{1,9}){0,2}|UNLIMITED|INFINITE)", re.IGNORECASE)
_TIME_FORMS = (
    "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds, "
    "or UNLIMITED"
)
_MEMORY = re.compile(r"\d{1,12}([KMGT]B?)?", re.IGNORECASE)
_RESOURCE = re.compile(r"(?P<name>[A-Za-z]\w*)(?::(?P<type>[A-Za-z][\w.-]*))?(?::(?P<count>\d{1,9}[kmgtp]?))?", re.I)
_JOB = r"\d{1,10}(?:_(?:\d{1,10}|\*))?(?:\+\d{1,9})?"
_CONDITION = re.compile(rf"(?:after(?:any|ok|notok|corr|burstbuffer)?|expand):{_JOB}(?::{_JOB})*|{_JOB}|singleton")
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2})?\s?(?:[AP]M)?"
_BEGIN = re.compile(
    rf"now(?:\s?\+\s?\d{{1,9}}\s?(?:second|minute|hour|day|week)?s?)?|today|tomorrow|midnight|noon|fika|teatime|{_CLOCK}"
    rf"|(?:\d{{4}}-\d{{1,2}}-\d{{1,2}}|\d{{1,2}}/\d{{1,2}}(?:/\d{{2,4}})?|\d{{6}})(?:[T-]{_CLOCK})?",
    re.IGNORECASE,
)


def _text(value: Any) -> Any:
    """Return a whole number as text, which YAML does not require to be quoted."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def as_words(value: Any) -> Any:
    """Return the items of a list or comma-separated text; commas in brackets, as in `node[1,3]`, separate nothing."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    return tuple(word for word in re.split(r",(?![^\[]*\])", value) if word)


def upper_words(value: Any) -> Any:
    """Return words as `as_words` does, in upper case."""
    words = as_words(value)
    if not isinstance(words, tuple):
        return words
    return tuple(word.upper() if isinstance(word, str) else word for word in words)


def _time(text: str) -> str:
    if not _TIME.fullmatch(text):
        raise ValueError(f"expected a time as sbatch has it, which is {_TIME_FORMS}; got {text}")
    return text


def _memory(text: str) -> str:
    if not _MEMORY.fullmatch(text):
        raise ValueError(f"expected megabytes or a size such as 500G, or 0 for all of a node's memory; got {text}")
    return text


def _host(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([\w.-]|\[[\d,-]+\])*", text):
        raise ValueError(f"expected names of nodes as sbatch has them, such as node7,node[1-3,5]; got {text}")
    return text


def _domains(value: Any) -> Any:
    """Return nodes by failure domain, each in one of them, or `topology`."""
    if value is None or value == "topology":
        return value
    if not isinstance(value, Mapping):
        raise ValueError("expected nodes by domain, such as {rack1: 'node[0-15]', rack2: 'node[16-31]'}, or topology")
    owners: dict[str, str] = {}
    found = {}
    for name, nodes in value.items():
        words = as_words(nodes)
        if not re.fullmatch(r"[\w.:-]+", name) or not isinstance(words, tuple):
            raise ValueError(f"expected the nodes of domain {name} as text or a list, got {nodes!r}")
        found[name] = tuple(_host(str(word)) for word in words)
        for node in expand(found[name]):
            if owners.setdefault(node, name) != name:
                raise ValueError(f"{node} is in two failure domains, {owners[node]} and {name}")
    return found


def _resource(text: str) -> str:
    if not _RESOURCE.fullmatch(text):
        raise ValueError(f"expected NAME, NAME:COUNT or NAME:TYPE:COUNT, such as gpu:a100:8; got {text}")
    return text


def _dependency(text: str) -> str:
    separators = [mark for mark in ",?" if mark in text]
    if len(separators) > 1 or not all(map(_CONDITION.fullmatch, re.split(r"[,?]", text))):
        raise ValueError(
            "expected a dependency as sbatch has it, such as afterok:20:21,afterany:23 (all of them), "
            f"afterok:20?afterok:21 (any of them) or singleton; got {text}"
        )
    return text


def _place(text: str) -> str:
    if not re.fullmatch(r"/[^\n\r]*", text):
        raise ValueError(f"expected an absolute path; got {text}")
    return text


def _folder(text: str) -> str:
    if not re.fullmatch(r"[/$][\w./${}%+-]*", text):
        raise ValueError(f"expected an absolute path without spaces, such as /scratch/$USER; got {text}")
    return text


def _begin(text: str) -> str:
    if not _BEGIN.fullmatch(text.strip()):
        raise ValueError(
            "expected a time as sbatch has it, such as 16:00, now+2hours, tomorrow, 2027-01-20 or 2027-01-20T12:34; "
            f"got {text}"
        )
    return text.strip()


Line = Annotated[str, StringConstraints(pattern=r"^[^\n\r]*$")]
"""One line of a shell script."""
Word = Annotated[str, StringConstraints(pattern=r"^[^\s\"'`$\\]+$")]
Time = Annotated[str, BeforeValidator(_text), AfterValidator(_time)]
"""A time limit. A bare number of minutes need not be quoted in YAML."""
Memory = Annotated[str, BeforeValidator(_text), AfterValidator(_memory)]
Nodes = Annotated[tuple[Annotated[str, AfterValidator(_host)], ...], BeforeValidator(as_words)]
"""Names of nodes, as a list or as one text."""
FailureDomains = Annotated[Literal["topology"] | dict[str, tuple[str, ...]] | None, BeforeValidator(_domains)]
"""Nodes by what fails at once."""
Resources = Annotated[tuple[Annotated[str, AfterValidator(_resource)], ...], BeforeValidator(as_words)]
"""Generic resources of each node, as a list or as one text."""
Dependency = Annotated[str, BeforeValidator(_text), AfterValidator(_dependency)]
Begin = Annotated[str, AfterValidator(_begin)]
Words = Annotated[tuple[Word, ...], BeforeValidator(as_words)]
"""Words, as a list or as one comma-separated text."""
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")]
Place = Annotated[str, AfterValidator(_place)]
"""An absolute path."""
Folder = Annotated[str, AfterValidator(_folder)]
"""An absolute path, in which a shell of the job replaces $NAME and ${NAME}."""


def gpus_in(resources: tuple[str, ...]) -> int:
    """Return the number of GPUs among requested generic resources."""
    found = [match for one in resources if (match := _RESOURCE.fullmatch(one)) and match["name"] == "gpu"]
    return sum(int((match["count"] or "1").rstrip("kKmMgGtTpP")) for match in found)
