"""Names, shapes and tensor-parallel styles of all parameters, for planning, building and conversion. Torch-free."""

from collections.abc import Mapping

from keepwarm.parallel.style import SPLIT_DIM, TensorStyle, copies_of
from keepwarm.trainer.model.any_spec import AnyModelSpec
from keepwarm.trainer.model.spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]

LOGITS_AT_ONCE = 1 << 26
"""Maximum number of logits that the head computes in one chunk: 256 MB in fp32."""


def parameter_shapes(
    spec: AnyModelSpec, layers: range | None = None, *, embed: bool = True, head: bool = True
) -> Shapes:
    """Return the parameter shapes of a part by module name, in order of registration; by default of the whole model.

    With tied embeddings a part that has both ends holds one matrix, `embedding.weight`; a part with only the head
    holds its copy as `head.weight`.
    """
    if not isinstance(spec, ModelSpec):
        return spec.shapes(range(spec.layers) if layers is None else layers, embed=embed, head=head)
    shapes: Shapes = {}
    if embed:
        shapes["embedding.weight"] = (spec.vocabulary_size, spec.hidden_size)
        if spec.position == "learned":
            shapes["positions.weight"] = (spec.max_sequence_length, spec.hidden_size)
    for index in range(spec.layers) if layers is None else layers:
        shapes |= {f"layers.{index}.{name}": shape for name, shape in _layer(spec).items()}
    if head:
        shapes |= _norm(spec, "final_norm", spec.hidden_size)
        if not (embed and spec.tied_embeddings):
            shapes["head.weight"] = (spec.vocabulary_size, spec.hidden_size)
    return shapes


def stored_shapes(spec: AnyModelSpec) -> Shapes:
    """Return the shapes of all parameters, and of the buffers that are saved with them."""
    return parameter_shapes(spec) | ({} if isinstance(spec, ModelSpec) else spec.buffers(range(spec.layers)))


def _layer(spec: ModelSpec) -> Shapes:
    hidden, size = spec.hidden_size, spec.size_per_head
    queries, keys = spec.heads * size, spec.key_value_heads * size
    shapes = _norm(spec, "attention_norm", hidden)
    for name, width in (("query", queries), ("key", keys), ("value", keys)):
        shapes |= _linear(f"attention.{name}", width, hidden, spec.qkv_bias)
    shapes |= _linear("attention.output", hidden, queries, spec.attention_output_bias)
    if spec.qk_norm != "none":
        shapes["attention.query_norm.weight"] = (size if spec.qk_norm == "head" else queries,)
        shapes["attention.key_norm.weight"] = (size if spec.qk_norm == "head" else keys,)
    shapes |= _norm(spec, "mlp_norm", hidden)
    for name in ("gate", "up") if spec.activation == "swiglu" else ("up",):
        shapes |= _linear(f"mlp.{name}", spec.ffn_size, hidden, spec.mlp_bias)
    return shapes | _linear("mlp.down", hidden, spec.ffn_size, spec.mlp_bias)


def _linear(name: str, outputs: int, inputs: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | {f"{name}.bias": (outputs,)} if bias else shapes


def _norm(spec: ModelSpec, name: str, features: int) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (features,)}
    return shapes | {f"{name}.bias": (features,)} if spec.norm == "layer" else shapes


def tensor_plan(spec: AnyModelSpec) -> Mapping[str, TensorStyle]:
    """Map fnmatch patterns of module names to their styles; modules that the model lacks are left out."""
    if not isinstance(spec, ModelSpec):
        return spec.description.styles
    plan: dict[str, TensorStyle] = {
        "embedding": "vocabulary",
        "layers.*.attention.query": "column",
        "layers.*.attention.key": "key_value",
        "layers.*.attention.value": "key_value",
        "layers.*.attention.output": "row",
        "layers.*.attention_norm": "sequence",
        "layers.*.mlp_norm": "sequence",
        "layers.*.mlp.up": "column",
        "layers.*.mlp.down": "row",
        "final_norm": "sequence",
        "head": "head",
    }
    if spec.position == "learned":
        plan["positions"] = "positions"
    if spec.activation == "swiglu":
        plan["layers.*.mlp.gate"] = "column"
    if spec.qk_norm != "none":
        each = spec.qk_norm == "head"
        plan["layers.*.attention.query_norm"] = "per_head" if each else "column_norm"
        plan["layers.*.attention.key_norm"] = "per_head" if each else "key_value_norm"
    return plan


def local_shape(name: str, shape: tuple[int, ...], spec: AnyModelSpec, tensor: int) -> tuple[int, ...]:
    """Return the shape that any of `tensor` ranks holds, at most, of a parameter before data parallelism splits it."""
    style = _style(name.rpartition(".")[0], tensor_plan(spec))
    dim = SPLIT_DIM.get(style) if style else None
    parts = tensor // copies_of(style, spec.key_value_heads, tensor)
    return tuple(-(-size // parts) if at == dim else size for at, size in enumerate(shape))


def _style(module: str, plan: Mapping[str, TensorStyle]) -> TensorStyle | None:
    parts = module.split(".")
    if parts[0] == "layers":
        parts[1] = "*"
    return plan.get(".".join(parts))


def split_layer(module: str) -> tuple[str | None, str]:
    """Split `layers.3.mlp.up` into `("3", "mlp.up")`; the index is None outside the layers.

    What a layer owns itself is inside "".
    """
    if not module.startswith("layers."):
        return None, module
    index, _, inside = module.removeprefix("layers.").partition(".")
    return index, inside
