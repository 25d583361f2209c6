"""Megatron Core without CUDA, for tests and debugging: what it says of a CUDA device is done on the CPU.

Megatron Core asks for the current CUDA device where it allocates, names the device "cuda" in a few places, and tells
types of parameters by the names that CUDA tensors have. Inside `without_cuda` one public function of `torch.cuda` is
replaced and a torch function mode redirects these three; outside nothing is changed. Kernels that exist for CUDA
alone, CUDA's random numbers and streams are not imitated: what needs them is not available without CUDA.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


@contextmanager
def without_cuda() -> Iterator[None]:
    """Run Megatron Core on the CPU; does nothing where CUDA is available."""
    if torch.cuda.is_available():
        yield
        return
    with patch.object(torch.cuda, "current_device", lambda: CPU), _Redirect():
        yield


class _Redirect(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") == "cuda":
            kwargs["device"] = CPU
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result
