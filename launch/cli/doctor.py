"""`keepwarm doctor`: list usable engines and kernels on this machine, and versions outside the tested ranges."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from keepwarm.launch.run import gpu_health
from keepwarm.launch.run.node_check import gpu_count
from keepwarm.parallel.engine_registry import ENGINES
from keepwarm.parallel.engine_support import registered_engine
from keepwarm.parallel.errors import EngineUnavailable
from keepwarm.parallel.kernels import KERNELS
from keepwarm.tested import TESTED, installed


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Availability of one thing that a job may request."""

    kind: str
    """version, device, engine or kernel."""
    name: str
    usable: bool
    detail: str
    """Installed version, or why it is unusable and what to do. For a version, also the tested range."""


def show(*, as_json: bool) -> None:
    """Print the findings."""
    found = list(findings())
    if as_json:
        print(json.dumps([asdict(finding) for finding in found]))
        return
    width = max(len(finding.name) for finding in found)
    for finding in found:
        print(f"{finding.kind:<7} {finding.name:<{width}}  {'yes' if finding.usable else 'no '}  {finding.detail}")


def findings() -> Iterator[Finding]:
    """Yield a finding per version, device, engine and kernel, without importing any of them."""
    for distribution, tested in TESTED.items():
        found = installed(distribution)
        if found is not None:
            inside = found in tested
            detail = f"{found}, {'within' if inside else 'outside'} the tested range {tested}"
            yield Finding(kind="version", name=distribution, usable=inside, detail=detail)
    gpus = gpu_count()
    yield Finding(
        kind="device",
        name="CUDA",
        usable=gpus > 0,
        detail=f"{gpus} GPUs" if gpus else "no driver of a GPU: engines run on the CPU, for tests and debugging",
    )
    yield _health(gpus)
    yield from map(_engine, ENGINES.names())
    for kernel in KERNELS:
        detail = f"not installed: {kernel.install}" if kernel.missing else kernel.asked
        yield Finding(kind="kernel", name=kernel.name, usable=not kernel.missing, detail=detail)


def _health(count: int) -> Finding:
    """Return what NVML says of the GPUs, or why it was not asked."""
    seen = gpu_health.look() if count else gpu_health.Gpus(skipped="no driver of a GPU")
    found = [*gpu_health.problems(seen), *gpu_health.warnings(seen)]
    detail = seen.skipped or "; ".join(found) or f"{len(seen.gpus)} healthy GPUs, driver {seen.driver}"
    return Finding(kind="device", name="NVML", usable=not (seen.skipped or found), detail=detail)


def _engine(name: str) -> Finding:
    try:
        requirements = registered_engine(name).requirements
    except EngineUnavailable as error:
        return Finding(kind="engine", name=name, usable=False, detail=str(error))
    problems = [text for one in requirements if (text := one.problem()) is not None]
    versions = ", ".join(f"{one.distribution} {installed(one.distribution)}" for one in requirements)
    return Finding(
        kind="engine",
        name=name,
        usable=not problems,
        detail="; ".join(problems) or versions or f"torch {installed('torch')}",
    )
