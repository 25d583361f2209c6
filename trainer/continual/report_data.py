"""Collect the data for the report of a run: losses, forgetting, samples drawn. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepwarm.ft.format import publication
from keepwarm.ft.format.manifest import read_manifest
from keepwarm.trainer.continual.forgetting import (
    StabilityGap,
    backward_transfer,
    forgetting,
    forward_transfer,
    stability_gap,
)
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.segment import ReplayShare, Segment, Share
from keepwarm.trainer.data.weights import UNITS
from keepwarm.trainer.errors import OutputError
from keepwarm.trainer.job.files import load_run
from keepwarm.trainer.job.run_folder import RUN_FILE, RunFolder
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.stages import StagePlan
from keepwarm.trainer.monitor import events
from keepwarm.trainer.monitor.events import Event
from keepwarm.trainer.monitor.goodput import of_run
from keepwarm.trainer.monitor.resolved_stages import resolved_stages


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Samples drawn from one source, or by one replay clause, in one stage."""

    stage: str
    what: str
    asked: float
    """Share of the stage's samples so far."""
    samples: int
    of: int
    """Samples of the stage so far."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The contents of the page."""

    folder: Path
    job: JobSpec
    plans: tuple[StagePlan, ...]
    steps: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl, one per step."""
    evaluations: Mapping[int, Mapping[str, float]]
    """Losses by domain, by number of completed steps."""
    events: Sequence[Event]
    parent: Mapping[str, Any] | None
    ledger: Ledger | None
    goodput: Mapping[str, Any]

    @property
    def domains(self) -> list[str]:
        return [
            name for name in self.job.data.validation if any(name in losses for losses in self.evaluations.values())
        ]

    @property
    def finished(self) -> list[StagePlan]:
        """Stages that were evaluated at their end."""
        return [plan for plan in self.plans if plan.end_step in self.evaluations]

    def matrix(self) -> list[list[float | None]]:
        """P: losses by domain before the first stage and after each finished one."""
        steps = [0, *(plan.end_step for plan in self.finished)]
        return [[self.evaluations.get(step, {}).get(domain) for domain in self.domains] for step in steps]

    def forgotten(self) -> dict[str, float]:
        """By domain evaluated throughout: its last loss minus its best one before or after any stage."""
        found = {}
        for domain, column in zip(self.domains, zip(*self.matrix(), strict=True), strict=True):
            losses = [loss for loss in column if loss is not None]
            if len(losses) == len(column) > 1:
                found[domain] = forgetting(losses)
        return found

    def gaps(self, plan: StagePlan) -> dict[str, StabilityGap]:
        """Return, by domain that the stage disturbs, the worst loss within it and the recovery from it.

        A domain whose loss is highest at the start of the stage is only learnt there, and has no gap.
        """
        found = {}
        for domain in self.domains:
            points = [
                (step, losses[domain])
                for step, losses in sorted(self.evaluations.items())
                if plan.start_step <= step <= plan.end_step and domain in losses
            ]
            if len(points) > 2:
                gap = stability_gap([step for step, _ in points], [loss for _, loss in points])
                if gap.worst_step > points[0][0] and gap.depth > 0:
                    found[domain] = gap
        return found

    def transfer(self) -> tuple[float, float] | None:
        """Backward and forward transfer, if every stage has a domain of its own: the source that it draws most from."""
        own = [max(plan.mixtures[0][1], key=lambda name: plan.mixtures[0][1][name]) for plan in self.finished]
        if len(own) < 2 or sorted(own) != sorted(self.domains):
            return None
        columns = [self.domains.index(name) for name in own]
        rows = [[row[column] for column in columns] for row in self.matrix()]
        whole = [[value for value in row if value is not None] for row in rows]
        if any(len(row) < len(own) for row in whole):
            return None
        return backward_transfer(whole), forward_transfer(whole)

    def drawn(self) -> list[Drawn]:
        """Samples drawn in each stage so far, compared with what its clauses ask for."""
        if self.ledger is None:
            return []
        ledger, found = self.ledger, []
        ends = [*(mark.start for mark in ledger.stages[1:]), ledger.position]
        for mark, end in zip(ledger.stages, ends, strict=False):
            if mark.start < min(end, ledger.position):
                found += _of_stage(ledger, mark.name, mark.start, min(end, ledger.position))
        return found


def gather(folder: Path) -> RunReport:
    """Read a run folder; the run may still be in progress.

    Raises:
        OutputError: it is not a run folder, or nothing was recorded in it.
    """
    if not RunFolder(folder).exists:
        raise OutputError(f"{folder}: not a run folder ({RUN_FILE} is missing)")
    job = load_run(RunFolder(folder).run_file)
    lines = RunFolder(folder).metrics()
    if not lines:
        raise OutputError(f"{folder}: nothing was recorded yet (metrics.jsonl is missing or empty)")
    meta: dict[str, Any] = {}
    if (newest := publication.latest(RunFolder(folder).checkpoints)) is not None:
        meta = read_manifest(newest).meta
    return RunReport(
        folder=folder,
        job=job,
        plans=resolved_stages(folder, job),
        steps=[line for line in lines if "loss" in line],
        evaluations={line["step"]: line["eval"] for line in lines if "eval" in line},
        events=events.read(folder).events,
        parent=meta.get("run", {}).get("parent"),
        ledger=Ledger.load(meta["ledger"]) if "ledger" in meta else None,
        goodput=of_run(folder).data(),
    )


def _of_stage(ledger: Ledger, stage: str, start: int, end: int) -> list[Drawn]:
    asked: dict[str, float] = {}
    given: dict[str, int] = {}
    ends = [*(segment.start for segment in ledger.segments[1:]), end]
    for segment, stop in zip(ledger.segments, ends, strict=False):
        low, high = max(start, segment.start), min(end, stop)
        if low >= high:
            continue
        before, after = (segment.table.counts_before(at - segment.start) for at in (low, high))
        for share, first, last in zip(segment.all_shares, before, after, strict=True):
            what = _label(ledger, segment, share)
            asked[what] = asked.get(what, 0.0) + share.units / UNITS * (high - low)
            given[what] = given.get(what, 0) + last - first
    return [
        Drawn(stage=stage, what=what, asked=wanted / (end - start), samples=given[what], of=end - start)
        for what, wanted in asked.items()
    ]


def _label(ledger: Ledger, segment: Segment, share: Share | ReplayShare) -> str:
    if isinstance(share, Share):
        return ledger.labels()[share.source]
    replay = ledger.replays[share.replay]
    law = replay.law if replay.law == "uniform" else f"power {replay.exponent:g}"
    return f"replay of {', '.join(dict.fromkeys(pool.stage for pool in replay.pools))} ({law})"
