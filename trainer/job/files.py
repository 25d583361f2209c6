"""Job and model spec files: read YAML, apply overrides, write `run.json`. Torch-free."""

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

import keepwarm
from keepwarm.files import READABLE, atomic_write, sync_directory
from keepwarm.parallel.errors import LayoutError
from keepwarm.text import is_utf8, shown
from keepwarm.trainer.errors import OutputError, SpecError
from keepwarm.trainer.job.cluster import STORED
from keepwarm.trainer.job.messages import explain
from keepwarm.trainer.job.overrides import Override
from keepwarm.trainer.job.renames import upgrade
from keepwarm.trainer.job.run_folder import PROPOSED_FILE, RUN_FILE, SUBMITTED_FILE
from keepwarm.trainer.job.site.defaults import SOURCES, fill, release
from keepwarm.trainer.job.site.site_file import read_site
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.url import expand_paths, is_remote, local_path, path_override
from keepwarm.trainer.job.yaml import Document, Keys, read_document
from keepwarm.trainer.model.parent_model import model_of
from keepwarm.trainer.model.spec import ModelSpec
from keepwarm.trainer.model.transformers.resolve import resolved

_Spec = TypeVar("_Spec", bound=BaseModel)
_PROPOSALS = (PROPOSED_FILE, SUBMITTED_FILE)


def shipped_configs() -> Path:
    """Return the folder of the configs shipped with keepwarm."""
    return (Path(keepwarm.__file__).parent / "configs").resolve()


def load_job(path: Path, overrides: Sequence[str] = (), *, resubmit: bool = False) -> JobSpec:
    """Load the job from a YAML file or `run.json`, with overrides applied and the named model filled in.

    What a job file lacks in `cluster` comes from the site file. A `run.json` has the values of its submission; with
    `resubmit`, those of a site file are replaced by today's.

    `path` may also name a shipped job, such as `ci/tiny`. Data paths in the file are relative to the file; those in
    overrides, `output` and `init_from` are relative to the working directory. In the result all are absolute, and `~`
    and environment variables are expanded.

    Raises:
        SpecError: lists every problem with its file and line, its key and the expected value.
    """
    path = find_job(path)
    document, changes = _read(path, overrides)
    takes_defaults = resubmit or not is_run_file(path)
    if takes_defaults:
        release(document)
    _anchor_data(document.values, path.parent)
    model_base = path.parent
    for change in changes:
        if change.keys == ("model",):
            change.apply(document)
            model_base = Path.cwd()
    _resolve_model(document, model_base)
    _take_model(document, changes)
    _anchor_config(document.values, model_base)
    for change in changes:
        if change.keys != ("model",):
            change.apply(document)
    _anchor_config(document.values, Path.cwd())
    _resolve_config(document)
    _anchor_data(document.values, Path.cwd())
    for key in ("output", "init_from"):
        if isinstance(document.values.get(key), str) and not (key == "init_from" and is_remote(document.values[key])):
            document.values[key] = _anchored(document.values[key], Path.cwd())
    if takes_defaults:
        _take_defaults(document)
    is_stored = is_run_file(path) and not any(change.keys[0] == "cluster" for change in changes)
    return _validate(JobSpec, document, path, STORED if is_stored else None)


def _take_defaults(document: Document) -> None:
    """Fill the `cluster` section from the site file, and record where its values came from."""
    sources = fill(document, read_site())
    cluster = document.values["cluster"]
    if isinstance(cluster, dict):
        cluster.setdefault(SOURCES, sources)


def _read(path: Path, overrides: Sequence[str]) -> tuple[Document, list[Override]]:
    """Read a job file and its overrides, with `~` and variables in paths expanded. A `run.json` has neither."""

    def refuse(keys: Keys, why: str) -> SpecError:
        return SpecError(f"{document.place(keys)}: {'.'.join(keys)}: {why}")

    def refuse_override(keys: Keys, why: str) -> SpecError:
        return SpecError(f"override {'.'.join(keys)}: {why}")

    document = read_document(path)
    if is_run_file(path):
        upgrade(document.values)
    else:
        document.values = expand_paths(document.values, (), refuse)
    changes = [Override.parse(text) for text in overrides]
    return document, [replace(one, value=expand_paths(one.value, one.keys, refuse_override)) for one in changes]


def load_model(name: str | Path) -> ModelSpec:
    """Load a model spec from a YAML file, or a shipped one by name.

    Raises:
        SpecError: as `load_job`.
    """
    path = find_model(str(name), Path.cwd())
    return _validate(ModelSpec, read_document(path), path)


_held: dict[Path, JobSpec] = {}


def hold(path: Path, job: JobSpec) -> None:
    """Let `load_run` return `job` for this path, in this process and its forks: its storage may not answer by then."""
    _held[path] = job


def load_run(path: Path, overrides: Sequence[str] = (), *, resubmit: bool = False) -> JobSpec:
    """Load the job from the `run.json` of a run folder, or a proposed spec beside it; the output is that folder, even
    if it has been moved. If the proposal is absent because it was accepted, load `run.json`. `resubmit` as in
    `load_job`.

    Raises:
        SpecError: as `load_job`.
    """
    if path in _held and not overrides and not resubmit:
        return _held[path]
    folder = path.resolve().parent
    changes = [*overrides, path_override("output", folder)]
    try:
        return load_job(path, changes, resubmit=resubmit)
    except SpecError:
        if path.name not in _PROPOSALS or path.exists():
            raise
    return load_job(path.with_name(RUN_FILE), changes, resubmit=resubmit)


def is_run_file(path: Path) -> bool:
    """Return whether the name is that of a run's spec, accepted or proposed, rather than of a job file."""
    return path.name in (RUN_FILE, *_PROPOSALS)


def accept(path: Path) -> None:
    """Replace `run.json` with the spec that the ranks were started with, if it is a proposal not yet accepted.

    Raises:
        OutputError: the folder is read-only.
    """
    if path.name not in _PROPOSALS:
        return
    try:
        path.replace(path.with_name(RUN_FILE))
        sync_directory(path.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path.with_name(RUN_FILE)}: cannot be replaced: {error.strerror or error}") from error


def spec_files(path: Path, overrides: Sequence[str] = ()) -> dict[str, Path]:
    """Return the files that `load_job` reads for a job, by what they are: the job file, and the model's if it names
    one.

    Raises:
        SpecError: as `load_job`.
    """
    path = find_job(path)
    document, changes = _read(path, overrides)
    model, base = document.values.get("model"), path.parent
    for change in changes:
        if change.keys == ("model",):
            model, base = change.value, Path.cwd()
    return {"the job file": path} | ({"model": find_model(model, base)} if isinstance(model, str) else {})


def save_job(job: JobSpec, path: Path) -> None:
    """Write the resolved spec as JSON, atomically.

    Raises:
        OutputError: the folder is missing, read-only or full.
    """
    try:
        atomic_write(path, (job.model_dump_json(indent=2) + "\n").encode(), mode=READABLE, durable=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def find_job(name: Path) -> Path:
    """Return the file of a job: `name` itself or a shipped one, as `ci/tiny`, `demo` or `configs/jobs/demo.yaml`."""
    shipped = shipped_configs()
    inner = Path(*name.parts[1:]) if name.parts[:1] == ("configs",) else name
    return _first_file("job", name, [name, shipped / inner, shipped / "jobs" / inner], ("jobs", "ci"))


def find_model(name: str, base: Path) -> Path:
    """Return the file of a model: a bare name is a shipped one, anything else a path relative to `base`."""
    shipped, beside = shipped_configs() / "models" / name, base / name
    is_bare = Path(name).name == name and Path(name).suffix != ".yaml"
    return _first_file("model", Path(name), [shipped] if is_bare else [beside, shipped], ("models",))


def _first_file(kind: str, name: Path, places: list[Path], folders: Sequence[str]) -> Path:
    """Return the first of `places` that is a file, trying each with and without `.yaml`."""
    for place in places:
        for candidate in (place, place.with_name(place.name + ".yaml")):
            if candidate.is_file():
                return candidate
    if name.is_dir():
        raise SpecError(f"{name}: expected a {kind} file, got a folder")
    known = [file.stem for folder in folders for file in (shipped_configs() / folder).glob("*.yaml")]
    near = difflib.get_close_matches(name.stem, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(sorted(known))}"
    raise SpecError(f"{name}: no such {kind} file; {hint}")


def _resolve_model(document: Document, base: Path) -> None:
    """Replace the name of a model with the model's keys."""
    named = document.values.get("model")
    if not isinstance(named, str):
        return
    try:
        model = read_document(find_model(named, base))
    except (SpecError, ValueError) as error:
        raise SpecError(f"{document.place(('model',))}: model: {error}") from error
    document.graft(("model",), model.values, model.places)


def _take_model(document: Document, changes: Sequence[Override]) -> None:
    """Fill in the model of the Hugging Face folder in `init_from`, if the job names no model."""
    values = document.values | {change.keys[0]: change.value for change in changes if len(change.keys) == 1}
    parent, ignored = values.get("init_from"), values.get("init_from_ignore_keys")
    if values.get("model") is not None or not isinstance(parent, str) or is_remote(parent):
        return
    try:
        model = model_of(
            Path(_anchored(parent, Path.cwd())), [str(one) for one in ignored] if isinstance(ignored, list) else ()
        )
    except SpecError as error:
        raise SpecError(f"{document.place(('init_from',))}: init_from: {error}") from error
    if model is not None:
        document.graft(("model",), model, {(): document.place(("init_from",))})


def _anchor_config(values: dict[str, Any], base: Path) -> None:
    """Make the path of the config that the model names absolute."""
    model = values.get("model")
    if isinstance(model, dict) and "transformers" in model:
        model["transformers"] = _anchored(model["transformers"], base)


def _resolve_config(document: Document) -> None:
    """Add the content and the description of the config that the model names, unless a run has stored them."""
    model = document.values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("transformers"), str) or "description" in model:
        return
    try:
        document.values["model"] = resolved(model)
    except SpecError as error:
        raise SpecError(f"{document.place(('model', 'transformers'))}: model.transformers: {error}") from error


def _anchor_data(values: dict[str, Any], base: Path) -> None:
    """Make the relative paths in the data section absolute."""
    data = values.get("data")
    if not isinstance(data, dict):
        return
    for table in (data.get("sources"), data.get("validation")):
        if isinstance(table, dict):
            table |= {name: _anchored(path, base) for name, path in table.items()}
    if data.get("tokenizer", "bytes") != "bytes":
        data["tokenizer"] = _anchored(data["tokenizer"], base)


def _anchored(path: Any, base: Path) -> Any:
    return os.path.normpath(base.resolve() / local_path(path)) if isinstance(path, str) and path else path


def _texts(value: Any, keys: Keys) -> Iterator[tuple[Keys, str]]:
    """Yield every text in a value, and every key of a mapping, with its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*keys, key), key
            yield from _texts(inner, (*keys, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*keys, str(index)))
    elif isinstance(value, str):
        yield keys, value


def _validate(spec: type[_Spec], document: Document, path: Path, context: dict[str, bool] | None = None) -> _Spec:
    for keys, text in _texts(document.values, ()):
        if not is_utf8(text):
            raise SpecError(f"{document.place(keys)}: {shown('.'.join(keys))}: {shown(text)} is not UTF-8 text")
    try:
        return spec.model_validate_json(json.dumps(document.values), context=context)
    except ValidationError as error:
        problems = explain(error, spec, document)
    except LayoutError as error:
        problems = [f"{path}: {error}"]
    if len(problems) == 1:
        raise SpecError(problems[0])
    raise SpecError("\n  ".join([f"{path}: {len(problems)} problems", *problems]))
