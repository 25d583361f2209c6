"""`keepwarm doctor`: which engines and fused kernels this machine can use, and how to install what is missing."""

import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.engine_support import ENGINES

_APEX = (
    "build NVIDIA's Apex from source with its CUDA extensions, https://github.com/NVIDIA/apex "
    "(the package `apex` on PyPI is another project)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """What a job can have computed by a package that is not required."""

    name: str
    module: str
    """That is there when it is installed; for Apex the extension that the kernels are compiled into."""
    install: str
    key: str
    value: str | bool
    """Of `key`, which asks for it."""

    @property
    def missing(self) -> bool:
        return importlib.util.find_spec(self.module) is None

    @property
    def asked(self) -> str:
        return f"{self.key} = {'true' if self.value is True else self.value}"


KERNELS = (
    Kernel(name="Apex FusedAdam", module="amp_C", install=_APEX, key="optimizer.implementation", value="apex"),
    Kernel(
        name="Apex FusedRMSNorm, FusedLayerNorm",
        module="fused_layer_norm_cuda",
        install=_APEX,
        key="numerics.norms",
        value="apex",
    ),
    Kernel(
        name="Transformer Engine",
        module="transformer_engine",
        install="pip install --no-build-isolation 'transformer_engine[pytorch]'",
        key="parallel.transformer_engine",
        value=True,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that a job may ask for."""

    kind: str
    """device, engine or kernel."""
    name: str
    usable: bool
    detail: str
    """Which version there is, or why it cannot be used and what to do."""


def show(*, as_json: bool) -> None:
    """Print what was found."""
    found = list(findings())
    if as_json:
        print(json.dumps([asdict(finding) for finding in found]))
        return
    width = max(len(finding.name) for finding in found)
    for finding in found:
        print(f"{finding.kind:<7} {finding.name:<{width}}  {'yes' if finding.usable else 'no '}  {finding.detail}")


def findings() -> Iterator[Finding]:
    """Everything that is looked for, without importing any of it."""
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    yield Finding(
        kind="device",
        name="CUDA",
        usable=gpus > 0,
        detail=f"{gpus} NVIDIA GPUs" if gpus else "no NVIDIA driver: engines run on the CPU, for tests and debugging",
    )
    for name, info in ENGINES.items():
        problems = [text for one in info.requirements if (text := one.problem()) is not None]
        versions = ", ".join(f"{one.distribution} {_version(one.distribution)}" for one in info.requirements)
        yield Finding(
            kind="engine",
            name=name,
            usable=not problems,
            detail="; ".join(problems) or versions or f"torch {_version('torch')}",
        )
    for kernel in KERNELS:
        detail = f"not installed: {kernel.install}" if kernel.missing else kernel.asked
        yield Finding(kind="kernel", name=kernel.name, usable=not kernel.missing, detail=detail)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
