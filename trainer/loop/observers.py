"""Callbacks that only observe a run: opening lines, log and metrics, hang detection, profile."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from keepwarm import side_writer
from keepwarm.parallel.loss import MAIN
from keepwarm.trainer.job.run_folder import RunFolder
from keepwarm.trainer.loop.callback import Callback, Ending, Run, StepDone
from keepwarm.trainer.loop.continuation import Change
from keepwarm.trainer.loop.restore import Beginning
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.console import LogLine
from keepwarm.trainer.monitor.metric_sinks import StepMetrics
from keepwarm.trainer.monitor.profile import ProfileWindow
from keepwarm.trainer.monitor.speed import Speed
from keepwarm.trainer.monitor.watchdog import Watchdog


class Opening(Callback):
    """Reports the origin of a run: its parent, changes on continuation, restored state."""

    def __init__(self, beginning: Beginning, changes: Sequence[Change]) -> None:
        super().__init__()
        self._beginning = beginning
        self._changes = changes

    def on_start(self, run: Run) -> None:
        state, layout, beginning = run.state, run.job.parallel, self._beginning
        if state.parent is not None and state.step == 0:
            run.metrics.event(events.Parent(**state.parent))
            run.console.parent(state.parent)
        for change in self._changes:
            run.metrics.event(change)
            run.console.changed(change.change)
        for replay in run.loader.ledger.replays:
            if not replay.known:
                run.console.stand_in(replay.stage, replay.pools[0].stage)
        axes = (layout.data, layout.pipeline, layout.tensor)
        started = events.TrainingStarted(step=state.step, ranks=run.world.size, layout=axes, position=run.position)
        run.metrics.event(started)
        run.metrics.event(events.Began(source=beginning.source, step=beginning.step, reason=beginning.reason))
        if beginning.source != "nothing":
            run.console.continues(beginning.step, beginning.source, beginning.reason)


class Heartbeat(Callback):
    """Tells the watchdog when a step begins."""

    def __init__(self, watchdog: Watchdog) -> None:
        super().__init__()
        self._watchdog = watchdog

    def before_step(self, run: Run) -> None:
        self._watchdog.heartbeat(run.state.step)

    def close(self, run: Run, ending: Ending) -> None:
        self._watchdog.close()


class Profiling(Callback):
    """Records the steps that the job's `profile` section names."""

    def __init__(self, window: ProfileWindow) -> None:
        super().__init__()
        self._window = window

    def before_step(self, run: Run) -> None:
        self._window.before(run.state.step)

    def after_step(self, run: Run, done: StepDone) -> None:
        self._window.after(run.state.step - 1)

    def close(self, run: Run, ending: Ending) -> None:
        self._window.close()


class StepReport(Callback):
    """Records every step and evaluation in the metrics and on the console, and prints the closing table."""

    def __init__(self, speed: Speed) -> None:
        super().__init__()
        self._speed = speed

    def after_step(self, run: Run, done: StepDone) -> None:
        speed, result = self._speed, done.result
        speed.add(done.positions, done.seconds)
        metrics = StepMetrics(
            step=run.state.step,
            stage=done.plan.name,
            loss=result.loss,
            lr=done.lr,
            grad_norm=result.grad_norm,
            tokens=result.tokens,
            step_time_s=done.seconds,
            auxiliary={name: loss for name, loss in result.losses.items() if name != MAIN},
        )
        run.metrics.step(metrics)
        tokens_per_s = done.positions / done.seconds
        run.console.step(
            LogLine(
                metrics=metrics,
                last_step=run.last_step,
                consumed_samples=run.loader.consumed,
                global_batch_size=done.samples,
                tokens_per_s=tokens_per_s,
                skipped=run.state.health.skipped_total + (result.skipped and result.tokens > 0),
                tflops_per_gpu=speed.tflops_per_gpu(tokens_per_s),
                mfu=speed.mfu(tokens_per_s),
            )
        )

    def on_evaluation(self, run: Run, losses: Mapping[str, float]) -> None:
        run.metrics.evaluation(run.state.step, losses)
        run.console.evaluation(run.state.step, losses)

    def close(self, run: Run, ending: Ending) -> None:
        if ending == "finished":
            tokens_per_s, folder = self._speed.tokens_per_s, Path(run.job.output)
            run.metrics.event(events.Finished(step=run.state.step, tokens_per_s=tokens_per_s))
            if run.world.rank == 0:
                losses = RunFolder(folder).evaluations()
                before, after = (losses[0], losses[-1]) if losses else ({}, {})
                run.console.summary(before, after, tokens_per_s, run.job.output)
        run.metrics.close()
        for output, loss in side_writer.losses().items():
            run.console.warn(f"{output}: {loss.dropped} writes were dropped, the last one by {loss.reason}")
