"""The model folder that a first job starts from, and the tokenizer that its data need."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keepwarm.launch.errors import OptionError
from keepwarm.launch.init.corpus import Corpus
from keepwarm.trainer.convert.huggingface.folder import HuggingFaceFolder
from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.tokenizer import Tokenizer, load_tokenizer
from keepwarm.trainer.errors import DataError, SpecError
from keepwarm.trainer.job.run_folder import RUN_FILE
from keepwarm.trainer.model.any_spec import AnyModelSpec, stored_any_model_spec
from keepwarm.trainer.model.parent_model import model_of
from keepwarm.trainer.model.transformers.resolve import CONFIG

TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A Hugging Face folder with weights that a job can take."""

    folder: Path
    model: AnyModelSpec
    """The `model` section that keepwarm takes for it."""


def read_parent(folder: Path) -> Parent:
    """Return the model in a folder.

    Raises:
        SpecError: there is none, or keepwarm cannot train it; names the file.
        CheckpointError: its weights are missing, pickled or damaged; names the file.
    """
    if (folder / RUN_FILE).is_file():
        raise SpecError(
            f"--model {folder}: a run of keepwarm: `keepwarm branch` anneals it, and docs/continual.md shows a job "
            "that continues it on other data"
        )
    try:
        model = model_of(folder)
    except SpecError as error:
        raise SpecError(f"--model {error}") from error
    if model is None:
        what = "holds no" if folder.is_dir() else "is no folder with a"
        raise SpecError(f"--model {folder}: {what} {CONFIG}; give a folder that transformers' save_pretrained wrote")
    with HuggingFaceFolder(folder):
        return Parent(folder=folder.absolute(), model=stored_any_model_spec(model))


def choose_tokenizer(named: str | None, end: str | None, parent: Parent | None, corpora: Sequence[Corpus]) -> str:
    """Return the tokenizer of a job: the one that is named, the model's, that of the token files, else bytes.

    Raises:
        OptionError, DataError: none can be found, or it is no tokenizer.
    """
    if named is not None:
        load_tokenizer(named, end)
        return named if named == "bytes" else str(Path(named).absolute())
    if parent is not None:
        beside = next((parent.folder / name for name in TOKENIZERS if (parent.folder / name).is_file()), None)
        if beside is None:
            raise OptionError(f"{parent.folder}: holds neither {' nor '.join(TOKENIZERS)}: give --tokenizer")
        load_tokenizer(str(beside), end)
        return str(beside)
    made = {_tokenizer_of(corpus) for corpus in corpora if not corpus.is_text} - {"bytes"}
    if None in made or len(made) > 1:
        raise OptionError("the token files do not say which tokenizer made them all: give --tokenizer")
    tokenizer = next(filter(None, made), "bytes")
    if tokenizer != "bytes" and not Path(tokenizer).is_file():
        raise OptionError(f"{tokenizer}, which made the token files, is not there: give --tokenizer")
    return tokenizer if tokenizer == "bytes" else str(Path(tokenizer).absolute())


def check_vocabulary(tokenizer: Tokenizer, parent: Parent) -> None:
    """Raise DataError if a text may have ids that the model does not know."""
    size = parent.model.vocabulary_size
    if tokenizer.largest_id >= size:
        raise DataError(
            f"--tokenizer {tokenizer.name}: has ids to {tokenizer.largest_id}, the model of {parent.folder} has "
            f"{size}; give the tokenizer that the model was trained with"
        )


def _tokenizer_of(corpus: Corpus) -> str | None:
    sidecar = TokenFile(corpus.path).sidecar
    return None if sidecar is None else sidecar.tokenizer
