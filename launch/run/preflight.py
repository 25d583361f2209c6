"""Preflight checks of this machine before ranks start; each raises an error of one readable sentence."""

import shutil
from pathlib import Path

from keepwarm.launch.errors import PreflightError
from keepwarm.launch.plan.plan import Plan
from keepwarm.launch.plan.text import size
from keepwarm.launch.run.node_check import gpu_count, memory_free
from keepwarm.parallel.engine_support import require
from keepwarm.parallel.errors import EngineUnavailable
from keepwarm.parallel.kernels import KERNELS
from keepwarm.text import problem_of_path
from keepwarm.trainer.data.preprocess.text import is_text
from keepwarm.trainer.data.spec import DataSpec
from keepwarm.trainer.errors import CheckpointError, DataError, SpecError
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.shrink import layouts
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.url import is_url
from keepwarm.trainer.model.spec import ModelSpec


def check_job(job: JobSpec) -> None:
    """Run all checks possible on a machine that sees the job's data and output.

    Raises:
        PreflightError, DataError: the job cannot run; the message gives the reason.
    """
    check_engine(job)
    check_data_exists(job.data)
    check_parent(job)
    check_disk(job)


def check_memory(job: JobSpec, *, emulated: bool) -> None:
    """Raise PreflightError if a layout that the job may shrink to needs more memory than this machine has free.

    `emulated` means that all nodes of the layout run on this machine.
    """
    if job.cluster.elastic == "wait":
        return
    gpus, free = gpu_count() > 0, memory_free()
    for nodes, smaller in layouts(job).items():
        needed = Plan(smaller).node_memory(gpus=gpus) * (nodes if emulated else 1)
        if needed > free:
            raise PreflightError(
                f"cluster.elastic = shrink: with parallel.data = {smaller.parallel.data} on {nodes} nodes each one "
                f"needs about {size(needed // (nodes if emulated else 1))} of host memory, and {size(free)} are free "
                "here: raise cluster.min_data_parallel"
            )


def check_disk(job: JobSpec) -> None:
    """Raise PreflightError if the output's disk has no room for a single checkpoint."""
    folder = Path(job.output).absolute()
    while not folder.is_dir():
        folder = folder.parent
    needed, disk = Plan(job).checkpoint_bytes, shutil.disk_usage(folder)
    if needed > disk.free and disk.total:  # a total of 0 is not a real disk
        raise PreflightError(
            f"a checkpoint of this job takes {size(needed)}, and {folder} has {size(disk.free)} free: "
            "make room, or choose another place with output=PATH"
        )


def check_engine(job: JobSpec) -> None:
    """Raise PreflightError if the engine or a fused kernel that the job requests is unavailable here."""
    try:
        require(job)
    except EngineUnavailable as error:
        raise PreflightError(str(error)) from error
    for kernel in KERNELS:
        if kernel.is_asked_by(job) and kernel.missing:
            raise PreflightError(kernel.problem)


def check_data_exists(spec: DataSpec) -> None:
    """Raise DataError with every missing path. Called before the run folder is touched."""
    missing = []
    for section, table in (("sources", spec.sources), ("validation", spec.validation)):
        for name, path in table.items():
            missing += [f"data.{section}.{name}: {why}" for file in data_files(path) if (why := _unusable(file))]
    if spec.tokenizer != "bytes" and (why := _unusable(Path(spec.tokenizer))):
        missing.append(f"data.tokenizer: {why}")
    if missing:
        raise DataError("\n  ".join([f"{len(missing)} data files are missing:", *missing] if missing[1:] else missing))


def check_parent(job: JobSpec) -> None:
    """Raise DataError if `init_from` is a folder that does not exist, or one of Hugging Face that cannot be read.

    A run that goes on has read it already.
    """
    if job.init_from is None or is_url(job.init_from) or RunFolder(Path(job.output)).exists:
        return
    try:
        if not Path(job.init_from).exists():
            raise DataError(f"init_from: {job.init_from}: no such folder")
        if (Path(job.init_from) / "config.json").is_file():
            # Imports numpy, which no other check needs.
            from keepwarm.trainer.convert.huggingface.importer import check_folder

            model = None if isinstance(job.model, ModelSpec) else job.model
            check_folder(Path(job.init_from), job.init_from_ignore_keys, model)
    except (CheckpointError, SpecError) as error:
        raise DataError(f"init_from: {error}") from error
    except OSError as error:
        raise DataError(f"init_from: {problem_of_path(error) or error}") from error


def _unusable(file: Path) -> str | None:
    try:
        return None if file.is_file() else f"{file}: no such file"
    except OSError as error:
        return problem_of_path(error) or f"{file}: {error.strerror}"


def data_files(path: str) -> list[Path]:
    """Return the files of a data source: its text, or those of a Megatron prefix."""
    if is_text(path):
        return [Path(path)]
    return [Path(f"{path}.idx"), Path(f"{path}.bin")]
