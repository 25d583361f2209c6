"""The training loop: runs the steps of all stages. Callbacks do the work between steps."""

import time

import torch

from keepwarm.trainer.errors import TrainingStopped
from keepwarm.trainer.job.stages import StagePlan, global_size_at
from keepwarm.trainer.loop.callback import Run, StepDone
from keepwarm.trainer.loop.interrupt import HANDS_OVER, PROTECTS, STOPS, HandedOver, Interrupt
from keepwarm.trainer.monitor import events


def train(run: Run, interrupt: Interrupt) -> bool:
    """Train to the end of the last stage; return False if a signal stopped training earlier, with the state saved.

    Marks the end of each kind of work in `run.timeline`, so that every second is accounted for.

    Raises:
        TrainingStopped: too many consecutive steps were not finite, or a callback such as a gate stopped training. In
            the latter case the state is saved.
        HandedOver: a supervisor asked for it, and the last step is committed in memory.
    """
    run.timeline.restored(run.state.step)
    run.callbacks.on_start(run)
    _check_stop(run)
    while run.state.step < run.last_step:
        _step(run)
        run.timeline.step(run.state.step, run.callbacks.blocked_s)
        exposed = PROTECTS if run.callbacks.exposed(run) else 0
        urgency = run.callbacks.agree(run, max(exposed, interrupt.urgency))
        run.interrupted = urgency == STOPS
        run.callbacks.at_boundary(run)
        run.timeline.save(run.state.step)
        _check_stop(run)
        if run.interrupted and run.state.step < run.last_step:
            run.metrics.event(events.Interrupted(step=run.state.step))
            run.console.interrupted(run.state.step)
            return False
        if urgency == PROTECTS and run.state.step < run.last_step:
            run.callbacks.protect(run)
        if urgency == HANDS_OVER and run.state.step < run.last_step and run.callbacks.hand_over(run):
            raise HandedOver(f"after step {run.state.step}")
    return True


def _check_stop(run: Run) -> None:
    if run.stop_reason is not None:
        raise TrainingStopped(run.stop_reason)


def _step(run: Run) -> None:
    state, plan = run.state, run.stage_at(run.state.step)
    run.callbacks.before_step(run)
    if plan.index == len(state.stages):
        _begin_stage(run, plan)
    lr = state.curves[plan.index].at(state.step - plan.curve_step)
    samples = global_size_at(run.job.batch, run.loader.consumed)
    began = time.perf_counter()
    batch = run.loader.next_batch()
    result = run.engine.step(batch, lr, lambda: run.callbacks.before_update(run))
    run.world.check_interrupted()
    seconds = time.perf_counter() - began
    state.step += 1
    run.callbacks.after_step(run, StepDone(plan=plan, result=result, lr=lr, samples=samples, seconds=seconds))


def _begin_stage(run: Run, plan: StagePlan) -> None:
    spec = run.job.stages[plan.index]
    run.state.begin_stage(plan, spec)
    if spec.optimizer_state == "reset":
        _reset_optimizer(run)


def _reset_optimizer(run: Run) -> None:
    """Set moments and counters to zero, as in a new optimizer."""
    run.callbacks.before_update(run)
    with torch.no_grad():
        for name, shard in run.engine.state().items():
            if name.startswith("optimizer."):
                shard.local.zero_()
    run.engine.restored()
