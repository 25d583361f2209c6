"""Any layout loads what any other has written, to the bit: weights, moments, counter and ledger. On files alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.checkpoint import checkpoint
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.model.spec import ModelSpec
from tests.support.corpus import counting_source
from tests.support.layouts import Case, State, shards_of, whole_state, write_checkpoint

MODEL = ModelSpec(
    layers=4,
    hidden_size=20,
    heads=4,
    head_dim=4,
    ffn_size=12,
    vocabulary_size=24,
    max_sequence_length=8,
    qk_norm="projection",
    attention_output_bias=True,
    tied_embeddings=True,
)


def layout(tensor: int, pipeline: int, data: int, flat: bool = False, **options: Any) -> Case:
    return Case(spec=ParallelSpec(tensor=tensor, pipeline=pipeline, data=data, **options), flat=flat)


LAYOUTS = {
    "1x1x1": layout(1, 1, 1),
    "tensor-4": layout(4, 1, 1),
    "pipeline-4": layout(1, 4, 1),
    "pipeline-2-interleaved": layout(1, 2, 1, schedule="interleaved"),
    "data-3": layout(1, 1, 3),
    "data-3-replicated": layout(1, 1, 3, data_mode="ddp"),
    "data-4-hybrid": layout(1, 1, 4, data_mode="hsdp", shard_size=2),
    "2x2x1-uneven-stages": layout(2, 2, 1, layer_split=(3, 1)),
    "2x1x3": layout(2, 1, 3),
    "1x2x2-zero-bubble": layout(1, 2, 2, schedule="zero_bubble"),
    "2x2x2": layout(2, 2, 2),
    "2x1x2-flat": layout(2, 1, 2, flat=True, data_mode="ddp"),
}


def ledger() -> Ledger:
    sources = {name: counting_source(name, size, first=size) for name, size in (("a", 7), ("b", 50))}
    opened = Ledger(seed=1).opened({"a": 3.0, "b": 1.0}, sources, start=0).opened({"b": 1.0}, sources, start=20)
    return opened.advanced(33)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, dict[str, Path]]:
    root, state = tmp_path_factory.mktemp("layouts"), whole_state(MODEL, seed=5)
    meta: dict[str, object] = {"ledger": ledger().save()}
    return state, {name: write_checkpoint(root / name, MODEL, case, state, meta) for name, case in LAYOUTS.items()}


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_reshard_every_layout_loads_every_other(
    written: tuple[State, dict[str, Path]], source: str, target: str
) -> None:
    state, folders = written
    case, held = LAYOUTS[target], set()
    for rank in range(case.layout.world_size):
        shards = shards_of(rank, MODEL, case, None)
        meta = checkpoint.load(folders[source], shards)
        assert Ledger.load(meta["ledger"]) == ledger()
        expected = shards_of(rank, MODEL, case, state)
        for name, shard in shards.items():
            assert torch.equal(shard.local, expected[name].local), f"rank {rank}: {name}"
        held |= set(shards)
    assert held == set(state)


def test_reshard_ranks_of_a_layout_write_every_element_once(written: tuple[State, dict[str, Path]]) -> None:
    from keepwarm.ft.format import publication

    state, folders = written
    for name, folder in folders.items():
        elements: dict[str, int] = {}
        for part in publication.verify(folder).parts:
            for entry in part.entries:
                elements[entry.piece.name] = elements.get(entry.piece.name, 0) + entry.piece.elements
        assert elements == {tensor: values.numel() for tensor, values in state.items()}, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["2x2x2", "2x1x2-flat", "data-3"])
def test_reshard_weights_only_leaves_optimizer_unchanged(
    written: tuple[State, dict[str, Path]], source: str, dtype: torch.dtype
) -> None:
    state, folders = written
    case = LAYOUTS["2x1x3"]
    for rank in range(case.layout.world_size):
        shards = shards_of(rank, MODEL, case, {name: torch.full_like(tensor, 9) for name, tensor in state.items()})
        for shard in shards.values():
            if shard.name.startswith("model."):
                object.__setattr__(shard, "local", shard.local.to(dtype))
        meta = checkpoint.load_weights(folders[source], shards)
        assert Ledger.load(meta["ledger"]) == ledger()
        expected = shards_of(rank, MODEL, case, state)
        for name, shard in shards.items():
            wanted = expected[name].local.to(dtype) if name.startswith("model.") else torch.full_like(shard.local, 9)
            assert torch.equal(shard.local, wanted), f"rank {rank}: {name}"
