"""Read the config that `model.transformers` names, and have it described in a process of its own. Torch-free."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from keepwarm.foreign_json import parse_json
from keepwarm.tested import installed
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model import quantisation
from keepwarm.trainer.model.families.config_fields import shown
from keepwarm.trainer.model.transformers.composite import TEXT, is_composite, text_of

CONFIG = "config.json"
_SECONDS = 300.0
_LIMIT = 16 << 20
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `model` section with the config's content and its description added.

    Raises:
        SpecError: the config cannot be read, or keepwarm cannot train its model; one sentence.
    """
    named = values["transformers"]
    file = Path(named)
    if file.is_dir():
        file = file / CONFIG
    config = _read(file)
    reason = _refusal(config)
    if reason is not None:
        raise SpecError(f"{file}: {reason}")
    config = quantisation.without(config)
    answer = json.loads(_described(json.dumps(config)))
    if "refused" in answer:
        raise SpecError(f"{file}: {answer['refused']}")
    return {**values, "config": config, "description": answer["description"]}


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            raw = opened.read(_LIMIT + 1)
    except OSError as error:
        raise SpecError(
            f"{file}: {error.strerror}; give a folder with a {CONFIG} of transformers, or that file"
        ) from error
    if len(raw) > _LIMIT:
        raise SpecError(f"{file}: larger than {_LIMIT >> 20} MiB, which no config is")
    try:
        config = parse_json(raw)
    except ValueError as error:
        raise SpecError(f"{file}: {error}") from error
    if not isinstance(config, dict):
        raise SpecError(f"{file}: expected an object with the fields of a config")
    return config


def _refusal(config: Mapping[str, Any]) -> str | None:
    """Return why the config is refused, as far as its fields alone say so."""
    kind = config.get("model_type")
    if config.get("auto_map"):
        return "auto_map: its model is code beside the weights, which keepwarm does not run"
    if not isinstance(kind, str) or not kind:
        return f"model_type = {shown(kind)} is no name of a model"
    if config.get("is_encoder_decoder"):
        return "is_encoder_decoder: keepwarm trains decoders alone"
    quantised = quantisation.refusal(config)
    if quantised is not None:
        return quantised
    if any(isinstance(config.get(name), int) and config[name] > 1 for name in _EXPERTS):
        return f"model_type = {shown(kind)} is a mixture of experts; these come later"
    if is_composite(config):
        reason = _refusal(text_of(config))
        return None if reason is None else f"{TEXT}: {reason}"
    found = installed("transformers")
    if found is None:
        return "model.transformers: transformers is not installed: pip install 'keepwarm[hf]'"
    try:
        old = Version(found).major < 5
    except InvalidVersion:
        old = False
    if old:
        return f"model.transformers: transformers {found} has no plans, 5 does: pip install -U 'keepwarm[hf]'"
    return None


@lru_cache(maxsize=8)
def _described(config: str) -> str:
    """Run `describe` in an interpreter of its own, which imports torch and transformers."""
    command = [sys.executable, "-P", "-m", "keepwarm.trainer.model.transformers.describe"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(
            command, input=config, capture_output=True, text=True, env=environment, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise SpecError(f"model.transformers: describing the model took more than {_SECONDS:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise SpecError(f"model.transformers: describing the model failed: {lines[-1] if lines else done.returncode}")
    return done.stdout
