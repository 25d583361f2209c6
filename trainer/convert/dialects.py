"""What parameters are called, and how they lie, in checkpoints of torchtitan and Megatron Core. Pure and torch-free.

A dialect says of which elements of whose tensors a canonical parameter consists, and the reverse. The optimizer's
moments lie like their parameters, under names that the dialect derives from these.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from keepwarm.trainer.convert.recipes import Recipe, Shape
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.shapes import parameter_shapes, split_layer
from keepwarm.trainer.model.spec import ModelSpec

Runs = tuple[tuple[str, int, int], ...]

STEP = "optimizer.step"
"""The optimizer's counter in a native checkpoint."""
COMMON = "common.pt"
"""File of Megatron Core's plain values in a checkpoint."""
MODEL = "model."
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A box of one of their tensors, and what of ours it is made of."""

    offsets: Shape
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class Theirs:
    """One tensor of a foreign checkpoint, in the chunks in which it is written."""

    name: str
    shape: Shape
    chunks: tuple[Chunk, ...]
    is_copy: bool = False
    """Another name for a tensor that is there already, which has no state of its own."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one program names and lays out its state."""

    into: Callable[[ModelSpec], list[Recipe]]
    """Canonical parameters out of their tensors."""
    out: Callable[[ModelSpec], list[Theirs]]
    """Their tensors out of canonical parameters."""
    moment: Callable[[str, str], str]
    """Their name of a moment of one of their parameters."""
    master: str | None = None
    """Prefix under which they keep weights of full precision beside those in use."""
    older: Callable[[str], str] | None = None
    """What earlier versions of their program called one of their parameters."""


def with_moments(recipes: list[Recipe], dialect: Dialect, found: tuple[str, ...]) -> list[Recipe]:
    """Recipes of the moments that are `found`, from those of the parameters; names are those of the native state."""
    made = []
    for moment in found:
        for recipe in recipes:
            runs = tuple((dialect.moment(moment, name), start, stop) for name, start, stop in recipe.runs)
            made.append(dataclasses.replace(recipe, name=f"optimizer.{moment}.{recipe.name}", runs=runs))
    return made


def as_found(dialect: Dialect, spec: ModelSpec, names: Collection[str]) -> Dialect:
    """Return the dialect, or that of earlier versions of its program if a checkpoint with these names is theirs."""
    older = dialect.older
    if older is None or not any(
        older(tensor.name) != tensor.name and older(tensor.name) in names for tensor in dialect.out(spec)
    ):
        return dialect

    def into(spec: ModelSpec) -> list[Recipe]:
        return [
            dataclasses.replace(recipe, runs=tuple((older(name), a, b) for name, a, b in recipe.runs))
            for recipe in dialect.into(spec)
        ]

    def out(spec: ModelSpec) -> list[Theirs]:
        return [dataclasses.replace(tensor, name=older(tensor.name)) for tensor in dialect.out(spec)]

    return dataclasses.replace(dialect, into=into, out=out, older=None)


def sections(tensors: list[Theirs], dialect: Dialect, moments: tuple[str, ...]) -> list[Theirs]:
    """Their weights and moments out of ours, by the names of the native state."""

    def of(prefix: str, tensor: Theirs, name: str) -> Theirs:
        chunks = tuple(
            dataclasses.replace(
                chunk,
                recipe=dataclasses.replace(
                    chunk.recipe, runs=tuple((prefix + source, a, b) for source, a, b in chunk.recipe.runs)
                ),
            )
            for chunk in tensor.chunks
        )
        return dataclasses.replace(tensor, name=name, chunks=chunks)

    made = [of(MODEL, tensor, tensor.name) for tensor in tensors]
    own = [tensor for tensor in tensors if not tensor.is_copy]
    for moment in moments:
        made += [of(f"optimizer.{moment}.", tensor, dialect.moment(moment, tensor.name)) for tensor in own]
    return made


# torchtitan's Llama 3 and Qwen 3

_TITAN_TOP = {"embedding": "tok_embeddings", "final_norm": "norm", "head": "lm_head"}
_TITAN_LAYER = {
    "attention_norm": "attention_norm",
    "attention.query": "attention.qkv_linear.wq",
    "attention.key": "attention.qkv_linear.wk",
    "attention.value": "attention.qkv_linear.wv",
    "attention.output": "attention.wo",
    "attention.query_norm": "attention.q_norm",
    "attention.key_norm": "attention.k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "feed_forward.w1",
    "mlp.down": "feed_forward.w2",
    "mlp.up": "feed_forward.w3",
}


def _check_titan(spec: ModelSpec) -> None:
    who = "torchtitan's Llama 3 and Qwen 3"
    if spec.qk_norm == "projection":
        raise SpecError(f"model.qk_norm = 'projection' cannot be expressed by {who}")
    _require(
        spec,
        who,
        norm="rms",
        norm_position="pre",
        activation="swiglu",
        position="rotary",
        rotary_fraction=1.0,
        sliding_window=None,
        parallel_residual=False,
        qkv_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        nope_layers=(),
    )
    if spec.qk_norm == "head":
        _check_scaling(spec, "torchtitan's Qwen 3")
    _check_scaling(spec, "torchtitan's Llama 3", "llama3")


def _titan_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    index, inside = split_layer(module)
    return f"{_TITAN_TOP[module]}.{kind}" if index is None else f"layers.{index}.{_TITAN_LAYER[inside]}.{kind}"


def _halves(rows: int, size: int, inverse: bool) -> Iterator[int]:
    """Source row of every row of a projection: features that rotate together stand side by side there, half a head
    apart here."""
    half = size // 2
    order = [2 * i + j for j in range(2) for i in range(half)]
    if inverse:
        order = [order.index(row) for row in range(size)]
    for head in range(rows // size):
        yield from (head * size + row for row in order)


def _titan_runs(name: str, shape: Shape, source: str, spec: ModelSpec, inverse: bool) -> Runs:
    # Qwen 3 turns the same features here and there.
    if spec.qk_norm == "head" or not name.endswith(("attention.query.weight", "attention.key.weight")):
        return ((source, 0, math.prod(shape)),)
    width = shape[1]
    rows = _halves(shape[0], spec.size_per_head, inverse)
    return tuple((source, row * width, (row + 1) * width) for row in rows)


def _titan_into(spec: ModelSpec) -> list[Recipe]:
    _check_titan(spec)
    return [
        Recipe(name=name, shape=shape, runs=_titan_runs(name, shape, _titan_name(name), spec, False))
        for name, shape in parameter_shapes(spec).items()
    ]


def _titan_out(spec: ModelSpec) -> list[Theirs]:
    _check_titan(spec)
    made = [
        whole(Recipe(name=_titan_name(name), shape=shape, runs=_titan_runs(name, shape, name, spec, True)))
        for name, shape in parameter_shapes(spec).items()
    ]
    if spec.tied_embeddings:
        (tied,) = made[0].chunks
        head = dataclasses.replace(tied.recipe, name=_titan_name("head.weight"))
        made.append(dataclasses.replace(whole(head), is_copy=True))
    return made


def _titan_before_0_3(name: str) -> str:
    return name.replace(".qkv_linear.", ".").replace("lm_head.", "output.")


# Megatron Core's GPTModel

_MEGATRON_TOP = {
    "embedding": "embedding.word_embeddings.",
    "positions": "embedding.position_embeddings.",
    "final_norm": "decoder.final_layernorm.",
    "head": "output_layer.",
}
_MEGATRON_LAYER = {
    "attention_norm": "self_attention.linear_qkv.layer_norm_",
    "attention.output": "self_attention.linear_proj.",
    "attention.query_norm": "self_attention.q_layernorm.",
    "attention.key_norm": "self_attention.k_layernorm.",
    "mlp_norm": "mlp.linear_fc1.layer_norm_",
    "mlp.down": "mlp.linear_fc2.",
}
_QKV = ("attention.query", "attention.key", "attention.value")


def _check_megatron(spec: ModelSpec) -> None:
    _require(spec, "Megatron Core's GPTModel", norm_position="pre", sliding_window=None, parallel_residual=False)
    _require(spec, "Megatron Core's GPTModel", nope_layers=())
    _check_scaling(spec, "Megatron Core's GPTModel", "llama3", "yarn", "linear")
    if spec.qk_norm == "projection":
        raise SpecError("model.qk_norm = 'projection' cannot be expressed by Megatron Core's GPTModel")
    biases = {spec.attention_output_bias, spec.mlp_bias}
    if len(biases) > 1 or (spec.mlp_bias and not spec.qkv_bias):
        raise SpecError(
            "model.attention_output_bias and model.mlp_bias must be equal for Megatron Core's GPTModel, and qkv_bias "
            "with them: it has add_bias_linear for all, add_qkv_bias for the projections alone"
        )


def _fused_qkv(spec: ModelSpec, width: int) -> Iterator[tuple[int, int, int]]:
    """(projection, first element, last + 1) as they lie in the fused tensor: a group's queries, its key and value."""
    size, groups = spec.size_per_head * width, spec.key_value_heads
    queries = spec.heads // groups * size
    for group in range(groups):
        yield 0, group * queries, (group + 1) * queries
        yield 1, group * size, (group + 1) * size
        yield 2, group * size, (group + 1) * size


def _megatron_layer(spec: ModelSpec, index: int) -> Iterator[Recipe]:
    """Tensors of one layer out of canonical parameters; their names are without the prefix of the layer."""
    prefix = f"layers.{index}."
    mine = {
        name.removeprefix(prefix): shape for name, shape in parameter_shapes(spec).items() if name.startswith(prefix)
    }
    for name, shape in mine.items():
        module, _, kind = name.rpartition(".")
        if module == _QKV[0]:
            width = shape[1] if len(shape) == 2 else 1
            rows = sum(mine[f"{projection}.{kind}"][0] for projection in _QKV)
            runs = tuple((f"{prefix}{_QKV[p]}.{kind}", a, b) for p, a, b in _fused_qkv(spec, width))
            yield Recipe(name=f"self_attention.linear_qkv.{kind}", shape=(rows, *shape[1:]), runs=runs)
        elif module in ("mlp.gate", "mlp.up"):
            if module == "mlp.up" and spec.activation == "swiglu":
                continue
            modules = ("mlp.gate", "mlp.up") if module == "mlp.gate" else ("mlp.up",)
            runs = tuple((f"{prefix}{one}.{kind}", 0, math.prod(shape)) for one in modules)
            yield Recipe(name=f"mlp.linear_fc1.{kind}", shape=(len(modules) * shape[0], *shape[1:]), runs=runs)
        elif module in _MEGATRON_LAYER:
            theirs = f"{_MEGATRON_LAYER[module]}{kind}"
            yield Recipe(name=theirs, shape=shape, runs=((prefix + name, 0, math.prod(shape)),))


def _megatron_out(spec: ModelSpec) -> list[Theirs]:
    """Layers of all indices lie in one tensor each, along a first dim: a chunk is one layer."""
    _check_megatron(spec)
    made = []
    for name, shape in parameter_shapes(spec).items():
        module, _, kind = name.rpartition(".")
        if module in _MEGATRON_TOP:
            theirs = f"{_MEGATRON_TOP[module]}{kind}"
            made.append(whole(Recipe(name=theirs, shape=shape, runs=((name, 0, math.prod(shape)),))))
    layers = [list(_megatron_layer(spec, index)) for index in range(spec.layers)]
    for same in zip(*layers, strict=True):
        shape = (spec.layers, *same[0].shape)
        chunks = tuple(
            Chunk(offsets=(index, *(0,) * len(recipe.shape)), recipe=dataclasses.replace(recipe, shape=(1, *shape[1:])))
            for index, recipe in enumerate(same)
        )
        made.append(Theirs(name=f"decoder.layers.{same[0].name}", shape=shape, chunks=chunks))
    return made


def _megatron_into(spec: ModelSpec) -> list[Recipe]:
    """The inverse of `_megatron_out`: where each run of theirs came from is where ours is found."""
    _check_megatron(spec)
    return _inverse(_megatron_out(spec), parameter_shapes(spec))


def _inverse(theirs: list[Theirs], shapes: Mapping[str, Shape]) -> list[Recipe]:
    found: dict[str, list[tuple[int, str, int, int]]] = {name: [] for name in shapes}
    for tensor in theirs:
        at = 0
        for chunk in tensor.chunks:
            for name, start, stop in chunk.recipe.runs:
                found[name].append((start, tensor.name, at, at + stop - start))
                at += stop - start
    made = []
    for name, shape in shapes.items():
        ordered = sorted(found[name])
        ends = list(itertools.accumulate(stop - start for _, _, start, stop in ordered))
        if [start for start, *_ in ordered] != [0, *ends[:-1]] or ends[-1] != math.prod(shape):
            raise AssertionError(f"{name} is not covered by {ordered[:3]}")
        made.append(Recipe(name=name, shape=shape, runs=tuple((source, a, b) for _, source, a, b in ordered)))
    return made


def per_layer(recipes: list[Recipe], spec: ModelSpec) -> list[Recipe]:
    """Recipes for Megatron checkpoints whose layers lie in tensors of their own (`non_homogeneous_layers`)."""
    shapes = {tensor.name: tensor.shape for tensor in _megatron_out(spec)}
    made = []
    for recipe in recipes:
        runs = []
        for name, start, stop in recipe.runs:
            if name.startswith("decoder.layers."):
                each = math.prod(shapes[name][1:])
                index = start // each
                name = name.replace("decoder.layers.", f"decoder.layers.{index}.")
                start, stop = start - index * each, stop - index * each
            runs.append((name, start, stop))
        made.append(dataclasses.replace(recipe, runs=tuple(runs)))
    return made


def whole(recipe: Recipe) -> Theirs:
    """A tensor of theirs in one chunk."""
    chunk = Chunk(offsets=(0,) * len(recipe.shape), recipe=recipe)
    return Theirs(name=recipe.name, shape=recipe.shape, chunks=(chunk,))


def _require(spec: ModelSpec, who: str, **fields: object) -> None:
    for name, wanted in fields.items():
        if getattr(spec, name) != wanted:
            raise SpecError(f"model.{name} = {getattr(spec, name)!r} cannot be expressed by {who}")


def _check_scaling(spec: ModelSpec, who: str, *types: str) -> None:
    """Their programs take the frequencies from their own options, of which some can be those of the spec."""
    if spec.rope_scaling is not None and spec.rope_scaling.type not in types:
        raise SpecError(f"model.rope_scaling.type = {spec.rope_scaling.type!r} cannot be expressed by {who}")


def _own(spec: ModelSpec) -> list[Theirs]:
    return [
        whole(Recipe(name=MODEL + name, shape=shape, runs=((name, 0, math.prod(shape)),)))
        for name, shape in parameter_shapes(spec).items()
    ]


DIALECTS: Mapping[str, Dialect] = {
    "dcp": Dialect(
        into=lambda spec: _inverse(_own(spec), parameter_shapes(spec)),
        out=_own,
        moment=lambda moment, name: f"optimizer.{moment}.{name.removeprefix(MODEL)}",
    ),
    "torchtitan": Dialect(
        into=_titan_into,
        out=_titan_out,
        moment=lambda moment, name: f"optimizer.state.{name}.{moment}",
        older=_titan_before_0_3,
    ),
    "megatron": Dialect(
        into=_megatron_into,
        out=_megatron_out,
        moment=lambda moment, name: f"optimizer.state.{moment}.{name}",
        master="optimizer.state.fp32_param.",
    ),
}
"""By the name of the format on the command line."""
