"""The stages of a run folder as the run trains them, for readers outside its ranks. Torch-free."""

from pathlib import Path

from keepwarm.trainer.job.position import START
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.stages import StagePlan, plan_stages
from keepwarm.trainer.monitor import events


def resolved_stages(folder: Path, job: JobSpec) -> tuple[StagePlan, ...]:
    """Return the stages of the run in `folder`, whose job is `job`: laid out from the position of its newest start.

    Without a recorded start, or if the job no longer contains the stages that had begun, the stages are those of a
    fresh run.
    """
    started = events.read(folder).of(events.TrainingStarted)
    position = started[-1].position if started else START
    names = [stage.name for stage in job.stages]
    known = names[: len(position.stages)] == [stage.name for stage in position.stages]
    return plan_stages(job, position if known else START)
