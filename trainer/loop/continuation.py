"""Changes between the saved state of a run and the job that continues it: refused, or adopted and reported."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from keepwarm.trainer.convert.huggingface.config import computes
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.preprocess.prepare import PreparedData
from keepwarm.trainer.data.replay import content_of
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.job import position
from keepwarm.trainer.job.position import saved_spec
from keepwarm.trainer.job.sections import StageSpec
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.job.stages import StagePlan
from keepwarm.trainer.loop.run_state import RunState
from keepwarm.trainer.model.any_spec import AnyModelSpec, stored_any_model_spec
from keepwarm.trainer.model.huggingface_config import model_spec_from_hf_config
from keepwarm.trainer.model.spec import ModelSpec
from keepwarm.trainer.model.transformers_spec import is_transformers
from keepwarm.trainer.monitor import events

Change = events.DataChanged | events.LrChanged
"""An adopted change."""


def check_continues(job: JobSpec, state: RunState, ledger: Ledger, tokenizer: str | None) -> None:
    """Raise SpecError if the job contradicts what the run has trained already.

    Nothing was written yet, so that a refusal leaves the run as it was.
    """
    position.check_continues(job.stages, state.stages, state.position(ledger))
    _check_model(job, state)
    if state.seed is not None and state.seed != job.seed:
        raise SpecError(
            f"seed: {state.seed} -> {job.seed}: the order of the data and the initial weights follow from the seed, so "
            "it stays; start another run to use another one"
        )
    if None not in (state.tokenizer, tokenizer) and state.tokenizer != tokenizer:
        raise SpecError(
            f"data.tokenizer: this run was trained with another tokenizer ({state.tokenizer}, now {tokenizer}), and "
            "token ids of the two mean different text: restore the old file, or start another run"
        )


def _flat(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored `model` section with the fields of a config of transformers one by one."""
    config = model.get("config") or {}
    flat = {key: value for key, value in model.items() if key not in ("config", "description")}
    return flat | {f"config.{key}": value for key, value in config.items()}


_CHANGEABLE = {
    "rope_theta", "rope_scaling", "sliding_window", "full_attention_layers", "max_sequence_length", "z_loss", "init",
    "transformers",
}  # fmt: skip
"""Model keys that may change during a run: they extend the context, weigh a loss, are used at the start alone, or name
a folder."""


def _as_native(spec: AnyModelSpec) -> dict[str, Any]:
    """Return what a model computes, in keepwarm's own terms; parameters of both origins have the same names.

    Raises:
        SpecError: keepwarm has no layers of its own that compute the same.
    """
    if isinstance(spec, ModelSpec):
        return computes(spec)
    try:
        return computes(model_spec_from_hf_config(spec.config))
    except SpecError as error:
        raise SpecError(
            "model: this run was trained with layers of another origin, keepwarm's or transformers', and keepwarm has "
            f"none of its own for {spec.description.class_name} ({error}): start another run from these weights with "
            "init_from"
        ) from error


def _check_model(job: JobSpec, state: RunState) -> None:
    saved, fields = _flat(state.model), _flat(job.model.model_dump(mode="json"))
    if is_transformers(saved) != is_transformers(fields):
        saved, fields = _as_native(stored_any_model_spec(state.model)), _as_native(job.model)
    for key, now in fields.items():
        before = saved.get(key, now)
        if before != now and key not in _CHANGEABLE:
            raise SpecError(
                f"model.{key}: {before} -> {now}: the weights of this run were trained with the former; start another "
                "run to change it, from these weights with init_from or keepwarm surgery"
            )


def adopt_changes(
    state: RunState, ledger: Ledger, data: PreparedData, plans: Sequence[StagePlan], specs: Sequence[StageSpec]
) -> list[Change]:
    """Take over what the job may change; return an event for each change."""
    return [*_adopt_data(state, ledger, data), *_adopt_curves(state, plans, specs)]


def _adopt_data(state: RunState, ledger: Ledger, data: PreparedData) -> list[events.DataChanged]:
    """Take over the job's data; return an event for each source and domain whose content differs from before."""
    changes = [*_changed_sources(ledger, data), *_changed_domains(state, data)]
    state.validation = {name: source.identity for name, source in data.validation.items()}
    state.tokenizer = data.tokenizer or state.tokenizer
    return [events.DataChanged(step=state.step, change=change) for change in changes]


def _changed_sources(ledger: Ledger, data: PreparedData) -> Iterator[str]:
    planned = {
        ledger.sources[share.source].name: content_of(share.source)
        for segment in ledger.upcoming()
        for share in segment.shares
    }
    seen: dict[str, int] = {}
    for identity, given in ledger.given().items():
        seen[content_of(identity)] = seen.get(content_of(identity), 0) + given.consumed
    for name, before in planned.items():
        now = None if name not in data.sources else content_of(data.sources[name].identity)
        if now is None or now == before:
            continue
        again = f"after {seen[now]:,} samples of the new one" if now in seen else "from its first sample on"
        yield (
            f"data.sources.{name}: content {before} -> {now}: {seen.get(before, 0):,} samples of the old content were "
            f"seen; the new one is drawn in an order of its own, {again}"
        )


def _changed_domains(state: RunState, data: PreparedData) -> Iterator[str]:
    for name, source in data.validation.items():
        before = state.validation.get(name, source.identity)
        if before != source.identity:
            state.baseline.pop(name, None)
            yield (
                f"data.validation.{name}: content/length {before} -> {source.identity}: its losses do not compare with "
                "earlier ones, and a gate on it applies from the next stage on"
            )


def _adopt_curves(state: RunState, plans: Sequence[StagePlan], specs: Sequence[StageSpec]) -> list[events.LrChanged]:
    """Take over the planned curves of every stage that the run has not left; return an event for each change."""
    changes = []
    for plan in plans:
        if plan.index >= len(state.curves):
            state.curves.append(plan.curve)
        if plan.index == len(state.stages) - 1:
            state.stages[-1] = msgspec.structs.replace(
                state.stages[-1], curve_step=plan.curve_step, spec=saved_spec(specs[plan.index])
            )
        before = state.curves[plan.index]
        if before != plan.curve and plan.index >= len(state.stages) - 1 and state.step < plan.end_step:
            old, new = before.save(), plan.curve.save()
            changes += [
                f"stages.{plan.name}.lr: {key}: {old.get(key, 'none')} -> {new.get(key, 'none')}"
                for key in dict.fromkeys((*old, *new))
                if old.get(key) != new.get(key)
            ]
            state.curves[plan.index] = plan.curve
    del state.curves[len(plans) :]
    return [events.LrChanged(step=state.step, change=change) for change in changes]
