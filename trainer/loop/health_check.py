"""Callback that judges every step by its loss (spikes, skipped steps, when to stop), and devices by known results."""

from keepwarm.trainer.distributed import device_check
from keepwarm.trainer.errors import TrainingStopped
from keepwarm.trainer.loop.callback import Callback, Run, StepDone
from keepwarm.trainer.monitor import events


class HealthCheck(Callback):
    """Warns of spikes and skipped steps, and stops training after too many consecutive skipped steps.

    Every `health.device_check_every` steps all devices compute a known product and sum. One that computes wrong ends
    its rank with exit code 1, and a spare takes its node's place.
    """

    def before_step(self, run: Run) -> None:
        every = run.job.health.device_check_every
        if every is not None and run.state.step and run.state.step % every == 0:
            device_check.check(run.world)

    def after_step(self, run: Run, done: StepDone) -> None:
        health, step, result = run.state.health, run.state.step, done.result
        verdict = health.judge(result.loss, result.skipped, tokens=result.tokens)
        if verdict == "good":
            return
        if verdict == "empty":
            run.metrics.event(events.Empty(step=step))
            run.console.warn(
                f"iteration {step} skipped: every target of its batch is masked ({health.empty_total} such steps)"
            )
            return
        event = {"skipped": events.Skipped, "spike": events.Spike, "stop": events.Stopped}[verdict]
        run.metrics.event(event(step=step, loss=repr(result.loss), grad_norm=repr(result.grad_norm)))
        ranks = f"ranks 0-{run.world.size - 1}" if run.world.size > 1 else "rank 0"
        seen = f"loss {result.loss}, gradient norm {result.grad_norm}"
        if verdict == "spike":
            run.console.warn(f"loss spike at iteration {step}: {seen}")
        elif verdict == "skipped":
            run.console.warn(f"iteration {step} skipped on {ranks}: {seen}")
        else:
            raise TrainingStopped(
                f"{health.skipped_in_a_row} consecutive steps were not finite (health.max_skipped), the last one "
                f"iteration {step} on {ranks}: {seen}; check the data and the learning rate of these steps in "
                "metrics.jsonl"
            )
