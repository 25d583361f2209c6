"""Errors of broken GPUs are told from those of programs, by CUDA's codes and texts."""

import pytest
import torch

from keepwarm.trainer.distributed.device_errors import BROKEN, broken
from keepwarm.trainer.errors import DeviceBroken, RendezvousFailed

ADVICE = "\nCUDA kernel errors might be asynchronously reported at some other API call.\n"


class AcceleratorError(RuntimeError):
    """As torch's, which sets the code of the driver; Python cannot make one with a code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.error_code = code


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("text", BROKEN.values())
def test_broken_gpu_is_known_by_the_text_of_cuda_and_nccl(text: str) -> None:
    assert broken(torch.AcceleratorError(f"CUDA error: {text}{ADVICE}")) == f"CUDA error: {text}"
    nccl = f"NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error\nLast error:\nCuda failure '{text}'"
    assert broken(torch.distributed.DistBackendError(nccl)) == f"Cuda failure '{text}'"


def test_broken_gpu_is_known_by_its_code() -> None:
    assert broken(AcceleratorError("CUDA-Fehler", 214)) == (
        "CUDA-Fehler (CUDA error 214: uncorrectable ECC error encountered)"
    )


def test_broken_gpu_behind_another_error_is_found() -> None:
    ecc = torch.AcceleratorError(f"CUDA error: {BROKEN[214]}{ADVICE}")
    assert broken(caused(RendezvousFailed("the ranks do not reach each other"), ecc)) == f"CUDA error: {BROKEN[214]}"
    assert broken(DeviceBroken("rank 3: cuda:3 computes wrong")) == "rank 3: cuda:3 computes wrong"
    assert broken(RuntimeError("Unable to determine the device handle for GPU0000:1B:00.0: GPU is lost.")) is not None


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered{ADVICE}"),
        torch.AcceleratorError(f"CUDA error: unspecified launch failure{ADVICE}"),
        AcceleratorError("CUDA error: device-side assert triggered", 710),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        ValueError(),
    ],
)
def test_errors_of_programs_and_peers_are_no_broken_gpu(error: Exception) -> None:
    assert broken(error) is None
    error.__context__ = error  # a loop must not hang it
    assert broken(error) is None
