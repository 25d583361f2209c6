"""What the fork server imports once, so that no rank has to. It must not compute: threads do not survive a fork."""

import ctypes
import gc
import os
import signal

import torch.distributed.checkpoint
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor
import torch.distributed.tensor.parallel  # noqa: F401

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel kill this process when process `parent`, its parent, ends."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


if (_parent := os.environ.get("KEEPWARM_TEST_PROCESS")) and int(_parent) == os.getppid():
    die_with(int(_parent))

gc.freeze()  # what is imported stays: collections in the ranks need not look at it, nor copy its pages
