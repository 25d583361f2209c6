"""Write the choices of a first job as a job file that explains them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepwarm.launch.init.choices import ANNEALED, REPLAYED, Choices
from keepwarm.launch.init.corpus import Corpus
from keepwarm.launch.init.document import comment, flow, lines, path_in_job
from keepwarm.launch.init.machine import Machine
from keepwarm.launch.plan.text import count
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.text import counted
from keepwarm.trainer.job.spec import JobSpec

_CPU_MICRO_BATCH = 8
_WHY_REPLAY = (
    "So that the model keeps what it knew: these samples stand in for the data that it was trained on, which no model "
    "folder records. A quarter is usual where the language changes."
)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A first job in plain values, with what its comments tell."""

    name: str
    parent: Path | None
    model: dict[str, Any] | None
    """The section of a model from scratch; None: that of the parent."""
    parameters: int
    training: Sequence[Corpus]
    replay: Sequence[Corpus]
    held_out: Sequence[Corpus]
    tokens: dict[str, int]
    """Of every source by name."""
    exact: bool
    tokenizer: str
    end_of_document: str | None
    choices: Choices
    machine: Machine

    def stages(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield each stage with why it is there."""
        made, name = self.choices, "pretrain" if self.parent is None else "adapt"
        mixture = {one.name: self.tokens[one.name] if len(self.training) > 1 else 1 for one in self.training}
        replay = [
            {"proxy_source": one.name, "fraction": share}
            for one, share in zip(self.replay, self._replay_shares(), strict=True)
        ]
        shared = {"mixture": mixture} | ({"replay": replay} if replay else {})
        main = {"schedule": "constant", "max": made.peak, "warmup": 0.05}
        if not made.anneal_steps:
            main = {"schedule": "cosine", "max": made.peak, "min": made.peak / 10, "warmup": 0.05}
        tokens = (made.steps - made.anneal_steps) * made.step_tokens
        yield {"name": name, "tokens": tokens, **shared, "lr": main}, self._why_rate()
        if made.anneal_steps:
            falling = {"schedule": "linear", "max": made.peak, "min": 0.0, "warmup": 0.0}
            why = (
                f"The last {ANNEALED:.0%}: the rate falls to zero, which is where much of the loss goes. Give it the "
                "best of your data by changing its mixture. Training can later go on from the end of the stage before."
            )
            anneal = made.anneal_steps * made.step_tokens
            yield {"name": "anneal", "tokens": anneal, **shared, "lr": falling}, why

    def _replay_shares(self) -> list[float]:
        total = sum(self.tokens[one.name] for one in self.replay)
        return [max(1e-3, round(REPLAYED * self.tokens[one.name] / total, 4)) for one in self.replay]

    def _why_rate(self) -> str:
        made = self.choices
        rate = f"The peak rate is usual for {count(self.parameters)} parameters"
        if self.parent is not None:
            rate += ", halved because the weights are trained already: higher learns faster and forgets more"
        passes = "one pass" if abs(made.passes - 1) < 0.05 else f"{made.passes:.2g} passes"
        seen = f"{counted(made.steps, 'step')} in all, {passes} over the corpora"
        short = ": about what this CPU trains on in ten minutes. Raise `tokens` for more" if made.is_short else ""
        return f"{rate}. {seen}{short}."


def job_text(draft: Draft, laid: JobSpec | None, folder: Path) -> str:
    """Return the job file for `folder`; `laid` is the job in its layout, None: not chosen yet, or for a CPU."""
    parts = [_head(draft), _model(draft), _data(draft, folder), _batch(draft, laid), _stages(draft)]
    parts += [_layout(draft, laid), _safety(draft)]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def layout_of(parallel: ParallelSpec) -> dict[str, Any]:
    """Return the keys that a layout consists of: its three sizes, and what else is not the default."""
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "data": parallel.data}
    return sizes | parallel.model_dump(mode="json", exclude_defaults=True, exclude={"engine", "options"})


def _head(draft: Draft) -> Iterator[str]:
    yield from comment(
        "Written by `keepwarm init`, as a beginning: every choice below is explained, and yours to change. Look at it "
        "with `keepwarm plan`, run it with `keepwarm train`. Paths are relative to this file, `output` to where the "
        "command is started. docs/job-keys.md lists all keys."
    )
    yield f"name: {flow(draft.name)}"
    yield "output: " + flow(f"runs/{draft.name}".replace("$", "$$"))


def _model(draft: Draft) -> Iterator[str]:
    if draft.parent is not None:
        yield from comment(
            f"The weights to begin with: {count(draft.parameters)} parameters. `model` is left out, so it follows from "
            "the folder's config.json."
        )
        yield f"init_from: {flow(str(draft.parent).replace('$', '$$'))}"
        return
    assert draft.model is not None
    yield from comment(
        f"A small model from scratch, {count(draft.parameters)} parameters; name one of configs/models instead, or "
        "give a folder of weights as `init_from` and leave `model` out."
    )
    yield from lines("model", draft.model, "")


def _data(draft: Draft, folder: Path) -> Iterator[str]:
    paths = {one.name: path_in_job(one.path, folder) for one in (*draft.training, *draft.replay)}
    total = sum(draft.tokens.values())
    yield "data:"
    yield from comment(
        f"{'' if draft.exact else 'About '}{count(total)} tokens. Text is tokenized once, into the run folder.", "  "
    )
    yield from lines("sources", paths)
    if draft.held_out:
        yield from lines("validation", {one.name: path_in_job(one.path, folder) for one in draft.held_out})
    else:
        yield from comment(
            "No file is held out, so nothing is evaluated. Put some documents aside in a file such as "
            "NAME.valid.jsonl, and name it here:",
            "  ",
        )
        yield "  # validation: {NAME: NAME.valid.jsonl}"
    tokenizer = draft.tokenizer if draft.tokenizer == "bytes" else path_in_job(draft.tokenizer, folder)
    yield f"  tokenizer: {flow(tokenizer)}"
    if draft.end_of_document is not None:
        yield f"  end_of_document: {flow(draft.end_of_document)}"
    yield from comment(
        "Tokens of a sample: a power of two that the model takes and of which the smallest corpus has several.", "  "
    )
    yield f"  sequence_length: {flow(draft.choices.sequence_length)}"


def _batch(draft: Draft, laid: JobSpec | None) -> Iterator[str]:
    made = draft.choices
    micro = math.gcd(_CPU_MICRO_BATCH, made.batch) if laid is None else laid.batch.micro_batch_size
    yield from comment(
        f"{count(made.step_tokens)} tokens a step. Gradient accumulation follows from both sizes and parallel.data; a "
        "larger micro-batch is faster and needs more memory, and neither changes the result beyond rounding."
    )
    yield "batch: " + flow({"global_batch_size": made.batch, "micro_batch_size": micro})


def _stages(draft: Draft) -> Iterator[str]:
    yield "stages:"
    for index, (stage, why) in enumerate(draft.stages()):
        yield from comment(why, "  ")
        yield f"  - name: {flow(stage['name'])}"
        yield f"    tokens: {flow(stage['tokens'])}"
        yield f"    mixture: {flow(stage['mixture'])}" + ("  # by tokens" if len(stage["mixture"]) > 1 else "")
        if replay := stage.get("replay"):
            yield from comment(_WHY_REPLAY, "    ") if index == 0 else ()
            yield f"    replay: {flow(replay)}"
        yield f"    lr: {flow(stage['lr'])}"


def _layout(draft: Draft, laid: JobSpec | None) -> Iterator[str]:
    machine = draft.machine
    if not machine.gpus:
        yield from comment(
            f"One rank on the CPU, with {counted(machine.threads, 'thread')}. The same file runs on GPUs: "
            "`keepwarm init --gpus N` chooses a layout for them."
        )
        yield "parallel: {tensor: 1, pipeline: 1, data: 1}"
        yield "numerics: " + flow({"threads_per_rank": machine.threads})
        return
    if laid is None:
        yield "numerics: {precision: bf16}"
        return
    parallel = laid.parallel
    kind = f"{machine.card.name}s of {machine.card.memory:g} GiB"
    if machine.is_assumed:
        kind += ", which is assumed: name yours with --gpu, or set cluster.gpu_memory"
    yield from comment(
        f"The layout that `keepwarm plan --find` expects to be the fastest on {machine.gpus} {kind}. It does not "
        "change what the run computes, except for rounding."
    )
    yield "parallel: " + flow(layout_of(parallel))
    yield "numerics: " + flow({"precision": "bf16", "recompute": laid.numerics.recompute})
    yield "cluster: " + flow({"ranks_per_node": machine.per_node, "gpu_memory": machine.card.memory})


def _safety(draft: Draft) -> Iterator[str]:
    every = max(10, draft.choices.steps // 10)
    yield from comment(
        "The newest state stays in host memory, from which a killed worker goes on; with several nodes also a lost one "
        "(docs/snapshots.md). Checkpoints on disk are for everything else."
    )
    yield "snapshot: {every: auto}"
    yield f"checkpoint: {flow({'every': every})}"
    if draft.held_out:
        yield f"evaluation: {flow({'every': every, 'samples': 64})}"
    yield f"log: {flow({'every': max(1, draft.choices.steps // 100)})}"
