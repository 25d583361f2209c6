"""Machine-readable records of a run: metrics.jsonl, events.jsonl, and the metric sinks that its job names."""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from keepwarm.options import parse_options
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
        run = RunFolder(context.folder)
        if context.resume_step is not None:
            run.drop_metrics_after(context.resume_step)
        self._file = run.metrics_file.open("a", encoding="utf-8", buffering=1)

    def step(self, metrics: StepMetrics) -> None:
        unknown = {key: None for key, value in metrics.scalars().items() if not math.isfinite(value)}
        self._file.write(json.dumps(metrics.record() | unknown) + "\n")

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "eval": losses}) + "\n")

    def close(self) -> None:
        self._file.close()


class Metrics:
    """Writes the metrics and events of one run folder; does nothing on ranks other than 0.

    Metrics are best effort: a failing sink never stops training.
    """

    def __init__(self, folder: Path, spec: LogSpec, name: str, *, rank: int, resume_step: int | None) -> None:
        """Open the sinks; for a resumed run, first drop the lines of steps after `resume_step`.

        Raises:
            SpecError: a sink needs something that is not installed.
            OSError: metrics.jsonl cannot be opened.
        """
        self._active = rank == 0
        self._folder = folder
        self._sinks: dict[str, MetricSink] = {}
        self._failed: set[str] = set()
        if not self._active:
            return
        context = SinkContext(folder=folder, run=name, resume_step=resume_step)
        self._sinks["jsonl"] = JsonLines(None, context)
        for sink, options in spec.chosen.items():
            self._attempt(sink, partial(self._open, sink, options, context), fatal=(TrainerError,))

    def step(self, metrics: StepMetrics) -> None:
        """Record one step."""
        for name, sink in self._sinks.items():
            self._attempt(name, partial(sink.step, metrics))

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Record the validation loss of every domain after `step` completed steps."""
        for name, sink in self._sinks.items():
            self._attempt(name, partial(sink.evaluation, step, losses))

    def event(self, event: Event) -> None:
        """Record an event with the current time."""
        if self._active:
            events.append(self._folder, event)

    def close(self) -> None:
        """Flush and close every sink."""
        for name, sink in self._sinks.items():
            self._attempt(name, sink.close)
        self._sinks.clear()

    def _open(self, name: str, options: Mapping[str, Any], context: SinkContext) -> None:
        component = METRIC_SINKS.get(name)
        if not issubclass(component, MetricSink):
            raise SpecError(f"log.sinks.{name}: {component.__qualname__} is not a subclass of MetricSink")
        self._sinks[name] = component(parse_options(component, options), context)

    def _attempt(self, name: str, write: Callable[[], None], *, fatal: tuple[type[Exception], ...] = ()) -> None:
        """Perform a write that training does not depend on, and warn of the first failure of each sink.

        All metrics are written through here; errors of the kinds in `fatal` are raised.
        """
        try:
            write()
        except fatal:
            raise
        except Exception as error:
            if name in self._failed:
                return
            self._failed.add(name)
            reason = f"{type(error).__name__}: {error}"
            logging.warning("metric sink %s failed: %s; training continues", name, reason)
            with contextlib.suppress(OSError):
                self.event(events.SinkFailed(sink=name, reason=reason))
