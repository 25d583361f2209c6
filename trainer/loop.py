"""The training loop: steps through the stages, and what happens between two steps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from parallel.engine import Engine, StepResult
from trainer.console import LogLine, RunConsole
from trainer.data.loader import BatchLoader
from trainer.errors import TrainingStopped
from trainer.evaluation import Evaluator
from trainer.interrupt import Interrupt
from trainer.metrics import Metrics, StepMetrics
from trainer.profile import ProfileWindow
from trainer.restore import Beginning
from trainer.run_state import RunState
from trainer.snapshots import Snapshots
from trainer.spec import JobSpec
from trainer.speed import Speed
from trainer.stages import StagePlan, global_size_at
from trainer.world import World


class Saver(Protocol):
    """Keeps the state of a run somewhere; asked after every step."""

    def after_step(self, state: RunState, meta: dict[str, Any], *, last: bool) -> None: ...


@dataclass(kw_only=True)
class Run:
    """Everything a run consists of, put together by `trainer.build`."""

    job: JobSpec
    world: World
    plans: Sequence[StagePlan]
    state: RunState
    engine: Engine
    loader: BatchLoader
    evaluator: Evaluator
    savers: Sequence[Saver]
    snapshots: Snapshots | None
    beginning: Beginning
    metrics: Metrics
    console: RunConsole
    profile: ProfileWindow
    speed: Speed

    @property
    def last_step(self) -> int:
        return self.plans[-1].end_step

    def meta(self) -> dict[str, Any]:
        """What continues the run besides the tensors, as plain values."""
        return {"run": self.state.save(), "ledger": self.loader.state()}


def stage_at(plans: Sequence[StagePlan], step: int) -> StagePlan:
    """The stage that step `step`, counted from 0, belongs to."""
    return next(plan for plan in plans if step < plan.end_step)


def train(run: Run, interrupt: Interrupt) -> bool:
    """Run to the end of the last stage; False when a signal ended it earlier, with the state saved.

    Raises:
        TrainingStopped: too many steps in a row were not finite.
    """
    if run.state.step == 0 or _evaluation_is_due(run):
        _evaluate(run)
    while run.state.step < run.last_step:
        _step(run)
        interrupted = run.world.any(interrupt.received is not None)
        last = interrupted or run.state.step == run.last_step
        if _evaluation_is_due(run):
            _evaluate(run)
        for saver in run.savers:
            saver.after_step(run.state, run.meta(), last=last)
        if interrupted and run.state.step < run.last_step:
            run.metrics.event("interrupted", step=run.state.step)
            run.console.say(f" interrupted after iteration {run.state.step}; state saved, continue with --resume")
            return False
    return True


def _step(run: Run) -> None:
    state, plan = run.state, stage_at(run.plans, run.state.step)
    lr = state.curves[plan.index].at(state.step - plan.start_step)
    size = global_size_at(run.job.batch, run.loader.consumed)
    run.profile.before(state.step)
    started = time.perf_counter()
    batch = run.loader.next_batch()
    result = run.engine.step(batch, lr, None if run.snapshots is None else run.snapshots.before_update)
    elapsed = time.perf_counter() - started
    run.profile.after(state.step)
    state.step += 1
    run.speed.add(size * run.job.data.sequence_length, elapsed)
    _report(run, plan, result, lr, size, elapsed)
    _judge(run, result)
    if run.snapshots is not None:
        run.snapshots.offer(state, run.meta(), elapsed)


def _report(run: Run, plan: StagePlan, result: StepResult, lr: float, size: int, elapsed: float) -> None:
    metrics = StepMetrics(
        step=run.state.step,
        stage=plan.name,
        loss=result.loss,
        lr=lr,
        grad_norm=result.grad_norm,
        tokens=result.tokens,
        step_time_s=elapsed,
    )
    run.metrics.step(metrics)
    tokens_per_s = size * run.job.data.sequence_length / elapsed
    run.console.step(
        LogLine(
            metrics=metrics,
            last_step=run.last_step,
            consumed_samples=run.loader.consumed,
            global_size=size,
            tokens_per_s=tokens_per_s,
            skipped=run.state.health.skipped_total + result.skipped,
            tflops_per_gpu=run.speed.tflops_per_gpu(tokens_per_s),
            mfu=run.speed.mfu(tokens_per_s),
        )
    )


def _judge(run: Run, result: StepResult) -> None:
    health, step = run.state.health, run.state.step
    verdict = health.judge(result.loss, result.skipped)
    if verdict == "good":
        return
    run.metrics.event(verdict, step=step, loss=repr(result.loss), grad_norm=repr(result.grad_norm))
    ranks = f"ranks 0-{run.world.size - 1}" if run.world.size > 1 else "rank 0"
    seen = f"loss {result.loss}, gradient norm {result.grad_norm}"
    if verdict == "spike":
        run.console.say(f" WARNING: loss spike at iteration {step}: {seen}")
    elif verdict == "skipped":
        run.console.say(f" WARNING: iteration {step} skipped on {ranks}: {seen}")
    else:
        raise TrainingStopped(
            f"{health.skipped_in_a_row} steps in a row were not finite (health.max_skipped), the last one "
            f"iteration {step} on {ranks}: {seen}; look at the data and the learning rate of these steps in "
            "metrics.jsonl"
        )


def _evaluation_is_due(run: Run) -> bool:
    every = run.job.evaluation.every
    return run.state.step == run.last_step or (every is not None and run.state.step % every == 0)


def _evaluate(run: Run) -> None:
    losses = run.evaluator.losses()
    run.metrics.evaluation(run.state.step, losses)
    run.console.evaluation(run.state.step, losses)
