"""Hold the snapshot memory of a slot while its agent comes and goes: `python -P -m keepwarm.ft.keeper CONFIG.json
[DESCRIPTOR]`, with the memory file that has the job's secret; without it the first agent reads the secret's file.

The keeper creates the memory files, runs the agent as its child and starts it again, with the same files, when it dies.
It opens no socket, maps none of the memory and reads nothing that another process writes, so that nothing that ends
an agent ends the keeper too. An agent does not outlive its keeper, and the next one starts only once the last one is
dead: no two agents ever have the same memory.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import NoReturn

from keepwarm import signals
from keepwarm.ft.discovery.runtime_folder import clear, take_lock
from keepwarm.ft.errors import AgentError
from keepwarm.side_writer import protect_streams

KEEPER_MODULE = "keepwarm.ft.keeper"
"""What `python -m` runs as a keeper."""
AGENT_MODULE = "keepwarm.ft.agent"
"""What a keeper runs as an agent; agents are found by it among the processes of a machine."""
DATA_FILES = ("data0", "data1", "data2")
PARITY_FILES = ("parity0", "parity1")
FILES = ("lock", "config", "records", *DATA_FILES, *PARITY_FILES, "secret")
"""Descriptors that a keeper hands to its agent, in this order. The agent gives the memory files their sizes."""
DEFECT = 1
"""Exit code of an agent that a defect ends."""
SIGNALLED = 128
"""A keeper whose agent signal n has ended exits with this code plus n, if there is no memory worth keeping."""
RESTARTS = 8
"""Deaths in a row after which the memory is given up: whatever ends the agent may lie in it."""
LIVED_S = 60.0
"""An agent that has lived for this time ends a row of deaths."""
FIRST_PAUSE_S = 0.05
"""Pause before an agent is started again. It doubles with every death of a row."""
PAUSE_STEP_S = 0.05
_PR_SET_PDEATHSIG = 1
_ASKED = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a keeper, or its agent, to end."""


class AgentExit(IntEnum):
    """Exit codes of an agent that cannot start. The process that started its keeper acts on them."""

    BAD_CONFIG = 2
    TAKEN = 3
    """The slot has a keeper already, or its folder cannot be used."""
    MEMORY_TOO_SMALL = 4


_libc = ctypes.CDLL(None, use_errno=True)


def memory_file(label: str) -> int:
    """Return the descriptor of a new, empty memory file. `label` appears in /proc/PID/maps and /proc/PID/fd."""
    return os.memfd_create(f"keepwarm:{label}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


class Holding:
    """The memory files of a slot, its configuration as the first agent got it, and the lock of its folder."""

    def __init__(self, config: Path, secret: int | None = None) -> None:
        """Create the files and lock the folder of `config`. Raise `AgentError` if another process has it.

        `secret` is the descriptor of a memory file with the job's secret.
        """
        self.folder = config.parent
        content = config.read_bytes()
        self.files = {"lock": take_lock(self.folder), **{name: memory_file(name) for name in FILES[1:]}}
        os.write(self.files["config"], content)
        if secret is not None:
            os.set_inheritable(secret, False)
            os.close(self.files["secret"])
            self.files["secret"] = secret

    @property
    def worth_keeping(self) -> bool:
        """Whether an agent has written down that there is something in the memory."""
        return os.fstat(self.files["records"]).st_size > 0

    def close(self) -> None:
        """Free the memory, if nothing else has it, and remove the folder."""
        for name in FILES[1:]:
            os.close(self.files[name])
        clear(self.folder, self.files["lock"])


def arguments_of(files: Mapping[str, int], config: Path) -> list[str]:
    """Return the arguments of an agent that inherits the files. The path only tells which agent it is."""
    return [",".join(str(files[name]) for name in FILES), str(config)]


class Keeper:
    """Runs one agent after the other until one of them ends as it should."""

    def __init__(self, holding: Holding, config: Path) -> None:
        self._holding, self._config = holding, config
        self._agent = 0
        self._stopping = False

    def run(self) -> int:
        """Return the exit code of the last agent."""
        signal.signal(signal.SIGTERM, self._asked)
        signals.handle((signal.SIGINT,), self._asked)
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        deaths = 0
        while True:
            began = time.monotonic()
            self._agent = self._start()
            if self._stopping:  # asked just now
                os.kill(self._agent, signal.SIGTERM)
            code = os.waitstatus_to_exitcode(os.waitpid(self._agent, 0)[1])
            self._agent = 0
            deaths = 1 if time.monotonic() - began > LIVED_S else deaths + 1
            ended = code == 0 or not self._holding.worth_keeping
            if ended or deaths > RESTARTS or self._paused(deaths):
                return code if code >= 0 else SIGNALLED - code

    def _paused(self, deaths: int) -> bool:
        """Pause before the next start. Return whether there is none, because the keeper was asked to end."""
        end = time.monotonic() + FIRST_PAUSE_S * 2 ** (deaths - 1)
        while not self._stopping and time.monotonic() < end:
            time.sleep(PAUSE_STEP_S)
        return self._stopping

    def _asked(self, number: int, frame: FrameType | None) -> None:
        """Pass the request to end to the agent, which first lets its workers leave."""
        self._stopping = True
        if self._agent:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self._agent, signal.SIGTERM)

    def _start(self) -> int:
        """Start an agent, which dies with this process. Return its pid."""
        command = [sys.executable, "-P", "-m", AGENT_MODULE, *arguments_of(self._holding.files, self._config)]
        mine = os.getpid()
        with signals.held(_ASKED):
            child = os.fork()
            if not child:
                self._run_child(command, mine)
            return child

    def _run_child(self, command: list[str], parent: int) -> NoReturn:
        try:
            for number in set(_ASKED) - signals.ignored(_ASKED):
                signal.signal(number, signal.SIG_DFL)
            signals.release(_ASKED)
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                for descriptor in self._holding.files.values():
                    os.set_inheritable(descriptor, True)
                os.execv(command[0], command)
        finally:
            os._exit(DEFECT)


def main(arguments: list[str]) -> int:
    protect_streams()
    if len(arguments) not in (1, 2):
        print("usage: python -P -m keepwarm.ft.keeper CONFIG.json [DESCRIPTOR]", file=sys.stderr)
        return AgentExit.BAD_CONFIG
    config = Path(arguments[0])
    try:
        holding = Holding(config, int(arguments[1]) if len(arguments) == 2 else None)
    except (AgentError, OSError) as error:
        print(error, file=sys.stderr)
        return AgentExit.TAKEN if isinstance(error, AgentError) else AgentExit.BAD_CONFIG
    try:
        return Keeper(holding, config).run()
    finally:
        holding.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
