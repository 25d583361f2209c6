"""Validation loss of every domain, the same whatever the layout."""

from collections.abc import Collection, Mapping

from parallel.engine import Engine
from trainer.data.loader import RankShare, evaluation_batches
from trainer.data.packing import PackedSource
from trainer.spec import JobSpec
from trainer.world import World


class Evaluator:
    """Evaluates the first `evaluation.samples` windows of each domain in the order of its file."""

    def __init__(self, engine: Engine, domains: Mapping[str, PackedSource], job: JobSpec, world: World) -> None:
        self._engine = engine
        self._domains = domains
        self._job = job
        self._share = RankShare(layout=job.layout, rank=world.rank, micro_batch_size=job.batch.micro_size)

    def losses(self, domains: Collection[str] | None = None) -> dict[str, float]:
        """Mean cross-entropy in nats per unmasked target, by domain; of all domains, or of those. Collective."""
        return {
            name: self._loss(source) for name, source in self._domains.items() if domains is None or name in domains
        }

    def _loss(self, source: PackedSource) -> float:
        total, count = 0.0, 0
        for batch in evaluation_batches(
            source, self._job.evaluation.samples, self._share, global_size=self._job.batch.global_size
        ):
            loss, tokens = self._engine.evaluate(batch)
            total, count = total + loss, count + tokens
        return total / count
