"""The `model` section of a job whose layers come from a class of transformers. Torch-free."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from keepwarm.parallel.style import TensorStyle
from keepwarm.section import Count, Ranks, Section

Shape = tuple[int, ...]

_TOP = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}


class Description(Section):
    """What a class of transformers builds from a config, found once, when the job is read."""

    class_name: str
    layers: Ranks
    hidden_size: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    ffn_size: Count
    vocabulary_size: Count
    max_sequence_length: Count
    tied_embeddings: bool
    windows: tuple[Count | None, ...] = Field(description="attention to the last n tokens only, by layer")
    final_norm: dict[str, Shape] = Field(description="shapes of its parameters")
    layer_shapes: tuple[dict[str, Shape], ...] = Field(description="parameters of each kind of layer")
    layer_buffers: tuple[dict[str, Shape], ...] = Field((), description="buffers saved with them, likewise")
    layer_kinds: tuple[int, ...] = Field(description="the kind of every layer")
    styles: dict[str, TensorStyle] = Field(description="tensor-parallel styles of modules")
    no_tensor: str | None = Field(None, description="why parallel.tensor must be 1")
    inside: dict[str, str] = Field(description="transformers' names of a layer's modules, by ours")
    fused: dict[str, tuple[str, ...]] = Field(description="parts of what transformers stores as one")
    fused_groups: dict[str, Count] = Field({}, description="groups of rows in which the parts alternate, if several")
    head_bias: bool = False
    top: dict[str, str] = Field(_TOP, description="transformers' names of what is around the layers, by ours")
    layer: str = Field("model.layers.{}.", description="prefix of its layers")


def is_transformers(values: Any) -> bool:
    """Return whether the values of a `model` section name a config of transformers."""
    return isinstance(values, Mapping) and "transformers" in values


class TransformersSpec(Section):
    """A causal decoder of transformers: `transformers` names its config, everything else follows from that."""

    transformers: str = Field(description="folder with a config.json of transformers, or that file")
    config: dict[str, Any] = Field(description="content of that file, stored with the run")
    description: Description = Field(description="what transformers builds from it, stored with the run")
    z_loss: float = Field(0.0, ge=0, allow_inf_nan=False, description="weight of the squared log-partition")

    @classmethod
    def is_meant(cls, values: Any) -> bool:
        return is_transformers(values)

    @property
    def is_native(self) -> bool:
        return False

    @property
    def layers(self) -> int:
        return self.description.layers

    @property
    def hidden_size(self) -> int:
        return self.description.hidden_size

    @property
    def heads(self) -> int:
        return self.description.heads

    @property
    def kv_heads(self) -> int:
        return self.description.kv_heads

    @property
    def key_value_heads(self) -> int:
        return self.description.kv_heads

    @property
    def size_per_head(self) -> int:
        return self.description.head_dim

    @property
    def ffn_size(self) -> int:
        return self.description.ffn_size

    @property
    def vocabulary_size(self) -> int:
        return self.description.vocabulary_size

    @property
    def max_sequence_length(self) -> int:
        return self.description.max_sequence_length

    @property
    def tied_embeddings(self) -> bool:
        return self.description.tied_embeddings

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def has_gate(self) -> bool:
        """Whether the MLP multiplies with a gate."""
        return "mlp.gate.weight" in self.description.layer_shapes[0]

    @property
    def has_qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return "attention.query_norm.weight" in self.description.layer_shapes[0]

    @property
    def parallel_residual(self) -> bool:
        return False

    def window(self, layer: int) -> int | None:
        """Return the window of a layer, or None."""
        return self.description.windows[layer]

    def shapes(self, layers: range, *, embed: bool, head: bool) -> dict[str, Shape]:
        """Return the parameter shapes of a part, as `keepwarm.trainer.model.shapes.parameter_shapes`."""
        found, matrix = self.description, (self.vocabulary_size, self.hidden_size)
        shapes: dict[str, Shape] = {"embedding.weight": matrix} if embed else {}
        for index in layers:
            kind = found.layer_shapes[found.layer_kinds[index]]
            shapes |= {f"layers.{index}.{name}": shape for name, shape in kind.items()}
        if head:
            shapes |= {f"final_norm.{name}": shape for name, shape in found.final_norm.items()}
            if not (embed and self.tied_embeddings):
                shapes["head.weight"] = matrix
            if found.head_bias:
                shapes["head.bias"] = (self.vocabulary_size,)
        return shapes

    def buffers(self, layers: range) -> dict[str, Shape]:
        """Return the shapes of the buffers that are saved with the parameters of these layers."""
        found = self.description
        return {
            f"layers.{index}.{name}": shape
            for index in layers
            if found.layer_buffers
            for name, shape in found.layer_buffers[found.layer_kinds[index]].items()
        }
