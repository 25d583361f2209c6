"""The training loop: steps through the stages, and what happens between two steps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import torch

from parallel.engine import Engine, StepResult
from trainer import straggler_watch
from trainer.console import LogLine, RunConsole
from trainer.data.loader import BatchLoader
from trainer.errors import TrainingStopped
from trainer.evaluation import Evaluator
from trainer.goodput import Timeline
from trainer.interrupt import Interrupt
from trainer.metrics import Metrics, StepMetrics
from trainer.moving_average import MovingAverage
from trainer.profile import ProfileWindow
from trainer.restore import Beginning
from trainer.run_state import RunState
from trainer.snapshots import Snapshots
from trainer.spec import JobSpec
from trainer.spec_sections import GateSpec
from trainer.speed import Speed
from trainer.stages import StagePlan, global_size_at
from trainer.watchdog import Watchdog
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
    average: MovingAverage | None = None
    beginning: Beginning
    metrics: Metrics
    console: RunConsole
    profile: ProfileWindow
    speed: Speed
    watchdog: Watchdog

    @property
    def last_step(self) -> int:
        return self.plans[-1].end_step

    def meta(self) -> dict[str, Any]:
        """What continues the run besides the tensors, as plain values."""
        decay = None if self.average is None else self.average.decay
        return {"run": self.state.save(), "ledger": self.loader.state(), "moving_average": decay}


def stage_at(plans: Sequence[StagePlan], step: int) -> StagePlan:
    """The stage that step `step`, counted from 0, belongs to."""
    return next(plan for plan in plans if step < plan.end_step)


def train(run: Run, interrupt: Interrupt, timeline: Timeline) -> bool:
    """Run to the end of the last stage; False when a signal ended it earlier, with the state saved.

    What ends is marked in `timeline`, so that every second can be accounted for.

    Raises:
        TrainingStopped: too many steps in a row were not finite, or a domain forgot more than a gate allows; in
            the second case the state is saved.
    """
    timeline.restored(run.state.step)
    if (run.state.step == 0 or _evaluation_is_due(run)) and (reason := _evaluate(run, timeline)):
        raise TrainingStopped(reason)
    while run.state.step < run.last_step:
        run.watchdog.beat(run.state.step)
        _step(run)
        timeline.step(run.state.step, 0.0 if run.snapshots is None else run.snapshots.timings()["blocked_s"])
        interrupted = run.world.any(interrupt.received is not None)
        reason = _evaluate(run, timeline) if _evaluation_is_due(run) else None
        last = interrupted or reason is not None or run.state.step == run.last_step
        for saver in run.savers:
            saver.after_step(run.state, run.meta(), last=last)
        timeline.save(run.state.step)
        if reason is not None:
            raise TrainingStopped(reason)
        if interrupted and run.state.step < run.last_step:
            run.metrics.event("interrupted", step=run.state.step)
            run.console.say(f" interrupted after iteration {run.state.step}; state saved, continue with --resume")
            return False
    return True


def _step(run: Run) -> None:
    state, plan = run.state, stage_at(run.plans, run.state.step)
    if state.step == plan.start_step and run.job.stages[plan.index].optimizer_state == "reset":
        _reset_optimizer(run)
    lr = state.curves[plan.index].at(state.step - plan.start_step)
    size = global_size_at(run.job.batch, run.loader.consumed)
    run.profile.before(state.step)
    started = time.perf_counter()
    batch = run.loader.next_batch()
    result = run.engine.step(batch, lr, None if run.snapshots is None else run.snapshots.before_update)
    elapsed = time.perf_counter() - started
    run.profile.after(state.step)
    if run.average is not None and not result.skipped:
        run.average.update()
    state.step += 1
    run.speed.add(size * plan.sequence_length, elapsed)
    _report(run, plan, result, lr, size, elapsed)
    _judge(run, result)
    _look_for_stragglers(run)
    if run.snapshots is not None:
        run.snapshots.offer(state, run.meta(), elapsed)
        if (news := run.snapshots.news()) is not None:
            run.metrics.event("snapshot failed", step=state.step, reason=news)
            run.console.say(f" WARNING: no snapshot: {news}; training goes on")


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
    tokens_per_s = size * plan.sequence_length / elapsed
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


def _look_for_stragglers(run: Run) -> None:
    every, world = run.job.health.straggler_every, run.world
    if every is None or run.state.step % every or world.size == 1:
        return
    stage = run.job.layout.coordinates(world.rank).pipeline
    for one in straggler_watch.look(world, stage=stage, factor=run.job.health.straggler_factor):
        run.metrics.event("straggler", step=run.state.step, **msgspec.structs.asdict(one))
        run.console.say(
            f" WARNING: rank {one.rank} on {one.host} is slow: everything takes {one.ratio:.1f} times as long "
            f"because of it"
        )


def _reset_optimizer(run: Run) -> None:
    """Moments and counters to zero, as a new optimizer has them."""
    if run.snapshots is not None:
        run.snapshots.before_update()
    with torch.no_grad():
        for name, shard in run.engine.state().items():
            if name.startswith("optimizer."):
                shard.local.zero_()
    run.engine.restored()


def _at_boundary(run: Run) -> bool:
    """Whether a stage ends here, or the first one begins."""
    return run.state.step == 0 or any(plan.end_step == run.state.step for plan in run.plans)


def _evaluation_is_due(run: Run) -> bool:
    every = run.job.evaluation.every
    return _at_boundary(run) or (every is not None and run.state.step % every == 0)


def _evaluate(run: Run, timeline: Timeline) -> str | None:
    """Evaluate, and judge the gate of the stage that was trained last; returns why training must stop."""
    run.watchdog.relax()
    step, boundary = run.state.step, _at_boundary(run)
    stage = run.job.stages[stage_at(run.plans, max(step - 1, 0)).index]
    losses = run.evaluator.losses(None if boundary else stage.evaluate)
    timeline.evaluation(step)
    run.metrics.evaluation(step, losses)
    run.console.evaluation(step, losses)
    reason = None if stage.gate is None else _forgotten(run, stage.name, stage.gate, losses)
    if reason is not None and stage.gate is not None and stage.gate.action == "stop":
        return reason
    if boundary:
        run.state.baseline = losses
    return None


def _forgotten(run: Run, stage: str, gate: GateSpec, losses: dict[str, float]) -> str | None:
    """What a gate has to say about these losses."""
    before, now = run.state.baseline.get(gate.domain), losses.get(gate.domain)
    if before is None or now is None or now - before <= gate.max_forgetting:
        return None
    reason = (
        f"stages.{stage}.gate: domain {gate.domain} has forgotten {now - before:.4f} nats per token by iteration "
        f"{run.state.step} ({before:.4f} at the beginning of the stage, {now:.4f} now), more than "
        f"max_forgetting = {gate.max_forgetting:g}"
    )
    run.metrics.event(
        "gate", step=run.state.step, stage=stage, domain=gate.domain, action=gate.action, before=before, now=now
    )
    if gate.action == "warn":
        run.console.say(f" WARNING: {reason}")
    return reason + "; the state is saved: continue with --resume and more replay, a lower rate or another gate"
