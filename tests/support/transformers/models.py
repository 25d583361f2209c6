"""Toy models of transformers' families: their configs, bare classes, and training in any layout."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from keepwarm.parallel.engine import Batch, EngineConfig
from keepwarm.parallel.mesh.layout import Layout
from keepwarm.parallel.native.engine import TorchEngine
from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec
from keepwarm.trainer.convert.recipes import into_huggingface
from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.make import make_model
from keepwarm.trainer.model.transformers.describe import describe
from keepwarm.trainer.model.transformers.parts import TransformersDecoder
from keepwarm.trainer.model.transformers.tensors import class_names, tensor_names
from keepwarm.trainer.model.transformers_spec import TransformersSpec
from tests.support.parity import Outcome, State, assemble, held_shards, write_state
from tests.support.ranks import run_ranks

SEED = 7
SEQUENCE = 12
SAMPLES = 6
MICRO_BATCHES = 3
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    # Larger than usual, so that what a model does to its activations shows.
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GEMMA = {"sliding_window": 5, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}
_LATENT = {
    "head_dim": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
}
_OWN: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "tie_word_embeddings": True,
    },
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {"sliding_window": 5},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_unified_text": {
        "sliding_window": 5,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16,
    },
    "gptj": {"num_key_value_heads": 4, "rotary_dim": 4},
    "codegen": {"num_key_value_heads": 4, "rotary_dim": 4},
    "gpt_neox": {"num_key_value_heads": 4},
    "cwm": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sliding_window": 5},
    "olmo3": {"sliding_window": 5},
    "granite_swa": {
        "sliding_window": 5,
        "layer_rope_theta": [10000.0, 0, 500.0, 10000.0],
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
        "sliding_window": 5,
        "logit_scale": 0.5,
    },
    "minicpm3": {**_LATENT, "scale_emb": 3, "dim_model_base": 16, "attention_bias": True},
    "youtu": _LATENT,
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """The content of a toy config.json."""
    return {"model_type": family, **_SIZES, **_OWN.get(family, {}), **changes}


def spec_from(config: Mapping[str, Any], **fields: Any) -> TransformersSpec:
    """The section of a job with this config."""
    made = {"transformers": "config.json", "config": config, "description": describe(config), **fields}
    return TransformersSpec.model_validate_json(json.dumps(made))


@cache
def spec_of(family: str) -> TransformersSpec:
    return spec_from(config_of(family))


def whole_stage(spec: TransformersSpec) -> nn.Module:
    """The whole model on one rank with its initial weights."""
    model = TransformersDecoder(spec, SEED)
    with torch.device("meta"):
        part = model.build_stage(range(spec.layers), embed=True, head=True)
    part = part.to_empty(device="cpu")
    part.tie()
    with torch.no_grad():
        for name, tensor in tensors_of(part).items():
            shape = tuple(tensor.shape)
            tensor.copy_(model.initial(name, shape, (0,) * len(shape), shape))
    return part


def tensors_of(part: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a stage by their names there."""
    return {name: tensor.detach() for name, tensor in (*part.named_parameters(), *part.named_buffers())}


def bare_class(spec: TransformersSpec, weights: Mapping[str, torch.Tensor]) -> Any:
    """The model as transformers builds it, with weights of canonical names, and its own eager attention."""
    config = CONFIG_MAPPING[spec.model_type].from_dict(dict(spec.config))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    theirs = {}
    for recipe in into_huggingface(spec, spec.model_type):
        parts = [weights[name].flatten()[start:stop] for name, start, stop in recipe.runs]
        theirs[recipe.name] = torch.cat(parts).view(recipe.shape)
    names, published = class_names(spec), tensor_names(spec)
    if spec.tied_embeddings:
        theirs[names.name("head.weight")] = theirs[names.name("embedding.weight")]
    elif published.head_alias:
        theirs[names.name("head.weight")] = theirs.pop(published.name("head.weight"))
    model.load_state_dict(theirs)
    return model.eval()  # training knows no dropout, whatever the config says


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, targets (some masked) and documents `[SAMPLES, SEQUENCE]`."""
    generator = torch.Generator().manual_seed(step)
    text = (torch.rand(SAMPLES, SEQUENCE + 1, generator=generator).pow(2) * 64).long()
    targets = text[:, 1:].clone()
    targets[torch.rand(SAMPLES, SEQUENCE, generator=generator) < 0.3] = -100
    documents = (torch.rand(SAMPLES, SEQUENCE, generator=generator) < 0.2).cumsum(1).to(torch.int32)
    return text[:, :-1].contiguous(), targets, documents


@dataclass(frozen=True, kw_only=True)
class Run:
    """A few steps in a layout."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    schedule: str = "1f1b"
    recompute: str = "none"
    precision: str = "fp32"
    documents: bool = False
    optimizer: str = "sgd"
    steps: int = 3

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data


def train(spec: AnyModelSpec, run: Run, start: State | None = None, first: int = 0) -> Outcome:
    """Train on the ranks of the layout, from `start` if given, and put the state together from all shards."""
    ranks = run_ranks(run.world_size, train_on_rank, spec, run, start, first, deadline=200.0)
    assert all(steps == ranks[0][0] for steps, _ in ranks)
    return Outcome(ranks[0][0], assemble([shards for _, shards in ranks]))


def rate(step: int) -> float:
    return 0.02 / (1 + step)


def train_on_rank(spec: AnyModelSpec, run: Run, start: State | None, first: int) -> Any:
    """The results of the steps on this rank, and the shards that it holds."""
    parallel = ParallelSpec.model_validate(
        {name: getattr(run, name) for name in ("tensor", "pipeline", "data", "sequence", "schedule")}
    )
    engine = TorchEngine(
        EngineConfig(
            model=make_model(spec, SEED),
            parallel=parallel,
            optimizer=OptimizerSpec.model_validate(
                {"name": run.optimizer, "momentum": 0.9 if run.optimizer == "sgd" else 0.0, "clip_norm": 1.0}
            ),
            numerics=NumericsSpec.model_validate({"precision": run.precision, "recompute": run.recompute}),
            layout=Layout.of(parallel),
            device=torch.device("cpu"),
            timeout=timedelta(seconds=60),
        )
    )
    if start is not None:
        write_state(engine, start)
    steps = []
    for step in range(first, run.steps):
        share = SAMPLES // run.data
        at = engine.layout.coordinates(dist.get_rank()).data * share
        tokens, targets, documents = (
            whole[at : at + share].view(MICRO_BATCHES, -1, SEQUENCE) for whole in batch_of(step)
        )
        batch = Batch(tokens=tokens, targets=targets, documents=documents if run.documents else None)
        steps.append(engine.step(batch, rate(step)))
    shards = held_shards(engine)
    engine.close()
    return steps, shards
