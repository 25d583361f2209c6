"""Terminal output of a run: Megatron's log line, a live progress line, the closing table."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from keepwarm.trainer.monitor.metric_sinks import StepMetrics
from keepwarm.trainer.monitor.stragglers import Straggler


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLine:
    """The values of one log line, in Megatron-LM's format so that its users' scripts can parse it."""

    metrics: StepMetrics
    last_step: int
    consumed_samples: int
    global_batch_size: int
    tokens_per_s: float
    skipped: int
    tflops_per_gpu: float | None = None
    mfu: float | None = None

    def text(self) -> str:
        """Return the formatted line."""
        step = self.metrics
        parts = [
            f"iteration {step.step:8d}/{self.last_step:8d}",
            f"consumed samples: {self.consumed_samples:12d}",
            f"elapsed time per iteration (ms): {1000 * step.step_time_s:.1f}",
            f"learning rate: {step.lr:.6E}",
            f"global batch size: {self.global_batch_size:5d}",
            f"lm loss: {step.loss:.6E}",
            f"grad norm: {step.grad_norm:.3f}",
            f"number of skipped iterations: {self.skipped:3d}",
            f"tokens/s: {self.tokens_per_s:.0f}",
        ]
        if self.tflops_per_gpu is not None and self.mfu is not None:
            parts += [f"TFLOP/s per GPU: {self.tflops_per_gpu:.1f}", f"MFU: {100 * self.mfu:.1f} %"]
        return " " + " | ".join(parts) + " |"

    def short(self) -> str:
        """Return the line for a terminal, which fits into 80 columns."""
        step, left = self.metrics, self.last_step - self.metrics.step
        parts = [
            f"{step.step}/{self.last_step}",
            f"loss {step.loss:.4f}",
            f"lr {step.lr:.1e}",
            f"{_short(self.tokens_per_s)} tok/s",
            f"{_duration(left * step.step_time_s)} left",
        ]
        if self.mfu is not None:
            parts.insert(-1, f"MFU {self.mfu:.0%}")
        return " " + " | ".join(parts)


def _short(number: float) -> str:
    """Return a number in at most five characters: 512, 1.23k, 45.6M."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def _duration(seconds: float) -> str:
    """Return a time as 3d 4h, 5h 6m, 7m or 8s."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes = round(seconds / 60)
    if minutes >= 48 * 60:
        return f"{minutes // 1440}d {minutes % 1440 // 60}h"
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60}m"
    return f"{minutes}m" if minutes else f"{seconds:.0f}s"


class RunConsole:
    """Rank 0's terminal output; silent on other ranks. Errors bypass it and go to stderr.

    Files and pipes get Megatron's lines, a terminal shorter ones with the time that is left.
    """

    def __init__(self, *, rank: int, steps: int, done: int, log_every: int) -> None:
        self._active = rank == 0
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)
        self._log_every = log_every
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]} | {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (self._active and self._console.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task("training", total=steps, completed=done, loss="-", speed="-")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def step(self, line: LogLine) -> None:
        """Update the progress line; print a log line for every `log_every`-th step and the last."""
        if not self._active:
            return
        step = line.metrics
        self._progress.update(
            self._task,
            completed=step.step,
            description=step.stage,
            loss=f"{step.loss:.4f}",
            speed=f"{line.tokens_per_s:.0f}",
        )
        if step.step % self._log_every == 0 or step.step == line.last_step:
            self.print(line.short() if self._console.is_terminal else line.text())

    def print(self, text: str) -> None:
        """Print one line."""
        if self._active:
            self._console.print(text)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Print a warning that does not stop the run."""
        self.print(f" WARNING: {text}")

    def continues(self, step: int, source: str, reason: str) -> None:
        """Print the saved state that the run continues from."""
        self.print(f" continues after iteration {step} from {source}: {reason}")

    def parent(self, parent: Mapping[str, Any]) -> None:
        """Print the checkpoint that the run was initialised from, as recorded in `RunState.parent`."""
        loaded = "weights and optimizer state" if parent["optimizer_state"] else "weights only"
        self.print(f" initialised with the {loaded} of {parent['run']} at iteration {parent['step']}: {parent['path']}")

    def changed(self, change: str) -> None:
        """Print a setting that differs from the one the saved state was trained with."""
        self.print(f" changed on continuation: {change}")

    def stand_in(self, stage: str, source: str) -> None:
        """Print that a stage replays a proxy source, because the parent's data are unknown."""
        self.print(f" stage {stage} replays a {source}: not known to have been seen")

    def straggler(self, straggler: Straggler) -> None:
        """Print a rank that slows the job down."""
        slower = f"{straggler.ratio:.1f}x"
        self.warn(f"straggler: rank {straggler.rank} on {straggler.host} slows the job down {slower}")

    def interrupted(self, step: int) -> None:
        """Print that a signal ended the run."""
        self.print(f" interrupted after iteration {step}; state saved, continue with --resume")

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Print the validation loss of every domain."""
        if losses:
            values = " | ".join(f"{domain}: {loss:.4f}" for domain, loss in losses.items())
            self.print(f" validation at iteration {step:8d} | lm loss | {values} |")

    def summary(self, before: dict[str, float], after: dict[str, float], tokens_per_s: float, output: str) -> None:
        """Print the closing table."""
        if not self._active:
            return
        if after:
            table = Table(title="validation loss (nats per token)")
            for column in ("domain", "before", "after", "after / before"):
                table.add_column(column, justify="left" if column == "domain" else "right")
            for domain, loss in after.items():
                start = before.get(domain)
                known = start is not None
                table.add_row(
                    domain, f"{start:.4f}" if known else "-", f"{loss:.4f}", f"{loss / start:.1%}" if start else "-"
                )
            self._console.print(table)
        self.print(f"tokens/s: {tokens_per_s:.0f}")
        self.print(f"outputs: {output}")
