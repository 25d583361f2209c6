"""The plan of a job: batch-size ramp, and steps and tokens of every stage. Pure and torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from keepwarm.trainer.job.curve import Curve
from keepwarm.trainer.job.sections import BatchSpec, MixtureRamp, StageSpec
from keepwarm.trainer.job.spec import JobSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One stage with its position in the run; steps and samples are counted from the start of the job."""

    index: int
    name: str
    start_step: int
    steps: int
    start_sample: int
    samples: int
    sequence_length: int
    tokens: int
    curve: Curve
    mixtures: tuple[tuple[int, Mapping[str, float]], ...]
    """Mixtures, each with the sample of the stage (from 0) at which it takes effect; the first one at 0."""

    @property
    def end_step(self) -> int:
        return self.start_step + self.steps

    @property
    def end_sample(self) -> int:
        return self.start_sample + self.samples


def global_size_at(batch: BatchSpec, consumed: int) -> int:
    """Return the global batch size of the step that starts after `consumed` samples of the job."""
    ramp = batch.ramp
    if ramp is None:
        return batch.global_batch_size
    increments = max(1, (batch.global_batch_size - ramp.start) // ramp.increment)
    done = consumed * increments // ramp.samples
    return min(batch.global_batch_size, ramp.start + done * ramp.increment)


def steps_for(batch: BatchSpec, consumed: int, samples: int) -> tuple[int, int]:
    """Return the number of steps that consume at least `samples` more samples, and how many they consume."""
    steps = taken = 0
    while taken < samples:
        size = global_size_at(batch, consumed + taken)
        if size == batch.global_batch_size:
            remaining = -(-(samples - taken) // size)
            return steps + remaining, taken + remaining * size
        steps, taken = steps + 1, taken + size
    return steps, taken


def plan_stages(job: JobSpec) -> tuple[StagePlan, ...]:
    """Return every stage of the job in order; token budgets are rounded up to whole steps."""
    plans: list[StagePlan] = []
    step = consumed = 0
    for index, stage in enumerate(job.stages):
        length = stage.sequence_length or job.data.sequence_length
        wanted = -(-stage.tokens // length)
        steps, samples = steps_for(job.batch, consumed, wanted)
        plans.append(
            StagePlan(
                index=index,
                name=stage.name,
                start_step=step,
                steps=steps,
                start_sample=consumed,
                samples=samples,
                sequence_length=length,
                tokens=samples * length,
                curve=stage.lr.curve(steps),
                mixtures=mixtures(stage, samples),
            )
        )
        step, consumed = step + steps, consumed + samples
    return tuple(plans)


def mixtures(stage: StageSpec, samples: int) -> tuple[tuple[int, Mapping[str, float]], ...]:
    """Return the mixtures of a stage of `samples` samples, in discrete steps; steps below one sample are dropped."""
    stairs: list[tuple[float, Mapping[str, float]]] = [(0.0, stage.mixture)]
    stairs += [(step.at, step.mixture) for step in stage.mixture_steps]
    if stage.mixture_ramp is not None:
        stairs += _ramp(stage.mixture, stage.mixture_ramp)
    begins = [int(at * samples) for at, _ in stairs] + [samples]
    return tuple(
        (begin, mixture) for (begin, end), (_, mixture) in zip(pairwise(begins), stairs, strict=True) if begin < end
    )


def _ramp(first: Mapping[str, float], ramp: MixtureRamp) -> list[tuple[float, Mapping[str, float]]]:
    stairs: list[tuple[float, Mapping[str, float]]] = []
    for stair in range(ramp.stairs):
        at = ramp.start + (ramp.end - ramp.start) * stair / ramp.stairs
        stairs.append((at, _between(first, ramp.to, (stair + 0.5) / ramp.stairs)))
    return [*stairs, (ramp.end, ramp.to)]


def _between(first: Mapping[str, float], last: Mapping[str, float], progress: float) -> Mapping[str, float]:
    """Return the linear interpolation of two mixtures, normalised."""
    before, after = sum(first.values()), sum(last.values())
    return {
        name: (1 - progress) * first.get(name, 0.0) / before + progress * last.get(name, 0.0) / after
        for name in dict.fromkeys((*first, *last))
    }
