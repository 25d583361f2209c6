"""The stand-in for an accelerator, built from `accelerator.cpp` for the torch that is installed: device `standin`.

A process takes it for its accelerator from `register` on, so that this belongs into one of its own.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils.backend_registration import generate_methods_for_privateuse1_backend, rename_privateuse1_backend

NAME = "standin"
COUNT = 2
ENTRY = "[torch.backends]\nstandin = tests.gpu_stand_in.accelerator:register\n"
LIBRARY = "KEEPWARM_TEST_ACCELERATOR"
"""Environment variable with the path of the library."""


def build(folder: Path) -> dict[str, str]:
    """Compile the library, and return the variables of processes that are to have the device. Takes half a minute."""
    root, library = Path(torch.__file__).parent, folder / "accelerator.so"
    command = ["g++", "-std=c++20", "-O0", "-w", "-fPIC", "-shared", "-o", library]
    command += [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    command += [Path(__file__).with_name("accelerator.cpp"), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(list(map(str, command)), check=True, timeout=900)
    information = folder / "standin-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: standin\nVersion: 1\n")
    (information / "entry_points.txt").write_text(ENTRY)
    paths = [str(folder), str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), LIBRARY: str(library)}


def register() -> None:
    """Load the device. torch calls this when it is imported, by the entry point."""
    if LIBRARY not in os.environ or NAME in sys.modules:
        return
    torch.ops.load_library(os.environ[LIBRARY])
    rename_privateuse1_backend(NAME)
    torch._register_device_module(
        NAME,
        SimpleNamespace(
            is_available=lambda: True,
            is_initialized=lambda: True,
            Stream=lambda priority=0: torch.Stream(NAME, priority=priority),
            Event=lambda **options: torch.Event(NAME, **options),
            stream=lambda stream: stream,
            current_stream=torch.accelerator.current_stream,
            device_count=lambda: COUNT,
            current_device=torch.accelerator.current_device_index,
            _is_in_bad_fork=lambda: False,
            manual_seed_all=lambda seed: [_generator(index).manual_seed(seed) for index in range(COUNT)],
            get_device_properties=lambda index: SimpleNamespace(name="stand-in", index=index),
            get_rng_state=lambda device: _generator(device).get_state(),
            set_rng_state=lambda state, device: _generator(device).set_state(state),
            get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float32],
        ),
    )
    generate_methods_for_privateuse1_backend()
    dist.Backend.default_device_backend_map[NAME] = dist.Backend.GLOO
    dist.Backend.backend_capability[dist.Backend.GLOO].append(NAME)


def _generator(device: torch.device | int) -> torch.Generator:
    index = device if isinstance(device, int) else device.index or 0
    found: torch.Generator = torch.ops.standin.generator(index)
    return found
