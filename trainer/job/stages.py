"""The plan of a job: batch-size ramp, and steps and tokens of every stage. Pure and torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from keepwarm.trainer.job.curve import Curve
from keepwarm.trainer.job.position import START, BegunStage, Position
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
    curve_step: int
    """Step of the run at which step 0 of the curve lies: `start_step`, unless the run continued with another batch,
    sequence length or budget within the stage."""
    mixtures: tuple[tuple[int, Mapping[str, float]], ...]
    """Mixtures, each with the sample of the stage (from 0) at which it takes effect; the first one at 0."""

    @property
    def end_step(self) -> int:
        return self.start_step + self.steps

    @property
    def end_sample(self) -> int:
        return self.start_sample + self.samples

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from the start of the job."""
        return self.curve.at(step - self.curve_step)


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


def plan_stages(job: JobSpec, position: Position = START) -> tuple[StagePlan, ...]:
    """Return every stage of the job in order; token budgets are rounded up to whole steps.

    Stages that the run has left keep their boundaries. The stage in progress has the rest of its budget ahead, in
    steps of the job's present batch and sequence length, and its curve and mixtures continue at the fraction of the
    budget that was consumed. The stages of `position` must be the first ones of the job.
    """
    begun, plans = position.stages, []
    for index, stage in enumerate(begun[:-1]):
        plans.append(_left(job, index, stage, begun[index + 1]))
    step, consumed = position.step, position.samples
    for index in range(len(plans), len(job.stages)):
        fresh = BegunStage(name=job.stages[index].name, start_step=step, start_sample=consumed, tokens=0)
        plans.append(_ahead(job, index, begun[index] if index < len(begun) else fresh, step, consumed))
        step, consumed = plans[-1].end_step, plans[-1].end_sample
    return tuple(plans)


def _left(job: JobSpec, index: int, stage: BegunStage, following: BegunStage) -> StagePlan:
    spec, steps = job.stages[index], following.start_step - stage.start_step
    samples = following.start_sample - stage.start_sample
    return StagePlan(
        index=index,
        name=stage.name,
        start_step=stage.start_step,
        steps=steps,
        start_sample=stage.start_sample,
        samples=samples,
        sequence_length=stage.tokens // samples,
        tokens=stage.tokens,
        curve=spec.lr.curve(steps),
        curve_step=stage.start_step,
        mixtures=mixtures(spec, samples),
    )


def _ahead(job: JobSpec, index: int, stage: BegunStage, step: int, consumed: int) -> StagePlan:
    """Return the plan of a stage that the run is in or will begin, at `step` completed steps and `consumed` samples.

    The stage is laid out twice: as a whole, as if it had always been trained as the job now says, and from here on.
    Both end at the same point, which places curve and mixtures so that they continue at the consumed fraction.
    """
    spec = job.stages[index]
    length = spec.sequence_length or job.data.sequence_length
    whole_steps, whole_samples = steps_for(job.batch, stage.start_sample, -(-spec.tokens // length))
    steps, samples = steps_for(job.batch, consumed, -(-max(0, spec.tokens - stage.tokens) // length))
    end_step, end_sample = step + steps, consumed + samples
    return StagePlan(
        index=index,
        name=stage.name,
        start_step=stage.start_step,
        steps=end_step - stage.start_step,
        start_sample=stage.start_sample,
        samples=end_sample - stage.start_sample,
        sequence_length=length,
        tokens=stage.tokens + samples * length,
        curve=spec.lr.curve(whole_steps),
        curve_step=end_step - whole_steps,
        mixtures=_moved(mixtures(spec, whole_samples), end_sample - whole_samples - stage.start_sample),
    )


def _moved(
    changes: Sequence[tuple[int, Mapping[str, float]]], samples: int
) -> tuple[tuple[int, Mapping[str, float]], ...]:
    """Return the changes of mixture moved by `samples`, with the mixture in force at the start of the stage at 0."""
    before = [index for index, (first, _) in enumerate(changes) if first + samples <= 0]
    kept = changes[before[-1] if before else 0 :]
    return ((0, kept[0][1]), *((first + samples, mixture) for first, mixture in kept[1:]))


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
