"""A stand-in for a GPU under torch: tensors on it, streams and events that do nothing until they are waited for.

A copy that was not waited for is absent from host memory, and one that is made late reads what the tensor then holds.
Copies to page-locked memory go to the pages that were locked (`cudart.c`). Every thread begins on device 0.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from tests.gpu_stand_in.runtime import Runtime, runtime

_lock = threading.RLock()


class Stream:
    """A queue of work. It is done in order, and only as far as it is waited for."""

    def __init__(self, gpu: "Gpu", index: int) -> None:
        self._gpu, self.index = gpu, index
        gpu.streams.append(self)
        self._queue: list[Callable[[], None]] = []
        self._done = 0
        self._before: list[tuple[int, Stream | None]] = []

    @property
    def length(self) -> int:
        return self._done + len(self._queue)

    @property
    def idle(self) -> bool:
        return not self._queue

    def push(self, work: Callable[[], None]) -> None:
        with _lock:
            self._queue.append(work)

    def run(self, upto: int) -> None:
        with _lock:
            while self._done < upto and self._queue:
                work = self._queue.pop(0)
                self._done += 1
                work()

    def wait_event(self, event: "Event") -> None:
        self.push(event.synchronize)

    def synchronize(self) -> None:
        self.run(self.length)

    def __enter__(self) -> "Stream":
        local = self._gpu.local
        self._before.append((self._gpu.runtime.device, getattr(local, "stream", None)))
        self._gpu.runtime.device, local.stream = self.index, self
        return self

    def __exit__(self, *error: object) -> None:
        # As torch does: the device that was current before becomes current, and gets a context.
        self._gpu.runtime.device, self._gpu.local.stream = self._before.pop()


class Event:
    """A place in a stream. Before it is recorded, it has happened."""

    def __init__(self) -> None:
        self._stream: Stream | None = None
        self._place = 0

    def record(self, stream: Stream) -> None:
        self._stream, self._place = stream, stream.length

    def synchronize(self) -> None:
        if self._stream is not None:
            self._stream.run(self._place)


class OnGpu(torch.Tensor):
    """A tensor whose bytes only copies bring to the host."""

    gpu: "Gpu"
    content: torch.Tensor

    @classmethod
    def of(cls, inner: torch.Tensor, gpu: "Gpu") -> "OnGpu":
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=gpu.device
        )
        made.content, made.gpu = inner, gpu
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _ASKS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if function is torch.Tensor.copy_:
            return _copy(*args, **kwargs)
        if function is torch.Tensor.numpy:
            raise TypeError("can't convert a tensor on a GPU to numpy")
        found = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, OnGpu)]
        plain = pytree.tree_map(lambda one: one.content if isinstance(one, OnGpu) else one, (args, kwargs))
        result = function(*plain[0], **plain[1])
        gpu = found[0].gpu
        return pytree.tree_map(lambda one: OnGpu.of(one, gpu) if isinstance(one, torch.Tensor) else one, result)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{function} on the stand-in for a GPU")


_ASKS = {torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__}  # type: ignore[attr-defined]


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy as torch does between a GPU and the host: asynchronously only to page-locked memory, and only if asked."""
    gpu = next(one.gpu for one in (target, source) if isinstance(one, OnGpu))
    stream = gpu.current_stream()
    gpu.launch()
    if isinstance(target, OnGpu):
        stream.synchronize()
        target.content.copy_(source.content if isinstance(source, OnGpu) else source)
        return target
    assert isinstance(source, OnGpu)
    assert target.is_contiguous()
    assert (target.dtype, target.shape) == (source.dtype, source.shape)
    inner = source.content.contiguous()
    size, address = inner.numel() * inner.element_size(), target.data_ptr()

    def write() -> None:
        assert target.data_ptr() == address  # and holds the memory until then
        code = gpu.runtime.write(address, inner.data_ptr(), size)
        if code:
            raise RuntimeError(f"CUDA error: {code}")

    stream.push(write)
    if not (non_blocking and (gpu.runtime.is_locked(address, size) or gpu.is_pinned(address, size))):
        stream.synchronize()
    return target


def inside(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a tensor on the GPU holds, to look at or to change as a kernel would."""
    assert isinstance(tensor, OnGpu)
    return tensor.content


class Gpu:
    """One GPU of several on a host. `patched` puts it in the place of torch's functions."""

    def __init__(self, index: int = 0) -> None:
        self.runtime: Runtime = runtime()
        self.device = torch.device("cuda", index)
        self.local = threading.local()
        self.before_copy: Callable[[], object] = lambda: None
        """Called before every copy or kernel; may raise."""
        self.streams: list[Stream] = []
        self._default: dict[int, Stream] = {}
        self._pinned: list[torch.Tensor] = []

    def tensor(self, host: torch.Tensor) -> OnGpu:
        """Return a tensor on the GPU with the values, and the strides, of one on the host."""
        return OnGpu.of(host.clone(memory_format=torch.preserve_format), self)

    def launch(self) -> None:
        """Begin a kernel or a copy. An earlier error of this thread that was not fetched is raised here."""
        self.before_copy()
        if self.runtime.last_error:
            raise RuntimeError(f"CUDA error: {self.runtime.last_error}, of an earlier call")

    @property
    def idle(self) -> bool:
        """Whether all copies that were asked for have been made."""
        return all(stream.idle for stream in self.streams)

    def is_pinned(self, address: int, size: int) -> bool:
        ranges = ((one.data_ptr(), one.numel() * one.element_size()) for one in self._pinned)
        return any(start <= address and address + size <= start + length for start, length in ranges)

    def current_stream(self, device: object = None) -> Stream:
        """Return the stream of this thread; at first, one that all threads share on a device."""
        stream = getattr(self.local, "stream", None)
        index = self.runtime.device if device is None else self.device.index
        return stream or self._default.setdefault(index, Stream(self, index))

    @contextmanager
    def patched(self) -> Iterator["Gpu"]:
        """Let torch's functions for streams, events and pinned memory use this GPU; end with no lock."""
        self.runtime.reset()
        self.runtime.device = self.device.index

        def select(device: torch.device) -> None:
            self.runtime.device = device.index

        def pinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def made(*sizes: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
                tensor = make(*sizes, **options)
                if pin_memory:
                    self._pinned.append(tensor)
                return tensor

            return made

        streams: dict[str, Any] = {"Stream": lambda device: Stream(self, device.index), "Event": lambda device: Event()}
        memory: dict[str, Any] = {"empty": pinned(torch.empty), "zeros": pinned(torch.zeros)}
        threads: dict[str, Any] = {"current_stream": self.current_stream, "set_device_index": select}
        with mock.patch.multiple(torch, **streams, **memory), mock.patch.multiple(torch.accelerator, **threads):
            yield self
        self.runtime.reset()
