"""What a rank holds in memory, and the numbers that an engine estimates it from. Pure and torch-free."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod

from keepwarm.parallel.spec import NumericsSpec, OptimizerSpec, ParallelSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEstimate:
    """What one rank holds; memory in bytes."""

    parameters: int
    """Elements of model parameters that the rank stores between steps."""
    weights: int
    """Stored weights (fp32 masters under bf16), and what of them is gathered for computing at the same time."""
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes of all four."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The last norm and the projection to the vocabulary, for one micro-batch on one rank."""

    tokens: int
    hidden_size: int
    vocabulary: int
    """Columns of the projection that the tensor axis leaves to a rank."""
    chunk: int
    """Tokens whose logits keepwarm's own head computes at once."""

    def bytes_in_chunks(self, compute: int) -> int:
        """Input and output of the norm, one chunk of logits and of their gradient."""
        return self._norm(compute) + self.chunk * self.vocabulary * (compute + max(4, compute))

    def bytes_at_once(self, compute: int) -> int:
        """Input and output of the norm, all logits, and their exponentials and gradient in fp32."""
        return self._norm(compute) + self.tokens * self.vocabulary * (compute + 3 * 4)

    def _norm(self, compute: int) -> int:
        return 2 * self.tokens * self.hidden_size * compute


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What every rank at one pipeline coordinate computes, as far as it decides its memory."""

    parallel: ParallelSpec
    optimizer: OptimizerSpec
    numerics: NumericsSpec
    stages: tuple[Mapping[str, Shape], ...]
    """Shapes of the parameters of each pipeline stage by name, as the tensor axis splits them."""
    micro_batches: int
    """Of a step, on each data-parallel rank."""
    layer_elements: int
    """Elements that the layers keep for backward, of all micro-batches in flight."""
    head: Head | None
    """None before the last stage."""

    @property
    def elements(self) -> int:
        """Elements of the parameters, whole on the data axis."""
        return sum(elements(stage.values()) for stage in self.stages)

    @property
    def master_bytes(self) -> int:
        """Bytes of a stored element."""
        return 8 if self.numerics.precision == "fp64" else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element that is computed with."""
        return 2 if self.numerics.precision == "bf16" else self.master_bytes

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps for each element."""
        return 2 if self.optimizer.name == "adamw" else int(self.optimizer.momentum > 0)

    @property
    def layer_activations(self) -> int:
        """Bytes that the layers keep for backward."""
        return self.layer_elements * self.compute_bytes

    @property
    def activations(self) -> int:
        """Bytes kept for backward, with keepwarm's own head, which computes logits in chunks."""
        return self.layer_activations + (0 if self.head is None else self.head.bytes_in_chunks(self.compute_bytes))


def elements(shapes: Iterable[Shape]) -> int:
    """Return the number of elements of all tensors."""
    return sum(prod(shape) for shape in shapes)


def data_share(work: Workload) -> int:
    """Return the elements of one of the equal parts, as an optimizer cuts a flattened buffer over the data axis."""
    return work.elements if work.parallel.data_mode == "ddp" else ceil(work.elements / work.parallel.data)
