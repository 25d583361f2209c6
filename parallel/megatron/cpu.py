"""Megatron Core without CUDA, for tests and debugging: its requests for a CUDA device are redirected to the CPU.

Megatron Core allocates on the current CUDA device, names the device "cuda" in a few places, and identifies parameter
types by the names of CUDA tensors. Inside `without_cuda` one public function of `torch.cuda` is replaced and a torch
function mode redirects these three; outside it nothing changes. CUDA-only kernels, CUDA's random numbers and streams
are not emulated: features that need them are unavailable without CUDA.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


@contextmanager
def without_cuda(device: torch.device) -> Iterator[None]:
    """Run Megatron Core on the CPU; do nothing if `device` is another one."""
    if device.type != "cpu":
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
