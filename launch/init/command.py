"""`keepwarm init`: look at a model folder, corpora and a machine, and write a first job for them."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keepwarm.files import READABLE, atomic_write
from keepwarm.launch.errors import OptionError
from keepwarm.launch.init.choices import Choices, Wanted, choose, longest_sample
from keepwarm.launch.init.corpus import Corpora, Corpus, Size, find_corpora, size_of, unused_name
from keepwarm.launch.init.job_text import Draft, job_text
from keepwarm.launch.init.machine import Machine, machine
from keepwarm.launch.init.parent import check_vocabulary, choose_tokenizer, read_parent
from keepwarm.launch.plan.search import find
from keepwarm.launch.plan.text import count
from keepwarm.text import counted, is_utf8, shown
from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.tokenizer import Tokenizer, load_tokenizer
from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.estimate import total_parameters
from keepwarm.trainer.job.files import load_job
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.spec import ModelSpec

_SMALL = {"layers": 4, "hidden_size": 128, "heads": 4, "ffn_size": 344}
_MEDIUM = {"layers": 12, "hidden_size": 768, "heads": 12, "ffn_size": 2048}
_ROUNDED = 64
"""Vocabularies are a multiple of this, so that `parallel.tensor` divides them."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    model: Path | None
    data: Sequence[Path]
    replay: Sequence[Path]
    validation: Sequence[Path]
    tokenizer: str | None
    end_of_document: str | None
    tokens: int | None
    gpus: int | None
    gpu: str | None
    gpus_per_node: int | None
    output: Path
    force: bool


def write_first_job(request: Request) -> None:
    """Write a job file and say what to do with it.

    Raises:
        OutputError: the file exists, or cannot be written.
        LaunchError, TrainerError: the model, a corpus or the machine cannot be used; nothing was written.
    """
    _refuse_existing(request)
    if request.replay and request.model is None:
        raise OptionError(
            "--replay is for a model that was trained before: give --model, or name the corpus with --data"
        )
    devices = machine(request.gpus, request.gpu, request.gpus_per_node)
    draft = _draft(request, devices)
    path = request.output.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = job_text(draft, None, path.parent)
        job = _loaded(text, path.parent)
        if devices.gpus:
            text = job_text(draft, find(job, devices.card, devices.gpus, best=1)[0].job, path.parent)
            _loaded(text, path.parent)
        atomic_write(path, text.encode(), mode=READABLE)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    print("\n".join(_next(request, draft)))


def _loaded(text: str, folder: Path) -> JobSpec:
    """Return the job that the text would be as a file of this folder. Raise SpecError if it could not be loaded."""
    if not is_utf8(text):
        raise OutputError(f"{shown(str(folder))}: a path of the job is not UTF-8; rename it")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".init-", suffix=".yaml") as file:
        file.write(text.encode())
        file.flush()
        return load_job(Path(file.name))


def _refuse_existing(request: Request) -> None:
    if request.output.is_dir():
        raise OutputError(f"-o {request.output}: this is a folder; name a file in it")
    if request.output.exists() and not request.force:
        raise OutputError(f"{request.output}: exists already; give -o another name, or --force to replace it")


def _draft(request: Request, devices: Machine) -> Draft:
    parent = None if request.model is None else read_parent(request.model)
    corpora, replay = _corpora(request)
    everything = (*corpora.training, *replay, *corpora.held_out)
    named = choose_tokenizer(request.tokenizer, request.end_of_document, parent, everything)
    tokenizer = _opened(named, request.end_of_document, everything)
    if parent is not None and tokenizer is not None:
        check_vocabulary(tokenizer, parent)
    vocabulary = None if parent is None else parent.model.vocabulary_size
    sizes = {one.name: size_of(one, tokenizer, vocabulary) for one in (*corpora.training, *replay)}
    section = None if parent is not None else _from_scratch(tokenizer, everything, devices)
    model = ModelSpec(**section) if section is not None else parent.model if parent is not None else None
    assert model is not None
    return Draft(
        name=request.output.stem or "first",
        parent=None if parent is None else parent.folder,
        model=section,
        parameters=total_parameters(model),
        training=corpora.training,
        replay=replay,
        held_out=corpora.held_out,
        tokens={name: size.tokens for name, size in sizes.items()},
        exact=all(size.exact for size in sizes.values()),
        tokenizer=named,
        end_of_document=request.end_of_document,
        choices=_choices(request, devices, model, sizes, corpora),
        machine=devices,
    )


def _corpora(request: Request) -> tuple[Corpora, tuple[Corpus, ...]]:
    """Return what to train on and to evaluate, and what to replay; every corpus with a name of its own."""
    found = find_corpora(request.data, "--data")
    replay, named = find_corpora(request.replay, "--replay"), find_corpora(request.validation, "--validation")
    held_out = {one.path: one for one in (*found.held_out, *replay.held_out, *named.training, *named.held_out)}
    both = {one.path for one in replay.training}
    training = tuple(one for one in found.training if one.path not in both)
    if not training:
        raise OptionError("--replay names what --data does: give other text to learn from")
    taken = {one.name for one in training}
    return (
        Corpora(training=training, held_out=_renamed(tuple(held_out.values()), set())),
        _renamed(replay.training, taken),
    )


def _renamed(corpora: Sequence[Corpus], taken: set[str]) -> tuple[Corpus, ...]:
    renamed: dict[str, Corpus] = {}
    for one in corpora:
        name = unused_name(one.name, taken | renamed.keys())
        renamed[name] = replace(one, name=name)
    return tuple(renamed.values())


def _opened(named: str, end: str | None, corpora: Sequence[Corpus]) -> Tokenizer | None:
    """Return the tokenizer; None if nothing is text and the token files need none."""
    needed = named != "bytes" or any(one.is_text for one in corpora)
    return load_tokenizer(named, end) if needed else None


def _from_scratch(tokenizer: Tokenizer | None, corpora: Sequence[Corpus], devices: Machine) -> dict[str, Any]:
    """Return a small model for a tokenizer, or for the largest id of token files that name none."""
    if tokenizer is not None:
        size = tokenizer.largest_id + 1
    else:
        sidecars = [TokenFile(one.path).sidecar for one in corpora]
        size = max((one.vocabulary_size for one in sidecars if one is not None), default=257)
    shape = _MEDIUM if devices.gpus else _SMALL
    return {
        **shape,
        "vocabulary_size": -(-size // _ROUNDED) * _ROUNDED,
        "max_sequence_length": longest_sample(devices),
    }


def _choices(
    request: Request, devices: Machine, model: AnyModelSpec, sizes: dict[str, Size], corpora: Corpora
) -> Choices:
    wanted = Wanted(
        parameters=total_parameters(model),
        continues=request.model is not None,
        max_sequence_length=model.max_sequence_length,
        tokens={one.name: sizes[one.name].tokens for one in corpora.training},
        smallest=min(size.tokens for size in sizes.values()),
        replays=bool(request.replay),
        budget=request.tokens,
    )
    return choose(wanted, devices)


def _next(request: Request, draft: Draft) -> list[str]:
    made, where = draft.choices, "the CPU" if not draft.machine.gpus else counted(draft.machine.gpus, "GPU")
    return [
        f"{request.output}: {count(draft.parameters)} parameters, {counted(made.steps, 'step')} of "
        f"{count(made.step_tokens)} tokens, on {where}",
        "",
        f"keepwarm plan  {request.output}    # what it will do: layout, memory, stages, learning rate",
        f"keepwarm train {request.output}    # do it",
    ]
