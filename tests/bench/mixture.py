"""What a mixture of 200 sources with 25 % power-law replay costs, against one source: samples per second of the loader,
and the share of a training step.

Prints one JSON object. The two are drawn in turn, in the same process, so that a slow moment meets both; medians.

    python tests/bench/mixture.py
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from keepwarm.parallel.mesh.layout import Layout
from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.ledger import Ledger
from keepwarm.trainer.data.loader import BatchLoader, RankShare
from keepwarm.trainer.data.packing import PackedSource
from keepwarm.trainer.data.spec import ReplaySpec
from keepwarm.trainer.data.token_format import TokenFileWriter

SOURCES, LENGTH, BATCH, WARM, STEPS = 200, 256, 64, 5, 60
STEP_SECONDS = BATCH * LENGTH / 8900
"""Of a step of 1.3M parameters on one core (8,900 tokens a second), the smallest model for which speed was measured."""


def write(folder: Path, index: int) -> PackedSource:
    prefix = folder / f"source-{index}"
    rng = np.random.default_rng(index)
    with TokenFileWriter(Path(f"{prefix}.bin"), np.uint16) as writer:
        for _ in range(40):
            document = rng.integers(0, 30_000, 2000)
            writer.add_document(document, [len(document)])
        writer.finish(Path(f"{prefix}.idx"))
    return PackedSource(f"s{index}", TokenFile(prefix), LENGTH)


def loader_of(sources: list[PackedSource], *, replay: bool) -> BatchLoader:
    layout = Layout(data=1, pipeline=1, tensor=1, ranks_per_node=1)
    named = {source.name: source for source in sources}
    loader = BatchLoader(
        named, Ledger(seed=1), RankShare(layout=layout, rank=0, micro_batch_size=8), global_size_at=lambda _: BATCH
    )
    mixture = {name: 1.0 + index % 7 for index, name in enumerate(named)}
    loader.open_segment(mixture, stage="first")
    if replay:
        for _ in range(WARM):
            loader.next_batch()
        clause = ReplaySpec(fraction=0.25, distribution="power", exponent=0.5)
        loader.open_segment(mixture, stage="second", replay=[clause])
    return loader


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        sources = [write(Path(folder), index) for index in range(SOURCES)]
        loaders = {"one": loader_of(sources[:1], replay=False), "many": loader_of(sources, replay=True)}
        seconds: dict[str, list[float]] = {name: [] for name in loaders}
        for step in range(WARM + STEPS):
            for name, loader in loaders.items():
                loader.close()  # nothing is read ahead: the next batch is made from the beginning
                began = time.perf_counter()
                loader.next_batch()
                if step >= WARM:
                    seconds[name].append(time.perf_counter() - began)
        for loader in loaders.values():
            loader.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    extra = medians["many"] - medians["one"]
    print(
        json.dumps(
            {
                "sources": SOURCES,
                "samples_per_batch": BATCH,
                "seconds_per_batch": medians,
                "samples_per_second": {name: BATCH / value for name, value in medians.items()},
                "ratio": medians["many"] / medians["one"],
                "extra_share_of_a_step": extra / STEP_SECONDS,
            }
        )
    )


if __name__ == "__main__":
    main()
