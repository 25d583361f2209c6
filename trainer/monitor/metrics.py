"""Machine-readable records of a run: metrics.jsonl, events.jsonl, and the metric sinks that its job names."""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from keepwarm import side_writer
from keepwarm.beside import beside
from keepwarm.options import parse_options
from keepwarm.side_writer import SideWriter
from keepwarm.trainer.errors import SpecError, TrainerError
from keepwarm.trainer.job.extensions import METRIC_SINKS
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.job.sections import LogSpec
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.events import Event
from keepwarm.trainer.monitor.metric_sinks import MetricSink, SinkContext, StepMetrics


class JsonLines(MetricSink):
    """metrics.jsonl: one line per step and per evaluation."""

    def __init__(self, options: None, context: SinkContext) -> None:
        self._run, self._repeated = RunFolder(context.folder), context.resume_step
        self._file = SideWriter(self._run.metrics_file)

    def begin(self) -> None:
        """Drop the lines of steps that are done again."""
        if self._repeated is not None:
            with side_writer.attempt(self._run.metrics_file.name):
                self._run.drop_metrics_after(self._repeated)

    def step(self, metrics: StepMetrics) -> None:
        unknown = {key: None for key, value in metrics.scalars().items() if not math.isfinite(value)}
        self._file.write(json.dumps(metrics.record() | unknown).encode())

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        if step == self._repeated:
            # Not when the file is opened: the continued job need not evaluate there again.
            with side_writer.attempt(self._run.metrics_file.name):
                self._run.drop_metrics_after(step, evaluation=True)
        self._file.write(json.dumps({"step": step, "eval": losses}).encode())

    def close(self) -> None:
        self._file.close()


class Metrics:
    """Writes the metrics and events of one run folder; does nothing on ranks other than 0.

    Metrics are best effort: a failing sink never stops training.
    """

    def __init__(self, folder: Path, spec: LogSpec, name: str, *, rank: int, resume_step: int | None) -> None:
        """Open the sinks; for a resumed run, first drop the lines of steps after `resume_step`.

        Raises SpecError if a sink needs something that is not installed.
        """
        self._active = rank == 0
        self._folder = folder
        self._sinks: dict[str, MetricSink] = {}
        self._failed: set[str] = set()
        """Outputs whose failure is recorded as an event."""
        if not self._active:
            return
        context = SinkContext(folder=folder, run=name, resume_step=resume_step)
        lines = JsonLines(None, context)
        self._attempt("jsonl", lines.begin)
        self._sinks["jsonl"] = lines
        for sink, options in spec.chosen.items():
            self._attempt(sink, partial(self._open, sink, options, context), fatal=(TrainerError,))

    def step(self, metrics: StepMetrics) -> None:
        """Record one step."""
        for name, sink in list(self._sinks.items()):  # one may still be opened
            self._attempt(name, partial(sink.step, metrics))
        self._record_failures()

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Record the validation loss of every domain after `step` completed steps."""
        for name, sink in list(self._sinks.items()):
            self._attempt(name, partial(sink.evaluation, step, losses))

    def event(self, event: Event) -> None:
        """Record an event with the current time."""
        if self._active:
            events.record(self._folder, event)

    def close(self) -> None:
        """Flush and close every sink; record what was lost."""
        for name, sink in list(self._sinks.items()):
            self._attempt(name, sink.close)
        self._sinks.clear()
        self._record_failures()
        if self._active:
            for output, loss in side_writer.losses().items():
                self.event(events.OutputLost(output=output, dropped=loss.dropped, reason=loss.reason))

    def _open(self, name: str, options: Mapping[str, Any], context: SinkContext) -> None:
        component = METRIC_SINKS.get(name)
        if not issubclass(component, MetricSink):
            raise SpecError(f"log.sinks.{name}: {component.__qualname__} is not a subclass of MetricSink")
        self._sinks[name] = component(parse_options(component, options), context)

    def _attempt(self, name: str, write: Callable[[], None], *, fatal: tuple[type[Exception], ...] = ()) -> None:
        """Perform a write that training does not depend on, nor wait for long; raise errors of the kinds in `fatal`."""
        try:
            beside().do(write)
        except fatal:
            raise
        except Exception as error:
            side_writer.lost(f"metric sink {name}", error)

    def _record_failures(self) -> None:
        """Record the first failure of every output of this process as an event."""
        if not self._active:
            return
        for output, loss in side_writer.losses().items():
            if output not in self._failed:
                self._failed.add(output)
                self.event(events.SinkFailed(sink=output, reason=loss.reason))
