"""The model checker finds defects that are planted into the protocol."""

import pytest

from tests.model_checker import history
from tests.model_checker.killers import KILLERS
from tests.model_checker.mutants import MUTANTS, Edit, Mutant, NoPlace

TRIES = 400
"""Histories in which a defect has to show."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_breaks_a_promise_that_the_protocol_keeps(mutant: Mutant) -> None:
    killers = (
        seed
        for seed in (*KILLERS.get(mutant.name, ()), *range(TRIES))
        if broken(mutant, seed) and not history.run(seed).promise
    )
    assert next(killers, None) is not None, f"{mutant} survives {TRIES} histories"


def test_mutant_whose_text_is_gone_fails_loudly() -> None:
    gone = Mutant("gone", (Edit("step", "this is not there", ""), Edit("no_such_function", "pass", "")))
    with pytest.raises(NoPlace), gone.planted():
        pass


def test_protocol_is_as_before_after_a_mutant() -> None:
    before = history.run(3, 60)
    with MUTANTS[0].planted():
        pass
    assert history.run(3, 60) == before


def broken(mutant: Mutant, seed: int) -> str:
    """Return the promise that a history breaks with the defect, or "" if none."""
    with mutant.planted():
        history.forget()
        try:
            return history.run(seed).promise
        finally:
            history.forget()
