"""Find the tokenizer that a checkpoint's model was trained with. Without torch."""

import shutil
from pathlib import Path
from typing import Any

from keepwarm.files import sync_file
from keepwarm.trainer.convert.huggingface.folder import dump_config, strict_json_file
from keepwarm.trainer.convert.huggingface.importer import FILES
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.convert.output_folder import write_file
from keepwarm.trainer.data.huggingface_tokenizer import HuggingFaceTokenizer
from keepwarm.trainer.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from keepwarm.trainer.errors import DataError
from keepwarm.trainer.job.run_folder import RunFolder

CARRIED = ("tokenizer.json", "tokenizer.model")
"""Names of tokenizer files that are carried along."""


def find_tokenizer(native: NativeCheckpoint, end_of_document: str | None = None) -> Tokenizer:
    """Return the tokenizer of a checkpoint: stored in it, or named by its run; `end_of_document` overrules its own.

    Raises:
        DataError: it is unknown, or has changed.
    """
    for name in CARRIED:
        if name in ((native.manifest.meta.get(FILES) or {}).get("files") or {}):
            return load_tokenizer(str(native.path / FILES / name), end_of_document)
    file = run_file(native)
    if not file.is_file():
        raise DataError(f"{native.path}: does not say which tokenizer its model was trained with: give --tokenizer")
    data = strict_json_file(file).get("data") or {}
    name, end = _named(data)
    found = load_tokenizer(name, end if end_of_document is None else end_of_document)
    wanted = (native.manifest.meta.get("run") or {}).get("tokenizer")
    if wanted is not None and found.hash != wanted:
        raise DataError(f"{found.name}: is not the tokenizer that {native.path} was trained with: give --tokenizer")
    return found


def write_tokenizer(
    native: NativeCheckpoint, folder: Path, context: int
) -> tuple[list[str], dict[str, Any], list[str]]:
    """Write the tokenizer of a run into a Hugging Face folder, in transformers' format.

    Returns the names of the files, fields for the model's config, and what could not be carried over.
    """
    if not run_file(native).is_file():
        return [], {}, []
    try:
        found = find_tokenizer(native)
    except DataError as error:
        return [], {}, [f"tokenizer: {error}"]
    if not isinstance(found, HuggingFaceTokenizer):
        return [], {}, [f"tokenizer {found.name}"]
    target = folder / "tokenizer.json"
    shutil.copyfile(found.name, target)
    sync_file(target)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": found.end_of_document_text,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    write_file(folder / "tokenizer_config.json", dump_config(config))
    return [target.name, "tokenizer_config.json"], {"eos_token_id": found.end_of_document}, []


def run_file(native: NativeCheckpoint) -> Path:
    """Return the path of the job file of the run that contains a checkpoint, if there is one."""
    return RunFolder(native.path.resolve().parent.parent).run_file


def _named(data: dict[str, Any]) -> tuple[str, str | int | None]:
    """Return the tokenizer named by the job or by the sidecars of its token files, and its end of a document."""
    name = str(data.get("tokenizer", ByteTokenizer.name))
    if name != ByteTokenizer.name:
        return name, data.get("end_of_document")
    for source in (data.get("sources") or {}).values():
        sidecar = Path(f"{source}.json")
        if sidecar.is_file():
            fields = strict_json_file(sidecar)
            return str(fields.get("tokenizer") or name), fields.get("end_of_document")
    return name, None
