"""Profiler window: a Chrome trace, and on CUDA a memory snapshot, of selected steps of each rank."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from keepwarm import side_writer
from keepwarm.trainer.job.sections import ProfileSpec


@contextlib.contextmanager
def _best_effort() -> Iterator[None]:
    """Let no failure to write end the training; torch reports it as RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        side_writer.lost("profile", error)


class ProfileWindow:
    """Records steps `start` to `start + steps` into `folder`; without files if they cannot be written."""

    def __init__(self, spec: ProfileSpec, folder: Path, rank: int, device: torch.device) -> None:
        self._spec = spec
        self._folder = folder
        self._rank = rank
        self._on_cuda = device.type == "cuda"
        self._profiler: profile | None = None

    def before(self, step: int) -> None:
        """Call before step `step`, counted from 0."""
        if step != self._spec.start:
            return
        with _best_effort():
            self._folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if self._on_cuda:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def after(self, step: int) -> None:
        """Call after step `step`; the last step of the window writes the files."""
        if step == self._spec.start + self._spec.steps - 1:
            self.close()

    def close(self) -> None:
        """Write what was recorded so far if the window is open."""
        if self._profiler is None:
            return
        self._profiler.stop()
        with _best_effort():
            _replace(self._folder / f"trace_{self._rank:05d}.json", self._profiler.export_chrome_trace)
        if self._on_cuda:
            with _best_effort():
                _replace(self._folder / f"memory_{self._rank:05d}.pickle", torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profiler = None


def _replace(path: Path, write: Callable[[str], object]) -> None:
    """Have a file written under another name first: half of it must not look like a whole one."""
    temporary = path.with_name(f".{path.name}")
    try:
        write(str(temporary))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
