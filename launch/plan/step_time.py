"""Estimated time of a training step on GPUs, part by part. Pure and torch-free.

A roofline: floating-point operations over the share of the peak that matrix products reach, bytes over the share of the
bandwidth that each kind of traffic reaches. The shares are fitted to published runs, see docs/planner.md.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from math import log2, prod
from typing import Literal

from keepwarm.parallel.cards import Card
from keepwarm.parallel.mesh.layout import split_layers
from keepwarm.parallel.native.memory import shard_size
from keepwarm.parallel.spec import ParallelSpec
from keepwarm.trainer.job.estimate import attended, longest_sequence, total_parameters
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.model.shapes import local_shape, parameter_shapes

Recompute = Literal["none", "selective", "full"]
_WIDTH = 2
"""Bytes of a weight or an activation in bf16."""
_GRADIENT_WIDTH = 4
_OPTIMIZER_TRAFFIC = 36
"""Bytes that AdamW moves for each stored element: gradient, master weight and moments in fp32, and the bf16 copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Shares of what a card promises that training reaches. Without unit unless stated."""

    matrices: float
    """Of the peak, by products of large matrices."""
    attention: float
    """Of the peak, by attention's own products."""
    elementwise: float
    """Times that counted activations are moved for norms, RoPE, activations and residuals, in compiled layers."""
    eager: float
    """The same in layers that are not compiled, relative to those that are."""
    link: float
    network: float
    jitter: float
    """Growth of a step with each doubling of the number of nodes."""
    overlap: float = 0.7
    """Share of computation behind which collectives of the data axis hide."""
    small: float = 100.0
    """Smaller side of a matrix whose product reaches half of `matrices`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a search varies of a job."""

    parallel: ParallelSpec
    micro_batch_size: int
    recompute: Recompute


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step by what they are spent on."""

    matrices: float
    attention: float
    elementwise: float
    recompute: float
    tensor: float
    """Collectives of the tensor axis."""
    bubble: float
    """Waiting for the first and last micro-batches of a pipeline."""
    stages: float
    """Messages between pipeline stages."""
    data: float
    """Collectives of the data axis that do not hide behind computation."""
    optimizer: float
    jitter: float
    """Waiting for the slowest of many nodes."""

    @property
    def total(self) -> float:
        computing = self.matrices + self.attention + self.elementwise + self.recompute + self.optimizer
        return computing + self.tensor + self.stages + self.data + self.bubble + self.jitter

    @property
    def largest_loss(self) -> str:
        """Return the part that takes longest beside the products that training consists of."""
        losses = [part.name for part in fields(self) if part.name not in ("matrices", "attention")]
        return max(losses, key=lambda name: float(getattr(self, name)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layer:
    """Seconds of the parts of a layer, for one micro-batch on one rank."""

    matrices: float
    attention: float
    elementwise: float
    again: float
    """What is recomputed."""
    tensor: float

    @property
    def total(self) -> float:
        """Return seconds forward and backward; attention's backward takes 2.5 times as long as its forward."""
        return 3 * self.matrices + 3.5 * self.attention + 3 * self.elementwise + self.again + self.tensor


class Sizes:
    """Sizes of a job's model, as far as they determine the time of a step; its layout makes no difference."""

    def __init__(self, job: JobSpec) -> None:
        self.job, self.model = job, job.model
        self.sequence = longest_sequence(job)
        self._matrices: dict[int, tuple[tuple[tuple[int, ...], ...], int]] = {}

    def matrices(self, tensor: int) -> tuple[tuple[int, ...], ...]:
        """Return the sizes of a layer's matrices as a tensor rank holds them."""
        return self._of(tensor)[0]

    def elements(self, parallel: ParallelSpec) -> float:
        """Return the elements of a rank before the data axis divides them, on average over the pipeline."""
        layers = self._of(parallel.tensor)[1] * self.model.layers
        return (layers + self._outside / parallel.tensor) / parallel.pipeline

    def moved(self, parallel: ParallelSpec) -> float:
        """Return the elements that a layer's element-wise operations read and write for each token."""
        hidden, ffn = self.model.hidden_size, self.model.ffn_size
        between = hidden / (parallel.tensor if parallel.sequence else 1)
        return 10 * between + ((6 if self.model.has_gate else 3) * ffn + 6 * hidden) / parallel.tensor

    @cached_property
    def attended(self) -> float:
        """Mean over the layers of `keepwarm.trainer.job.estimate.attended`."""
        layers = range(self.model.layers)
        return sum(attended(self.model, layer, self.sequence) for layer in layers) / len(layers)

    @cached_property
    def _outside(self) -> int:
        """Number of parameters outside the layers' matrices."""
        return total_parameters(self.model) - self.model.layers * self._of(1)[1]

    def _of(self, tensor: int) -> tuple[tuple[tuple[int, ...], ...], int]:
        if tensor not in self._matrices:
            shapes = parameter_shapes(self.model, range(1), embed=False, head=False)
            local = (local_shape(name, at, self.model, tensor) for name, at in shapes.items() if len(at) == 2)
            sizes = tuple(local)
            self._matrices[tensor] = sizes, sum(map(prod, sizes))
        return self._matrices[tensor]


class StepModel:
    """Times of the steps of one job on one kind of card, for any layout."""

    def __init__(self, sizes: Sizes, card: Card, efficiency: Efficiency) -> None:
        self._sizes, self._card, self._share = sizes, card, efficiency
        self._job, self._model, self._sequence = sizes.job, sizes.model, sizes.sequence
        self._peak = card.tflops * 1e12

    def time(self, choice: Choice) -> StepTime:
        """Return the time of a step in the last steps of a batch-size ramp."""
        job, card, share, parallel = self._job, self._card, self._share, choice.parallel
        micro_batches = job.batch.global_batch_size // (parallel.data * choice.micro_batch_size)
        tokens = choice.micro_batch_size * self._sequence
        layer = self._layer(choice, tokens)
        layers, heads = self._slowest(parallel, layer.total, self._head(parallel, tokens))
        head, per_rank = heads * self._head(parallel, tokens), parallel.stages // parallel.pipeline
        waits = (parallel.pipeline - 1) / per_rank * (0.5 if parallel.schedule == "zero_bubble" else 1.0)
        stored = self._sizes.elements(parallel) / shard_size(parallel)
        parts = {
            "matrices": micro_batches * (layers * 3 * layer.matrices + head),
            "attention": micro_batches * layers * 3.5 * layer.attention,
            "elementwise": micro_batches * layers * 3 * layer.elementwise,
            "recompute": micro_batches * layers * layer.again,
            "tensor": micro_batches * layers * layer.tensor,
            "bubble": waits * self._model.layers / parallel.pipeline * layer.total,
            "stages": micro_batches * per_rank * self._message(parallel, tokens),
            "data": self._data(parallel, micro_batches, micro_batches * (layers * layer.total + head)),
            "optimizer": stored * _OPTIMIZER_TRAFFIC / card.memory_bandwidth,
        }
        nodes = parallel.data * parallel.pipeline * parallel.tensor / card.per_node
        return StepTime(**parts, jitter=sum(parts.values()) * share.jitter * log2(max(1.0, nodes)))

    def tokens_per_s(self, choice: Choice) -> float:
        """Return tokens per second and card."""
        ranks = choice.parallel.data * choice.parallel.pipeline * choice.parallel.tensor
        return self._job.batch.global_batch_size * self._sequence / self.time(choice).total / ranks

    def _layer(self, choice: Choice, tokens: int) -> _Layer:
        share, tensor = self._share, choice.parallel.tensor
        speed = self._peak * share.matrices
        matrices = sum(2 * tokens * prod(size) * (1 + share.small / min(size)) for size in self._sizes.matrices(tensor))
        moved = self._sizes.moved(choice.parallel) * (1.0 if self._job.numerics.compile else share.eager)
        once = _Layer(
            matrices=matrices / speed,
            attention=2 * tokens * self._sizes.attended / tensor / (self._peak * share.attention),
            elementwise=tokens * moved * _WIDTH * share.elementwise / self._card.memory_bandwidth,
            again=0.0,
            tensor=0.0,
        )
        forward = once.matrices + once.attention + once.elementwise
        again = {"none": 0.0, "selective": once.attention, "full": forward}[choice.recompute]
        # An all-reduce, or what it consists of, around attention and around the MLP: Korthikanti et al. (2022).
        passes = 3 if choice.recompute == "full" else 2
        collective = 2 * (tensor - 1) / tensor * tokens * self._model.hidden_size * _WIDTH
        return _Layer(
            matrices=once.matrices, attention=once.attention, elementwise=once.elementwise, again=again,
            tensor=passes * 2 * collective / (self._card.link * share.link),
        )  # fmt: skip

    def _slowest(self, parallel: ParallelSpec, layer: float, head: float) -> tuple[int, int]:
        """Return how many layers and heads the pipeline rank has that sets the pace, from the seconds of each."""
        parts = [len(part) for part in split_layers(self._model.layers, parallel)]
        loads = [sum(parts[at :: parallel.pipeline]) for at in range(parallel.pipeline)]
        if loads[-1] * layer + head >= max(loads) * layer:
            return loads[-1], 1
        return max(loads), 0

    def _head(self, parallel: ParallelSpec, tokens: int) -> float:
        """Return seconds of the projection to the vocabulary, forward and backward."""
        products = 6 * tokens * self._model.vocabulary_size * self._model.hidden_size / parallel.tensor
        return products / (self._peak * self._share.matrices)

    def _message(self, parallel: ParallelSpec, tokens: int) -> float:
        """Return seconds of sending the input of a stage forward and its gradient backward."""
        if parallel.pipeline == 1:
            return 0.0
        size = tokens * self._model.hidden_size * _WIDTH / parallel.tensor
        return 2 * size / (self._card.network * self._share.network)

    def _data(self, parallel: ParallelSpec, micro_batches: int, computing: float) -> float:
        """Return the seconds of the data axis' collectives that computation does not hide."""
        size, copies = shard_size(parallel), parallel.data // shard_size(parallel)
        stored = self._sizes.elements(parallel)
        seconds = 0.0
        if copies > 1:
            reduced = 2 * (copies - 1) / copies * stored / size * _GRADIENT_WIDTH
            seconds = reduced / self._bandwidth(parallel, copies, size)
        if size == 1:
            return seconds  # after the last backward
        gathers = 1 if parallel.reshard_after_forward is False else 2 * micro_batches
        reductions = micro_batches if parallel.accumulate == "sharded" else 1
        moved = (size - 1) / size * stored * (_WIDTH * gathers + _GRADIENT_WIDTH * reductions)
        seconds += moved / self._bandwidth(parallel, size, 1)
        # The first gather and the last reduction have nothing to hide behind.
        return max(seconds - self._share.overlap * computing, seconds / (self._model.layers * micro_batches))

    def _bandwidth(self, parallel: ParallelSpec, ranks: int, distance: int) -> float:
        """Return bytes per second of a rank in a collective of so many replicas, each `distance` replicas apart.

        Rings run through all cards that a node has of a group, so that these share their network cards.
        """
        beside = max(1, self._card.per_node // (parallel.tensor * parallel.pipeline * distance))
        if beside >= ranks:
            return self._card.link * self._share.link
        return self._card.network * self._share.network * beside
