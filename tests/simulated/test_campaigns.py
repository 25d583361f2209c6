"""Real agents in virtual time keep what was committed through drawn faults, and the judge finds those that do not."""

from pathlib import Path

import pytest

from keepwarm.ft.protocol import kept_memory
from keepwarm.ft.protocol.state import State
from tests.simulated.agents import agents
from tests.simulated.campaign import KINDS, run
from tests.simulated.outcomes import Book, run_all, told
from tests.simulated.training import Training

DIALS_AT_ONCE = 511
FORGETFUL = 1
"""A campaign in which all agents die at once."""


def test_campaigns_of_a_slice_keep_every_promise() -> None:
    outcomes = [run(seed) for seed in range(24)]
    print(f"{len(outcomes)} campaigns, {sum(outcome.commits for outcome in outcomes)} commits")
    failed = [told(outcome) for outcome in outcomes if outcome.failure]
    assert not failed, "\n\n".join(failed)
    assert {kind for outcome in outcomes for kind in KINDS if any(f"{kind}:" in fault for fault in outcome.faults)} == (
        KINDS.keys()
    )


def test_agents_killed_while_an_epoch_is_decided_take_part_in_it_again() -> None:
    """The epoch is in their memory and has no choice, so the ranks ask for it once more."""
    with agents([((0, 1, 2), 1)]) as job:
        training = Training(job, wait=True)
        training.restart()
        assert job.timeline.run(lambda: training.committed > (0, 0), 60.0)
        job.machine.folder_until = job.timeline.now + 10.0
        training.restart()
        assert job.timeline.run(lambda: all(node.agent and node.agent.state.epoch == 2 for node in job.nodes), 60.0)
        for node in job.nodes:
            job.kill(node.slot)
        assert job.timeline.run(lambda: not training.restarting, 120.0), job.words()
        assert training.restores[-1] is not None


def test_agents_that_dial_each_other_at_once_stay_connected() -> None:
    """Two stood still, and one of them was cut off; they dial in the same moment, and each keeps the newest link."""
    outcome = run(DIALS_AT_ONCE)
    assert not outcome.failure, told(outcome)


def test_campaign_of_one_seed_is_the_same_twice() -> None:
    assert run(1) == run(1)


def test_campaigns_of_two_processes_are_kept_in_a_file_and_not_run_again(tmp_path: Path) -> None:
    file = tmp_path / "outcomes.jsonl"
    book = Book(7, 3, file)
    for outcome in run_all(run, book.missing()[:2], 2):
        book.add(outcome)
    with file.open("a") as more:
        more.write('{"seed":9,"faul')  # the machine went down in the middle of a line
    book = Book(7, 3, file)
    assert book.missing() == [9]
    for outcome in run_all(run, book.missing(), 1):
        book.add(outcome)
    assert Book(7, 3, file).words() == book.words()
    assert "3 of 3 campaigns, 0 failed;" in book.words()
    assert "go on with --first 10" in book.words()


def test_campaign_finds_agents_that_forget_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(empty: State, memory: object, alive: object) -> State:
        return empty

    monkeypatch.setattr(kept_memory, "resumed", nothing)
    outcome = run(FORGETFUL)
    assert "was committed, and epoch 2 chooses None" in outcome.failure


@pytest.mark.long
@pytest.mark.timeout(14_400)
def test_thousand_campaigns_keep_every_promise() -> None:
    failed = [told(outcome) for outcome in map(run, range(1000)) if outcome.failure]
    assert not failed, "\n\n".join(failed)
