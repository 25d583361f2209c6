"""End or requeue a SLURM job from inside, so that SLURM names its end as users expect: CANCELLED or TIMEOUT."""

import contextlib
import signal
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from keepwarm.exit_code import ExitCode
from keepwarm.launch.errors import ClusterError
from keepwarm.launch.slurm import commands
from keepwarm.trainer.monitor import events

GRACE_S = 60.0
"""Seconds to wait for SLURM to end this process, after a requeue or at a limit: it checks limits twice a minute."""
NEAR_LIMIT_S = 90.0
"""How much earlier than asked for SLURM may announce the time limit: a minute by its manual, and a step."""


@dataclass(frozen=True)
class Ending:
    """Ends a job of which this process is part, and which SLURM therefore ends with it."""

    folder: Path
    slurm_job: str

    def say(self, text: str) -> None:
        print(f"keepwarm: {text}", flush=True)

    def requeue(
        self, why: str, *, exclude: Collection[str] = (), unfit: Collection[str] = (), last: bool = False
    ) -> bool:
        """Requeue the job; return whether SLURM has accepted. It resumes from its saved state.

        Args:
            exclude: all nodes to be avoided, in sbatch's syntax.
            unfit: those of them that were found unfit, for the log.
            last: the next start only ends the job: one node is enough for it.
        """
        # This process must last until the job is what it is to be, and its end is recorded.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            commands.ask("scontrol", "requeue", self.slurm_job)
        except ClusterError as error:
            events.append(self.folder, events.RequeueRefused(slurm_job=self.slurm_job, why=str(error)))
            self.say(f"not requeued: {error}; keepwarm submit {quote(str(self.folder))} --resume continues")
            return False
        # Before anything else: SLURM leaves this process KillWait seconds.
        events.append(self.folder, events.Requeue(slurm_job=self.slurm_job, why=why, excluded=tuple(sorted(unfit))))
        # Only a job that waits can be changed in these; without accounting, one that has lost a node not at all.
        if last:
            # The limit of tasks first: it implies the nodes.
            self._update("NumTasks=1", "the job ends when all of its nodes are free")
            self._update("NumNodes=1-1", "the job ends when all of its nodes are free")
        elif unfit:
            self._update(f"ExcNodeList={','.join(exclude)}", f"the next start may get {', '.join(unfit)} again")
        self.say(f"requeued: {why}")
        return True

    def cancel(self, why: str) -> int:
        """End the job as CANCELLED; return the exit code, in case SLURM does not end this process."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        self.say(f"{why}; keepwarm submit {quote(str(self.folder))} --resume continues")
        with contextlib.suppress(ClusterError):
            commands.ask("scancel", self.slurm_job)
            self.wait()
        return ExitCode.INTERRUPTED

    def time_out(self, notice: int) -> int:
        """End the job as TIMEOUT if it has reached its time limit but for the notice; return the exit code if not."""
        with contextlib.suppress(ClusterError, ValueError):
            job = commands.job(self.slurm_job)
            limit = None if job is None else commands.seconds_of(job.time_limit)
            if job is not None and limit is not None:
                ran = commands.seconds_of(job.run_time) or 0
                if limit - ran <= notice + NEAR_LIMIT_S:
                    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
                    minutes = max(1, ran // 60)  # SLURM counts limits in minutes
                    commands.ask("scontrol", "update", f"JobId={self.slurm_job}", f"TimeLimit={minutes}")
                    self.wait(max(0, 60 * minutes - ran))
        return ExitCode.INTERRUPTED

    def wait(self, after: int = 0) -> None:
        """Wait for SLURM to end this process, in `after` seconds or soon after: the job must not exit before that."""
        signal.sigtimedwait([signal.SIGTERM], after + GRACE_S)

    def _update(self, change: str, otherwise: str) -> None:
        try:
            commands.ask("scontrol", "update", f"JobId={self.slurm_job}", change)
        except ClusterError as error:
            self.say(f"{otherwise}: {error}")
