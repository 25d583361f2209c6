"""Settings of torch's NCCL process groups, which are read when the first one is created.

Hangs are found by `keepwarm.trainer.monitor.watchdog`, which names the ranks at fault. NCCL's own watchdog comes after
it and only ends the process; its monitor ends processes whose watchdog is stuck itself, as in a driver that hangs.
"""

import os

ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
SETTINGS = {
    ERROR_HANDLING: "3",
    "TORCH_NCCL_ENABLE_MONITORING": "1",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "660",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "1",
}
"""3: a collective that fails or times out ends the process, without waiting for communicators that may never answer.
660: later than the timeout of collectives, so that the monitor does not come before a verdict."""


def configure(*, in_process: bool) -> None:
    """Set what the environment does not. Call before creating the process group.

    `in_process`: workers are to survive the loss of their peers. `World.interrupt` then aborts the process groups,
    which torch allows with its own handling of errors off: else the watchdog ends the process first.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, "0" if in_process and name == ERROR_HANDLING else value)
