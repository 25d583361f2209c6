"""One rank's step without its values: fake tensors, a fake process group, and a count of bytes and collectives."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from keepwarm.parallel import step
from keepwarm.parallel.engine import Batch, EngineConfig
from keepwarm.parallel.mesh.mesh import Mesh
from keepwarm.parallel.native.engine import TorchEngine
from keepwarm.parallel.native.stage import Stage
from keepwarm.trainer.job.estimate import decided_parallel
from keepwarm.trainer.job.spec import JobSpec
from keepwarm.trainer.model.make import make_model


class Watch(TorchDispatchMode):
    """Counts collectives by name, and the bytes of all storages that live under it."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.now = self.peak = 0
        self._live: dict[int, int] = {}

    def see(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor that exists already."""
        if isinstance(tensor, DTensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._live:
            self._live[key] = 0
            self._resize(key, storage.nbytes())
            weakref.finalize(storage, self._gone, key)

    def _resize(self, key: int, size: int) -> None:
        if key in self._live:
            self.now += size - self._live[key]
            self._live[key] = size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if function.namespace in ("c10d", "_c10d_functional"):
            self.collectives[function._opname.strip("_")] += 1
        result = function(*args, **(kwargs or {}))
        pytree.tree_map_only(torch.Tensor, self.see, result)
        return result

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """FSDP frees gathered weights by resizing their storage, which no operator shows."""
        real = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = real(storage, size)
            self._resize(id(storage), size)
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resize):
            yield


@dataclass(frozen=True)
class Count:
    """What one step of one rank takes."""

    peak: int
    """Bytes of tensors at the worst moment, states included."""
    collectives: Counter[str]
    layers: int
    """Layers of this rank."""


def count_step(job: JobSpec, *, rank: int = 0, fake: bool = True) -> Count:
    """Count the second step of a rank. Without `fake` its tensors are real, and nothing is received."""
    micro_batches = job.batch.global_batch_size // (job.parallel.data * job.batch.micro_batch_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=job.layout.world_size)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(), _outside_fake():
            engine = _engine(job)
            shape = (micro_batches, job.batch.micro_batch_size, job.data.sequence_length)
            tokens = torch.zeros(shape, dtype=torch.int64)
            batch = Batch(tokens=tokens, targets=tokens)
            watch = Watch()
            for shard in engine.state().values():
                watch.see(shard.local)
            with watch, watch.resizes():
                engine.step(batch, 1e-3)
                watch.collectives.clear()
                watch.peak = watch.now
                engine.step(batch, 1e-3)
        layers = {each.name.split(".")[1] for each in engine._parameters if each.name.startswith("layers.")}
        return Count(watch.peak, watch.collectives, len(layers))
    finally:
        dist.destroy_process_group()


def _engine(job: JobSpec) -> TorchEngine:
    return TorchEngine(
        EngineConfig(
            model=make_model(job.model, job.seed),
            parallel=decided_parallel(job),
            optimizer=job.optimizer,
            numerics=job.numerics,
            layout=job.layout,
            device=torch.device("cpu"),
            timeout=timedelta(seconds=60),
        )
    )


@contextmanager
def _outside_fake() -> Iterator[None]:
    """Make groups of real tensors, take no initial values, and agree on sums without reading any."""

    def real(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return method(*args, **kwargs)

        return call

    def agree(mesh: Mesh, losses: Any, *others: torch.Tensor) -> list[float]:
        if mesh.world is not None:
            dist.all_reduce(torch.zeros(len(others) + 2), group=mesh.world)
        return [1.0] * (len(losses.names) + len(others) + 1)

    with (
        mock.patch.object(Mesh, "__init__", real(Mesh.__init__)),
        mock.patch.object(Mesh, "device_mesh", real(Mesh.device_mesh)),
        mock.patch.object(Stage, "initialise"),
        mock.patch.object(step, "_agree", agree),
    ):
        yield
