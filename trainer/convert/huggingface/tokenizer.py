"""Find the tokenizer that a checkpoint's model was trained with. Without torch."""

import json
import shutil
from pathlib import Path
from typing import Any

from keepwarm.files import sync_file
from keepwarm.trainer.convert.huggingface.folder import dump_config, strict_json_file
from keepwarm.trainer.convert.huggingface.importer import FILES
from keepwarm.trainer.convert.native import NativeCheckpoint
from keepwarm.trainer.convert.output_folder import write_file
from keepwarm.trainer.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from keepwarm.trainer.errors import DataError
from keepwarm.trainer.job.run_folder import RunFolder

CARRIED = ("tokenizer.json", "tokenizer.model")
"""Names of tokenizer files that are carried along."""


def find_tokenizer(native: NativeCheckpoint) -> Tokenizer:
    """Return the tokenizer of a checkpoint: stored in it, or named by its run.

    Raises:
        DataError: it is unknown, or has changed.
    """
    for name in CARRIED:
        if name in ((native.manifest.meta.get(FILES) or {}).get("files") or {}):
            return load_tokenizer(str(native.path / FILES / name))
    file = run_file(native)
    if not file.is_file():
        raise DataError(f"{native.path}: does not say which tokenizer its model was trained with: give --tokenizer")
    data = strict_json_file(file).get("data") or {}
    found = load_tokenizer(_named(data, file))
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
    table = json.loads(target.read_bytes())
    end = next(token["content"] for token in table["added_tokens"] if token["id"] == found.end_of_document)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    write_file(folder / "tokenizer_config.json", dump_config(config))
    return [target.name, "tokenizer_config.json"], {"eos_token_id": found.end_of_document}, []


def run_file(native: NativeCheckpoint) -> Path:
    """Return the path of the job file of the run that contains a checkpoint, if there is one."""
    return RunFolder(native.path.resolve().parent.parent).run_file


def _named(data: dict[str, Any], file: Path) -> str:
    """Return the tokenizer named by the job or by the sidecars of its token files."""
    name = str(data.get("tokenizer", ByteTokenizer.name))
    if name != ByteTokenizer.name:
        return name
    for source in (data.get("sources") or {}).values():
        sidecar = Path(f"{source}.json")
        if sidecar.is_file():
            return str(strict_json_file(sidecar).get("tokenizer") or name)
    return name
