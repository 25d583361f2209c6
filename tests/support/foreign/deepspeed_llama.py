"""Trains a small Hugging Face model on DeepSpeed, on every rank; saves and loads by DeepSpeed's own means."""

import argparse
import contextlib
import io
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.spec import ParallelSpec

WHOLE, HALF = 4, 2
"""Steps of the uninterrupted run, and at which it saves."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@contextlib.contextmanager
def engine_of(model: str, stage: int, *, universal: bool) -> Iterator[Any]:
    """DeepSpeed's engine with AdamW over a model of `tests.support.foreign.hf_models`."""
    from keepwarm.parallel.deepspeed import setup
    from keepwarm.parallel.deepspeed.setup import Groups
    from keepwarm.parallel.mesh.mesh import Mesh
    from tests.support.foreign.hf_models import CASES, hf_model

    class TensorGroups(Groups):
        """As the loader of universal checkpoints asks for them."""

        get_tensor_model_parallel_world_size = Groups.get_model_parallel_world_size
        get_tensor_model_parallel_rank = Groups.get_model_parallel_rank

    warnings.simplefilter("ignore")
    device = torch.device("cpu")
    mesh = Mesh(Layout.of(ParallelSpec(data=dist.get_world_size())), device, timedelta(seconds=120), alone=True)
    module = hf_model(*CASES[model], torch.float32)
    if universal:
        # What is loaded must come from the files.
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
    module.train()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
        "steps_per_print": None,
    }
    with setup.prepared(mesh, device):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        engine = setup.initialized(module, optimizer, config, TensorGroups(mesh))
    try:
        yield engine
    finally:
        engine.destroy()
        mesh.close()


def train(engine: Any, steps: range) -> list[float]:
    """The losses of this rank; batches are a function of rank and step."""
    losses = []
    for step in steps:
        random = torch.Generator().manual_seed(100 * step + dist.get_rank())
        tokens = torch.randint(0, 96, (1, 24), generator=random)
        loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    """fp32 weights and moments by the names of the parameters. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, parameter in engine.module.named_parameters():
        found[name] = safe_get_full_fp32_param(parameter).clone()
        for moment in MOMENTS:
            found[f"{moment}.{name}"] = safe_get_full_optimizer_state(parameter, moment).clone()
    return found


def train_and_save(model: str, stage: int, folder: Path) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Train to the end, and leave in `folder` what DeepSpeed's converter made of the checkpoint at half.

    Returns the losses of the second half, the state at half, and that at the end.
    """
    from deepspeed.checkpoint import ds_to_universal

    with engine_of(model, stage, universal=False) as engine, contextlib.redirect_stdout(io.StringIO()):
        train(engine, range(HALF))
        half = state_of(engine)
        engine.save_checkpoint(str(folder), tag="step")
        if dist.get_rank() == 0:
            arguments = argparse.Namespace(
                input_folder=str(folder / "step"),
                output_folder=str(folder / "step_universal"),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
            with contextlib.redirect_stderr(io.StringIO()):
                ds_to_universal.main(arguments)
        dist.barrier()
        losses = train(engine, range(HALF, WHOLE))
        return losses, half, state_of(engine)


def load_and_train(model: str, stage: int, folder: Path) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Load a universal checkpoint and train the second half: losses, the state that was loaded, and that at the end."""
    with engine_of(model, stage, universal=True) as engine, contextlib.redirect_stdout(io.StringIO()):
        engine.load_checkpoint(str(folder))
        half = state_of(engine)
        losses = train(engine, range(HALF, WHOLE))
        return losses, half, state_of(engine)
