"""Profiler window: a Chrome trace, and on CUDA a memory snapshot, of selected steps of each rank."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from keepwarm.trainer.job.sections import ProfileSpec


class ProfileWindow:
    """Records steps `start` to `start + steps` into `folder`."""

    def __init__(self, spec: ProfileSpec, folder: Path, rank: int) -> None:
        self._spec = spec
        self._folder = folder
        self._rank = rank
        self._profiler: profile | None = None

    def before(self, step: int) -> None:
        """Call before step `step`, counted from 0."""
        if step != self._spec.start:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
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
        self._profiler.export_chrome_trace(str(self._folder / f"trace_{self._rank:05d}.json"))
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory_{self._rank:05d}.pickle"))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profiler = None
