"""Validation loss by domain, independent of the layout."""

from collections.abc import Collection, Mapping

from keepwarm.parallel.engine import Engine
from keepwarm.trainer.data.loader import RankShare, evaluation_batches
from keepwarm.trainer.data.packing import PackedSource
from keepwarm.trainer.distributed.world import World
from keepwarm.trainer.errors import DataError
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.loop.callback import Callback, Run
from keepwarm.trainer.loop.gate import Forgetting, forgetting
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.watchdog import Watchdog


class Evaluator:
    """Evaluates the first `evaluation.samples` windows of each domain, in file order."""

    def __init__(self, engine: Engine, domains: Mapping[str, PackedSource], job: JobSpec, world: World) -> None:
        self._engine = engine
        self._domains = domains
        self._job = job
        self._share = RankShare(layout=job.layout, rank=world.rank, micro_batch_size=job.batch.micro_batch_size)

    def losses(self, domains: Collection[str] | None = None) -> dict[str, float]:
        """Return the mean cross-entropy by domain, in nats per unmasked target; of all domains or the given ones.
        Collective.

        Raises:
            DataError: a domain has no unmasked target.
        """
        return {
            name: self._loss(source) for name, source in self._domains.items() if domains is None or name in domains
        }

    def _loss(self, source: PackedSource) -> float:
        total, count = 0.0, 0
        for batch in evaluation_batches(
            source, self._job.evaluation.samples, self._share, global_batch_size=self._job.batch.global_batch_size
        ):
            result = self._engine.evaluate(batch)
            total, count = total + result.loss_sum, count + result.tokens
        if not count:
            raise DataError(
                f"data.validation.{source.name}: every target of its first samples is masked: nothing to score"
            )
        return total / count


class Evaluation(Callback):
    """Evaluates at the start and end of every stage and every `evaluation.every` steps, and checks the gates.

    Calls `on_evaluation` of all callbacks.
    """

    def __init__(self, evaluator: Evaluator, watchdog: Watchdog) -> None:
        super().__init__()
        self._evaluator = evaluator
        self._watchdog = watchdog

    def on_start(self, run: Run) -> None:
        self.at_boundary(run)

    def at_boundary(self, run: Run) -> None:
        every = run.job.evaluation.every
        if run.at_stage_boundary or (every is not None and run.state.step % every == 0):
            self._evaluate(run)

    def _evaluate(self, run: Run) -> None:
        """Evaluate, and check the gate of the stage trained last."""
        self._watchdog.suspend()
        step, boundary = run.state.step, run.at_stage_boundary
        stage = run.job.stages[run.stage_at(max(step - 1, 0)).index]
        losses = self._evaluator.losses(None if boundary else stage.evaluate)
        run.timeline.evaluation(step)
        run.callbacks.on_evaluation(run, losses)
        forgotten = forgetting(stage.gate, stage=stage.name, step=step, baseline=run.state.baseline, losses=losses)
        if forgotten is not None:
            _report(run, forgotten)
        if forgotten is not None and forgotten.gate.action == "stop":
            run.request_stop(
                f"{forgotten.text()}; the state is saved: continue with --resume and more replay, a lower "
                "learning rate or another gate"
            )
        elif boundary:
            run.state.baseline = losses


def _report(run: Run, forgotten: Forgetting) -> None:
    gate = forgotten.gate
    event = events.Gate(
        step=forgotten.step,
        stage=forgotten.stage,
        domain=gate.domain,
        action=gate.action,
        before=forgotten.before,
        now=forgotten.now,
    )
    run.metrics.event(event)
    if gate.action == "warn":
        run.console.warn(forgotten.text())
