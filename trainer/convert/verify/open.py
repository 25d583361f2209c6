"""Open a model of any format that `keepwarm convert` reads or writes."""

from pathlib import Path

from keepwarm.trainer.convert.importer import ImportOptions
from keepwarm.trainer.convert.verify.of_foreign import DcpModel, of_deepspeed
from keepwarm.trainer.convert.verify.of_huggingface import check_installed, of_folder
from keepwarm.trainer.convert.verify.of_native import NativeModel
from keepwarm.trainer.convert.verify.opened import Opened


def opened(path: Path, kind: str, options: ImportOptions) -> Opened:
    """Return the model in `path`, a folder of the format `kind`.

    Raises:
        SpecError: there is no transformers to compute with, or the model cannot be described.
        CheckpointError: a file is missing or damaged; names it.
    """
    match kind:
        case "native":
            return NativeModel(path)
        case "hf":
            check_installed()
            return of_folder(path)
        case "deepspeed":
            check_installed()
            return of_deepspeed(path, options)
        case _:
            return DcpModel(path, kind, options)
