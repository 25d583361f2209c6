"""A run saved in one layout trains on in another as the uninterrupted run of that other layout, through files."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import parity
from tests.support.parity import Case, Outcome
from tests.support.ranks import run_ranks
from tests.support.runs.legs import train_leg

pytestmark = pytest.mark.dist

STOP, END = 3, 6
COMMON = {"tied": True, "clipped": True, "optimizer": "adamw"}


def case(tensor: int, pipeline: int, data: int, **fields: object) -> Case:
    return Case(tensor=tensor, pipeline=pipeline, data=data, **COMMON, **fields)  # type: ignore[arg-type]


PAIRS = [
    (case(1, 1, 2), case(1, 1, 2)),
    (case(2, 1, 1), case(1, 2, 1)),
    pytest.param((case(1, 2, 2), case(2, 1, 1, sequence=True)), marks=pytest.mark.long),
    pytest.param((case(2, 2, 1), case(1, 1, 4, data_mode="hsdp")), marks=pytest.mark.long),
    pytest.param((case(1, 1, 4, data_mode="ddp"), case(1, 2, 2, schedule="zero_bubble")), marks=pytest.mark.long),
    pytest.param((case(1, 2, 1, schedule="interleaved"), case(2, 1, 2)), marks=pytest.mark.long),
    pytest.param((case(2, 2, 2), case(1, 1, 1)), marks=pytest.mark.long),
    pytest.param((case(2, 2, 2, sequence=True), case(2, 2, 2, sequence=True)), marks=pytest.mark.long),
]


def _run(of: Case, steps: range, root: Path) -> Outcome:
    ranks = run_ranks(of.world_size, train_leg, of, steps, root, deadline=200.0)
    return Outcome(ranks[0][0], parity.assemble([shards for _, shards in ranks]))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-to-{pair[1]}")
def test_reshard_saved_run_trains_on_as_uninterrupted_target(pair: tuple[Case, Case], tmp_path: Path) -> None:
    source, target = pair
    whole = parity.run_case(target, steps=range(END))
    half = _run(source, range(STOP), tmp_path)
    rest = _run(target, range(STOP, END), tmp_path)
    # fp64: 1e-9 relative of losses, norms and weights.
    assert parity.violations(target, whole, Outcome(half.steps + rest.steps, rest.state)) == []
    assert rest.state["optimizer.step"] == END
    if source == target:
        assert half.steps + rest.steps == whole.steps
        assert parity.differing(rest.state, whole.state) == []


def test_reshard_lost_moment_is_detected(tmp_path: Path) -> None:
    """The comparison has teeth: the target with fresh moments is not the uninterrupted run."""
    target = replace(PAIRS[0][1])  # type: ignore[index]
    whole = parity.run_case(target, steps=range(END))
    half = parity.run_case(target, steps=range(STOP))
    spoilt = {name: t.zero_() if "exp_avg." in name else t for name, t in half.state.items()}
    rest = parity.run_case(target, steps=range(STOP, END), start=spoilt)
    assert parity.violations(target, whole, Outcome(half.steps + rest.steps, rest.state)) != []
