"""The site file: a cluster's defaults of `cluster`, for every job. Torch-free.

The user's file stands over the system's, and both below the job file and its overrides.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job.messages import explain
from keepwarm.trainer.job.sections import ClusterSpec
from keepwarm.trainer.job.site.defaults import fill
from keepwarm.trainer.job.url import expand_paths
from keepwarm.trainer.job.yaml import Document, Keys, describe, read_document

VARIABLE = "KEEPWARM_SITE"
SYSTEM_FILE = Path("/etc/keepwarm/site.yaml")
_BATCH_SYSTEMS = ("slurm", "kubernetes")


def user_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return where the user's own site file lies; None without a home directory."""
    configured = environment.get("XDG_CONFIG_HOME", "")
    if not configured.startswith("/"):  # a relative one is to be ignored
        try:
            configured = str(Path("~/.config").expanduser())
        except RuntimeError:
            return None
    return Path(configured) / "keepwarm" / "site.yaml"


def site_files(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Return the site files that apply here, the user's first: those that exist, or the one that KEEPWARM_SITE names.

    Raises:
        SpecError: KEEPWARM_SITE names a file that does not exist, or one of the files cannot be looked at.
    """
    named = environment.get(VARIABLE)
    if named is not None:
        if named and not Path(named).is_file():
            raise SpecError(f"{VARIABLE}={named}: no such file; leave it empty for no site file")
        return [Path(named)] if named else []
    places = [place for place in (user_file(environment), SYSTEM_FILE) if place is not None]
    try:
        return [place for place in places if place.exists()]
    except OSError as error:
        raise SpecError(f"{error.filename}: {error.strerror}; {VARIABLE}= ignores site files") from error


def read_site(environment: Mapping[str, str] = os.environ) -> Document:
    """Return the defaults of the site files, merged, below the key `cluster`; each with its place.

    Raises:
        SpecError: lists every problem with its file and line, its key and the expected value.
    """
    merged = Document({"cluster": {}})
    for path in site_files(environment):
        fill(merged, _read(path))
    try:
        ClusterSpec.model_validate_json(json.dumps(merged.values["cluster"]))
    except ValidationError as error:
        problems = explain(error, ClusterSpec, merged, ("cluster",))
        raise SpecError("\n  ".join(problems if len(problems) == 1 else ["site files:", *problems])) from error
    return merged


def _read(path: Path) -> Document:
    """Read one site file, with paths expanded; empty sections are left out."""

    def refuse(keys: Keys, why: str) -> SpecError:
        return SpecError(f"{document.place(keys)}: {'.'.join(keys)}: {why}")

    document = read_document(path, may_be_empty=True)
    for key in document.values:
        if key != "cluster":
            raise refuse((key,), "a site file has no other key than cluster; everything else belongs to a job")
    cluster = document.values.get("cluster")
    if not isinstance(cluster, dict | None):
        raise refuse(("cluster",), f"expected a section with keys, got {describe(cluster)}")
    known = [*_BATCH_SYSTEMS, *ClusterSpec.added_names()]
    for key in cluster or {}:
        if key not in known:
            raise refuse(
                ("cluster", key), f"a site file has only the sections of batch systems here: {', '.join(known)}"
            )
    document.values = expand_paths(
        {"cluster": {key: section for key, section in (cluster or {}).items() if section is not None}}, (), refuse
    )
    return document
