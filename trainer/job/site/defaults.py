"""Merge a site's defaults below the `cluster` section of a job, and record where each value came from. Torch-free.

`cluster.sources` has the source of every value that is not keepwarm's own default: `job`, or the site file. So a run
that is submitted again, possibly at another site, keeps what its user wrote and takes today's defaults for the rest.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from keepwarm.trainer.job.slurm.sbatch_options import keys_set
from keepwarm.trainer.job.slurm.syntax import as_words, gpus_in
from keepwarm.trainer.job.yaml import Document, Keys

JOB = "job"
"""Source of a value of the job file or an override."""
SOURCES = "sources"
_OF_ONE_SUBMISSION = ("slurm.begin", "slurm.dependency")
"""Keys that do not hold for a later submission of the run."""
_ENVIRONMENTS = ("conda", "venv")
_MAPPINGS = (("slurm", "failure_domains"), ("kubernetes", "node_selector"))
"""Values that are mappings with names of the user's own: one is replaced by another as a whole."""


def fill(document: Document, site: Document) -> dict[str, str]:
    """Set what the document lacks below `cluster` to the values of the site; return the source of each value.

    A value that the document has under another key, as `venv` for `conda`, is left out.
    """
    cluster = document.values.setdefault("cluster", {})
    if not isinstance(cluster, dict):  # refused when the job is validated
        return {}
    sources = {".".join(keys): JOB for keys, _ in leaves(cluster)}
    own = cluster.get("slurm")
    own = dict(own) if isinstance(own, dict) else {}
    for keys, value in leaves(site.values["cluster"]):
        kept = _beside(own, keys[1], value) if keys[0] == "slurm" and keys[1:] else value
        if kept is not None and _set(cluster, keys, kept):
            place = site.place(("cluster", *keys))
            document.places[("cluster", *keys)] = place
            sources[".".join(keys)] = place.rpartition(":")[0] or place
    return sources


def release(document: Document) -> None:
    """Remove from a stored job what is not its user's own below `cluster`, and what held for one submission alone."""
    cluster = document.values.get("cluster")
    if not isinstance(cluster, dict) or not isinstance(sources := cluster.get(SOURCES), dict | None):
        return
    cluster.pop(SOURCES, None)
    for keys, _ in list(leaves(cluster)):
        key = ".".join(keys)
        if key in _OF_ONE_SUBMISSION or (sources is not None and sources.get(key) != JOB):
            _remove(cluster, keys)


def leaves(values: Mapping[str, Any], keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield all values below `cluster` with their keys. A mapping with other keys than names, as labels, is a value."""
    for key, value in values.items():
        is_section = isinstance(value, dict) and value and (*keys, key) not in _MAPPINGS
        if is_section and all(inner.isidentifier() for inner in value):
            yield from leaves(value, (*keys, key))
        else:
            yield (*keys, key), value


def _beside(own: Mapping[str, Any], key: str, value: Any) -> Any:
    """Return what a site's value for `cluster.slurm.KEY` adds to a job's own section; None for nothing."""
    options = own.get("extra")
    if key in keys_set(options if isinstance(options, list) else []):
        return None
    if key in _ENVIRONMENTS and any(own.get(name) for name in _ENVIRONMENTS):
        return None
    if key == "gpus_per_node" and _gpus(own.get("gres")):
        return None
    if key == "gres" and own.get("gpus_per_node") and isinstance(words := as_words(value), tuple):
        return [word for word in words if not _gpus(word)] or None
    if key == "extra" and isinstance(value, list):
        set_here = {name for name, one in own.items() if one is not None}
        return [text for text in value if not keys_set([text]) & set_here] or None
    return value


def _gpus(resources: Any) -> int:
    words = as_words(resources)
    return gpus_in(tuple(word for word in words if isinstance(word, str))) if isinstance(words, tuple) else 0


def _set(section: dict[str, Any], keys: Keys, value: Any) -> bool:
    """Set a value that is absent; return whether it was, and no plain value or null stands in its way."""
    for key in keys[:-1]:
        inner = section.setdefault(key, {})
        if not isinstance(inner, dict):
            return False
        section = inner
    if keys[-1] in section:
        return False
    section[keys[-1]] = value
    return True


def _remove(section: dict[str, Any], keys: Keys) -> None:
    """Remove a value, and the sections that are empty without it."""
    first, *rest = keys
    if rest:
        _remove(section[first], tuple(rest))
    if not rest or not section[first]:
        del section[first]
