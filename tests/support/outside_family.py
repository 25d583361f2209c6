"""A model family of another distribution: Llama under other config keys and tensor names, with two fused modules."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

NAME = "tern"
MODULE = """
from keepwarm.trainer.model.families.base import ModelFamily
from keepwarm.trainer.model.families.tensor_names import PROJECTIONS, Fusion, TensorNames

KEYS = {
    "depth": "layers",
    "width": "hidden_size",
    "attention_heads": "heads",
    "memory_heads": "kv_heads",
    "inner_width": "ffn_size",
    "words": "vocabulary_size",
    "context": "max_sequence_length",
    "epsilon": "norm_eps",
    "theta": "rope_theta",
}

class TernFamily(ModelFamily):
    model_type = "tern"
    class_name = "TernModel"
    tensors = TensorNames(
        top={"embedding": "nest.words", "final_norm": "nest.last_scale", "head": "beak"},
        layer="nest.feathers.{}.",
        inside={
            "attention_norm": "first_scale",
            "attention.output": "look.out",
            "mlp_norm": "second_scale",
            "mlp.down": "think.down",
        },
        fusions=(
            Fusion(module="look.qkv", parts=PROJECTIONS, order="groups"),
            Fusion(module="think.gate_up", parts=("mlp.gate", "mlp.up")),
        ),
    )

    def read_config(self, config):
        return {ours: config.need(theirs) for theirs, ours in KEYS.items()}

    def write_config(self, spec):
        return {theirs: getattr(spec, ours) for theirs, ours in KEYS.items()}
"""
CONFIG = {
    "architectures": ["TernModel"],
    "attention_heads": 4,
    "context": 256,
    "depth": 4,
    "dtype": "float32",
    "epsilon": 1e-5,
    "inner_width": 104,
    "memory_heads": 2,
    "model_type": NAME,
    "theta": 10000.0,
    "torch_dtype": "float32",
    "width": 40,
    "words": 264,
}
"""The model `tiny` with two key-value heads."""


def install(folder: Path) -> None:
    """Write the distribution into `folder`, which processes find on their path."""
    folder.mkdir()
    (folder / "outside_family.py").write_text(MODULE)
    info = folder / "outside_family-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-family\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[keepwarm.model_families]\n{NAME} = outside_family:TernFamily\n")


def save_model(folder: Path) -> None:
    """Write a Hugging Face folder of the family, with random weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes: dict[str, tuple[int, ...]] = {"nest.words": (264, 40), "nest.last_scale": (40,), "beak": (264, 40)}
    for index in range(4):
        inside = {
            "first_scale": (40,),
            "look.qkv": (80, 40),
            "look.out": (40, 40),
            "second_scale": (40,),
            "think.gate_up": (208, 40),
            "think.down": (40, 104),
        }
        shapes |= {f"nest.feathers.{index}.{name}": shape for name, shape in inside.items()}
    draw = np.random.default_rng(17)
    tensors = {
        f"{name}.weight": draw.normal(float(len(shape) == 1), 0.02, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
