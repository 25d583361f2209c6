"""What `keepwarm init` chooses for a first job, from the model, the corpora and the machine. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from keepwarm.launch.init.machine import Machine
from keepwarm.trainer.errors import DataError

REPLAYED = 0.1
"""Fraction of the samples that are replayed where a corpus for it is named."""
ANNEALED = 0.2
"""Fraction of the steps that the anneal has."""
STEPS_WITH_ANNEAL = 20
"""A run of fewer steps has one stage."""
_LONGEST = {"cpu": 256, "gpu": 4096}
_WINDOWS = 8
"""Samples that the smallest corpus gives at least, if the length of a sample can be chosen so."""
_SHORTEST = 16
_STEPS = 200
"""Steps that one pass should have."""
_CPU_SECONDS, _CPU_FLOPS = 600, 1e10
_BATCH_TOKENS = ((2e8, 2**18), (2e9, 2**19), (2e10, 2**20), (math.inf, 2**22))
"""Tokens of a batch, by the largest number of parameters that they are for."""
_PEAKS = ((2e7, 2e-3), (2e8, 6e-4), (5e8, 3e-4), (1.5e9, 2e-4), (4e9, 1.6e-4), (9e9, 1.2e-4), (math.inf, 1e-4))
"""Peak rates by the largest number of parameters, about those of GPT-3 (Brown et al., 2020) from 100 million on."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the choices follow from."""

    parameters: int
    continues: bool
    """The job starts from a model's weights."""
    max_sequence_length: int
    tokens: Mapping[str, int]
    """Of each training corpus, those for replay not among them."""
    smallest: int
    """Tokens of the smallest corpus of all."""
    replays: bool
    budget: int | None
    """Tokens that the user asks for."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The numbers of a first job."""

    sequence_length: int
    batch: int
    """Samples of a step."""
    steps: int
    anneal_steps: int
    """0: no anneal."""
    peak: float
    passes: float
    """How often the corpora are seen."""
    is_short: bool
    """The budget was cut to what a CPU trains on in minutes."""

    @property
    def step_tokens(self) -> int:
        return self.batch * self.sequence_length


def choose(wanted: Wanted, machine: Machine) -> Choices:
    """Return the choices for a job.

    Raises:
        DataError: the corpora are too small for a single sample.
    """
    length = _sequence_length(wanted, machine)
    corpus = sum(wanted.tokens.values())
    one_pass = int(corpus / (1 - REPLAYED)) if wanted.replays else corpus
    most = one_pass if machine.gpus else min(one_pass, _trained_on_cpu(wanted.parameters, machine.threads))
    budget = max(length, wanted.budget or most)
    batch = _batch(wanted.parameters, length, budget, machine)
    steps = max(1, round(budget / (batch * length)))
    peak = _by_size(_PEAKS, wanted.parameters) / (2 if wanted.continues else 1)
    return Choices(
        sequence_length=length,
        batch=batch,
        steps=steps,
        anneal_steps=round(ANNEALED * steps) if steps >= STEPS_WITH_ANNEAL else 0,
        peak=peak,
        passes=steps * batch * length / one_pass,
        is_short=wanted.budget is None and most < one_pass,
    )


def longest_sample(machine: Machine) -> int:
    """Return the most tokens that a sample has on such a machine, if the model takes as many."""
    return _LONGEST["gpu" if machine.gpus else "cpu"]


def _sequence_length(wanted: Wanted, machine: Machine) -> int:
    """Return the largest power of two that the model takes and of which the smallest corpus has several samples."""
    if wanted.smallest <= min(_SHORTEST, wanted.max_sequence_length):
        raise DataError(f"a corpus of {wanted.smallest} tokens is too small to train on; give more text")
    longest = min(longest_sample(machine), wanted.max_sequence_length)
    fitting = min(longest, max(_SHORTEST, (wanted.smallest - 1) // _WINDOWS))
    return int(2 ** math.floor(math.log2(min(fitting, wanted.smallest - 1, longest))))


def _batch(parameters: int, length: int, budget: int, machine: Machine) -> int:
    """Return the samples of a step: so many for each GPU, or eight on a CPU, doubled as long as steps are left."""
    unit = machine.gpus or 8
    aim = min(_by_size(_BATCH_TOKENS, parameters) if machine.gpus else unit * length, budget / _STEPS)
    batch = unit
    while 2 * batch * length <= aim:
        batch *= 2
    return batch


def _trained_on_cpu(parameters: int, threads: int) -> int:
    """Return the tokens that so many cores train on in about ten minutes, at 10 GFLOP/s each."""
    return int(_CPU_SECONDS * _CPU_FLOPS * threads / (6 * max(1, parameters)))


def _by_size(table: tuple[tuple[float, float], ...], parameters: int) -> float:
    return next(value for most, value in table if parameters <= most)
