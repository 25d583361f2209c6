"""Fused kernels of packages that are not required: what asks for them, and how to install them. Torch-free."""

import importlib.util
from dataclasses import dataclass

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

    def is_asked_by(self, job: object) -> bool:
        """Return whether a job asks for it; the options of another engine do not have its key."""
        value = job
        for name in self.key.split("."):
            value = getattr(value, name, None)
        return value == self.value

    @property
    def asked(self) -> str:
        return f"{self.key} = {'true' if self.value is True else self.value}"

    @property
    def problem(self) -> str:
        """What a job that asks for it is told where it is missing."""
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
