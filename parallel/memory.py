"""Memory held by a rank, and the figures from which an engine estimates it. Pure and torch-free."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod

from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEstimate:
    """Estimated memory of one rank, in bytes unless stated otherwise."""

    parameters: int
    """Number of parameter elements that the rank stores between steps."""
    weights: int
    """Stored weights (fp32 masters under bf16) plus the weights gathered for computation at the same time."""
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes of all four categories."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The last norm and the projection to the vocabulary, for one micro-batch on one rank."""

    tokens: int
    hidden_size: int
    vocabulary: int
    """Number of columns of the projection that the tensor axis leaves to a rank."""
    chunk: int
    """Number of tokens whose logits keepwarm's own head computes at once."""

    def bytes_in_chunks(self, compute: int) -> int:
        """Return the bytes of the norm's input and output, and of one chunk of logits with its gradient."""
        return self._norm(compute) + self.chunk * self.vocabulary * (compute + max(4, compute))

    def bytes_at_once(self, compute: int) -> int:
        """Return the bytes of the norm's input and output, all logits, and their fp32 exponentials and gradient."""
        return self._norm(compute) + self.tokens * self.vocabulary * (compute + 3 * 4)

    def weight_gradient(self, compute: int) -> int:
        """Return the bytes of the projection's gradient while chunks add to it: the sum, and one chunk's part."""
        if self.tokens <= self.chunk:
            return self.hidden_size * self.vocabulary * compute
        return self.hidden_size * self.vocabulary * (compute + max(4, compute))

    def _norm(self, compute: int) -> int:
        return 2 * self.tokens * self.hidden_size * compute


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The work of every rank at one pipeline coordinate, as far as it determines memory."""

    parallel: ParallelSpec
    optimizer: OptimizerSpec
    numerics: NumericsSpec
    stages: tuple[Mapping[str, Shape], ...]
    """Parameter shapes of each pipeline stage by name, as split by the tensor axis."""
    micro_batches: int
    """Number of micro-batches per step on each data-parallel rank."""
    layer_elements: int
    """Number of elements that the layers keep for backward, over all micro-batches in flight."""
    again_elements: int
    """Number of elements that live while backward computes what was not kept of a layer again."""
    head: Head | None
    """The head, or None on a coordinate without the last stage."""

    @property
    def elements(self) -> int:
        """Number of parameter elements before sharding over the data axis."""
        return sum(elements(stage.values()) for stage in self.stages)

    @property
    def master_bytes(self) -> int:
        """Bytes per stored element."""
        return 8 if self.numerics.precision == "fp64" else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes per element in the precision of computation."""
        return 2 if self.numerics.precision == "bf16" else self.master_bytes

    @property
    def moments(self) -> float:
        """Number of values that the optimizer keeps for each element, on average."""
        if self.optimizer.name == "sgd":
            return int(self.optimizer.momentum > 0)
        named = [(name, shape) for stage in self.stages for name, shape in stage.items()]
        matrices = elements(shape for name, shape in named if self.optimizer.orthogonalises(name, shape))
        return 2 - matrices / self.elements

    @property
    def layer_activations(self) -> int:
        """Bytes of the layers in backward: what they keep, and what is computed again of one of them."""
        return (self.layer_elements + self.again_elements) * self.compute_bytes

    @property
    def activations(self) -> int:
        """Bytes kept for backward with keepwarm's own head, which computes logits in chunks."""
        return self.layer_activations + (0 if self.head is None else self.head.bytes_in_chunks(self.compute_bytes))


def elements(shapes: Iterable[Shape]) -> int:
    """Return the total number of elements of tensors of these shapes."""
    return sum(prod(shape) for shape in shapes)


def data_share(work: Workload) -> int:
    """Return the elements per rank when an optimizer cuts a flattened buffer into equal parts over the data axis."""
    return work.elements if work.parallel.data_mode == "ddp" else ceil(work.elements / work.parallel.data)
