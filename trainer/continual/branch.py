"""Branches: a new job that continues from a checkpoint in a run's constant-rate phase. Torch-free.

The constant phase of an infinite or warm-up-stable-decay schedule is the place to branch: an anneal of any length
continues its curve without a jump, and the run itself continues unaffected (Singh et al., 2025).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepwarm.ft.errors import FtError
from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import MANIFEST, read_manifest
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.errors import CheckpointError, OutputError, SpecError
from keepwarm.trainer.job.curve import AnnealableCurve, annealable, load_curve
from keepwarm.trainer.job.files import load_job, load_run
from keepwarm.trainer.job.position import position_at, stage_records
from keepwarm.trainer.job.run_folder import RUN_FILE, RunFolder
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.stages import StagePlan, global_size_at, plan_stages
from keepwarm.trainer.job.url import path_override


@dataclass(frozen=True, kw_only=True)
class BranchPoint:
    """A checkpoint in the constant phase of a stage."""

    path: Path
    """Folder of the checkpoint."""
    step: int
    """Completed steps of the run."""
    plan: StagePlan
    """The stage that contains the last of them."""
    curve: AnnealableCurve
    """The saved curve."""
    position: int
    """Samples consumed."""


def branched(folder: Path, step: int, tokens: int, overrides: Sequence[str] = ()) -> JobSpec:
    """Return the job of a branch: the run's own, with one stage of `tokens` that anneals from the checkpoint of `step`.

    The stage has the mixture, the replay and the evaluation in force at that step; the rate decays from the constant
    one as the schedule anneals: exponentially for infinite, linearly for wsd and constant. `overrides` may change any
    of it.

    Raises:
        OutputError: there is no run in `folder`.
        CheckpointError: the run has no checkpoint of `step`, or a damaged one.
        SpecError: the step lies outside the constant phase, the branch would write into the run, or an override is
            wrong.
    """
    if not RunFolder(folder).exists:
        raise OutputError(f"{folder}: not a run folder ({RUN_FILE} is missing)")
    folder = folder.resolve()
    parent = load_run(RunFolder(folder).run_file)
    point = branch_point(folder, parent, step)
    name = f"{parent.name}-anneal-{step}"
    made = {
        "name": name,
        "batch.global_batch_size": global_size_at(parent.batch, point.position),
        "batch.ramp": None,
        "stages": [_stage(parent, point, tokens)],
    }
    output = Path(parent.output).with_name(f"{Path(parent.output).name}-anneal-{step}")
    paths = [path_override("output", output), path_override("init_from", point.path)]
    own = [f"{key}={json.dumps(value)}" for key, value in made.items()]
    job = load_job(RunFolder(folder).run_file, [*paths, *own, *overrides], resubmit=True)
    if folder in (Path(job.output).resolve(), *Path(job.output).resolve().parents):
        raise SpecError(f"output = {job.output} lies in {folder}, from which the branch begins; choose another")
    return job


def branch_point(folder: Path, job: JobSpec, step: int) -> BranchPoint:
    """Return the checkpoint of `step`, which must lie in the constant phase; raises as `branched` does."""
    path = publication.folder(RunFolder(folder).checkpoints, step)
    if not (path / MANIFEST).is_file():
        found = [
            int(have.name.removeprefix("iter_")) for have in publication.checkpoints(RunFolder(folder).checkpoints)
        ]
        has = f"there are those of steps {', '.join(map(str, sorted(found)))}" if found else "there are none"
        raise CheckpointError(f"{folder}: no checkpoint of step {step}; {has} (checkpoint.every and checkpoint.keep)")
    try:
        meta = read_manifest(path).meta
    except FtError as error:
        raise CheckpointError(str(error)) from error
    try:
        ledger = Ledger.load(meta["ledger"])
        records = stage_records(meta["run"], ledger)
        curve = load_curve(meta["run"]["curves"][len(records) - 1]) if records else None
    except (KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: lacks the curves or the ledger of a run") from error
    if curve is None or [stage.name for stage in job.stages[: len(records)]] != [record.name for record in records]:
        raise SpecError(f"--at {step}: lies in no stage of {folder}")
    plan = plan_stages(job, position_at(step, records, ledger))[len(records) - 1]
    begin = records[-1].curve_step
    phase = curve.constant_phase if isinstance(curve, AnnealableCurve) else range(0)
    if not isinstance(curve, AnnealableCurve) or step - begin not in phase:
        first, last = (begin + at for at in (phase.start, phase.stop - 1))
        where = (
            f"with the batch of step {step} its rate is constant after steps {first} to {last}"
            if phase
            else f"schedule {curve.kind} has none here; {', '.join(annealable())} may have one"
        )
        raise SpecError(f"--at {step}: lies outside the constant phase of stages.{plan.name}: {where}")
    return BranchPoint(path=path, step=step, plan=plan, curve=curve, position=ledger.position)


def _stage(parent: JobSpec, point: BranchPoint, tokens: int) -> dict[str, Any]:
    stage = parent.stages[point.plan.index]
    within = point.position - point.plan.start_sample
    mixture = [mixture for first, mixture in point.plan.mixtures if first <= within][-1]
    kept = stage.model_dump(mode="json", by_alias=True, include={"replay", "evaluate", "gate", "sequence_length"})
    return {"name": "anneal", "tokens": tokens, "mixture": dict(mixture), "lr": point.curve.anneal(), **kept}
