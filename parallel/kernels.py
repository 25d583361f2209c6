"""Fused kernels from optional packages: the setting that selects them and how to install them. Torch-free."""

import importlib.util
from dataclasses import dataclass

_APEX = (
    "build NVIDIA's Apex from source with its CUDA extensions, https://github.com/NVIDIA/apex "
    "(the package `apex` on PyPI is another project)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """A fused implementation from an optional package that a job can select."""

    name: str
    module: str
    """Module that exists if the package is installed; for Apex, the compiled extension that holds the kernels."""
    install: str
    key: str
    value: str | bool
    """Value of `key` that selects the kernel."""

    @property
    def missing(self) -> bool:
        return importlib.util.find_spec(self.module) is None

    def is_asked_by(self, job: object) -> bool:
        """Return whether a job selects this kernel; the options of other engines lack its key."""
        value = job
        for name in self.key.split("."):
            value = getattr(value, name, None)
        return value == self.value

    @property
    def asked(self) -> str:
        return f"{self.key} = {'true' if self.value is True else self.value}"

    @property
    def problem(self) -> str:
        """Error message for a job that selects the kernel where it is not installed."""
        return f"{self.asked}: {self.name} is not installed: {self.install}; or leave it out"


ADAM = Kernel(name="Apex FusedAdam", module="amp_C", install=_APEX, key="optimizer.implementation", value="apex")
NORMS = Kernel(
    name="Apex FusedRMSNorm, FusedLayerNorm",
    module="fused_layer_norm_cuda",
    install=_APEX,
    key="numerics.norms",
    value="apex",
)
TRANSFORMER_ENGINE = Kernel(
    name="Transformer Engine",
    module="transformer_engine",
    install="pip install --no-build-isolation 'transformer_engine[pytorch]'",
    key="parallel.options.transformer_engine",
    value=True,
)
KERNELS = (ADAM, NORMS, TRANSFORMER_ENGINE)
