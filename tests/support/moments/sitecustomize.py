"""Kills one worker at named moments of the snapshot protocol; imported by every Python process that has this folder on
its path.

Each file `NAME@STEP` in the folder that KEEPWARM_TEST_MOMENTS names is one kill, of the worker of rank
KEEPWARM_TEST_RANK, at the first time that the moment comes at that step or later; whoever strikes renames the file
first, so that a moment comes once. A worker ends itself in what it does alone; its agent kills it at what only an agent
knows.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(os.environ["KEEPWARM_TEST_MOMENTS"])
RANK = int(os.environ["KEEPWARM_TEST_RANK"])
PER_NODE = int(os.environ["KEEPWARM_TEST_RANKS_PER_NODE"])


def due(name: str, step: int) -> bool:
    """Whether this moment is to be struck, which the caller then does."""
    for path in FOLDER.glob(f"{name}@*"):
        if step >= int(path.name.partition("@")[2]):
            try:
                path.rename(path.with_name(f"done {path.name} of step {step}"))
            except FileNotFoundError:  # another thread was faster
                continue
            return True
    return False


def watch_worker(module: Any) -> None:
    """In the snapshotter: between the grant and the copy, in the middle of the copy, and in the middle of a restore."""
    snapshotter: Any = module.Snapshotter
    copy, write, copyto = snapshotter._copy, module._write, module.np.copyto
    now = {"step": -1, "tensors": 0}

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def copying(self: Any, snapshot: Any, *rest: Any) -> Any:
        if self.place.rank != RANK:
            return copy(self, snapshot, *rest)
        if due("granted", snapshot.step):
            die()
        now["step"], now["tensors"] = snapshot.step, 0
        try:
            return copy(self, snapshot, *rest)
        finally:
            now["step"] = -1

    def copied(*arguments: Any) -> None:
        copyto(*arguments)
        if now["step"] >= 0:
            now["tensors"] += 1
            if now["tensors"] == 3 and due("copying", now["step"]):
                die()

    def written(shard: Any, moves: Any, source: Any) -> None:
        write(shard, moves, source)
        if source._place.rank == RANK and due("restore", source._snapshot.step):
            die()

    class Numpy:
        """The module of that name, as `keepwarm.ft.worker.snapshotter` sees it."""

        copyto = staticmethod(copied)

        def __getattr__(self, name: str) -> Any:
            return getattr(numpy, name)

    numpy = module.np
    snapshotter._copy, module._write, module.np = copying, written, Numpy()


sessions: list[Any] = []


def watch_sessions(module: Any) -> None:
    """In `keepwarm.ft.agent.worker_sessions`: who knows the processes of the workers."""
    sessions: Any = module.WorkerSessions
    init = sessions.__init__

    def made(self: Any, *arguments: Any, **more: Any) -> None:
        init(self, *arguments, **more)
        sessions.append(self)

    sessions.__init__ = made


def watch_agent(module: Any) -> None:
    """In `keepwarm.ft.protocol.step`, after each event of an agent: how far its copies have come."""
    step = module.step

    def stepped(state: Any, event: Any) -> Any:
        after, effects = step(state, event)
        session = sessions[0].workers.get(RANK % PER_NODE) if sessions and after.slot == RANK // PER_NODE else None
        if session is not None and any(due(moment(copy, after.slot), copy.snapshot.step) for copy in after.copies):
            session.holder.kill()
        return after, effects

    module.step = stepped


def moment(copy: Any, slot: int) -> str:
    """The name of what an agent's copy is in."""
    if copy.phase.value != "sealed":
        return str(copy.phase.value)
    begun = any(progress.next for progress in copy.coding.values())
    return "stored" if slot in copy.members else "coding" if begun else "sealed"


class Finder(importlib.abc.MetaPathFinder):
    """Lets a watcher at a module right after it was loaded."""

    def __init__(self) -> None:
        self.watchers: dict[str, Callable[[Any], None]] = {
            "keepwarm.ft.worker.snapshotter": watch_worker,
            "keepwarm.ft.protocol.step": watch_agent,
            "keepwarm.ft.agent.worker_sessions": watch_sessions,
        }

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        watcher = self.watchers.get(name)
        if watcher is None:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            watcher(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
