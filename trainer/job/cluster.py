"""The `cluster` section: resources to request from a batch system. Torch-free."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from keepwarm import section
from keepwarm.options import validated
from keepwarm.registry import Registry, UnusableComponent
from keepwarm.section import Count, FewOrNone, Section

ADDED_BATCH_SYSTEMS: Registry[Any] = Registry("batch system", "keepwarm.batch_systems", {})
"""Batch systems of other packages. Each declares its options section in the attribute `Options`."""

Line = Annotated[str, StringConstraints(pattern=r"^[^\n\r]*$")]
"""One line of a shell script."""
Option = Annotated[str, StringConstraints(pattern=r"^--?[A-Za-z][^\n\r]*$")]
Word = Annotated[str, StringConstraints(pattern=r"^[^\s\"'`$\\]+$")]

Time = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    StringConstraints(pattern=r"^(\d+-)?\d+(:\d+){0,2}$"),
]
"""A SLURM time. A bare number of minutes need not be quoted in YAML."""


class ContainerSpec(Section):
    """The image that every task runs in. It must contain the keepwarm and Python versions that submitted the run."""

    runtime: Literal["pyxis", "apptainer"] = Field("pyxis", description="pyxis is SLURM's plugin for enroot")
    image: Word = Field(description="for example /images/keepwarm.sqsh, or docker://registry#name:tag")
    mounts: tuple[Word, ...] = Field((), description="FROM:TO; the run folder is always mounted")
    python: Word = Field("python3", description="interpreter inside the image")


class SlurmSpec(Section):
    """Nodes that `keepwarm submit` requests from SLURM: those that cluster.ranks_per_node implies, plus `spares`."""

    launcher: Literal["node", "rank"] = Field(
        "node",
        description="node: one task per node, a supervisor that survives the loss of others; rank: one task per rank",
    )
    partition: Word | None = Field(None, description="default: the cluster's default")
    account: Word | None = None
    qos: Word | None = None
    time: Time | None = Field(
        None,
        description="time limit of one start: minutes, hours:minutes:seconds or days-hours; default: the partition's",
    )
    constraint: Word | None = Field(None, description="features required of every node")
    exclude: tuple[Word, ...] = Field((), description="nodes to exclude")
    spares: FewOrNone = Field(0, description="standby nodes that replace lost ones")
    gpus_per_node: Count | None = Field(None, description="default: none requested")
    cpus_per_rank: Count | None = Field(None, description="default: numerics.threads_per_rank")
    setup: tuple[Line, ...] = Field((), description="shell lines to run first, such as `module load cuda`")
    container: ContainerSpec | None = None
    copy_code: bool = Field(False, description="run a copy of keepwarm, placed in the run folder at submission")
    extra: tuple[Option, ...] = Field((), description="additional sbatch options, such as --mem=0")
    save_before_limit: Count = Field(120, description="seconds before the time limit at which the state is saved")


class KubernetesSpec(Section):
    """Pods that `keepwarm submit --backend kubernetes` requests: one per node of the layout, plus `spares`."""

    image: Word = Field(description="must contain the keepwarm version that planned the run")
    claim: Word = Field(description="persistent volume claim shared by all pods, ReadWriteMany")
    mount: Word = Field(description="mount path in the pods; output and data must lie below it")
    namespace: Word | None = None
    python: Word = Field("python3", description="interpreter inside the image")
    spares: FewOrNone = Field(0, description="standby pods that replace lost ones")
    gpus_per_node: Count | None = Field(None, description="default: none requested")
    gpu_resource: Word = Field("nvidia.com/gpu", description="resource name of GPUs")
    cpus_per_node: Count | None = Field(None, description="default: numerics.threads_per_rank per rank")
    memory: Word | None = Field(None, description="such as 900Gi")
    service_account: Word | None = None
    node_selector: dict[Word, Word] = Field(default_factory=dict, description="labels required of every machine")


class BatchSections(Section):
    """Base of the `cluster` section; accepts a section for each batch system added by another package, by name."""

    model_config = ConfigDict(extra="allow")

    @classmethod
    def added_names(cls) -> list[str]:
        """Return the keys that other packages added, without importing those packages."""
        return ADDED_BATCH_SYSTEMS.names()

    @classmethod
    def added_section(cls, name: str) -> type[section.Section] | None:
        """Return the class of an added section; None if no installed package adds it or it cannot be imported."""
        try:
            return _options_of(name) if name in ADDED_BATCH_SYSTEMS else None
        except UnusableComponent:
            return None

    def batch_options(self, name: str) -> BaseModel | None:
        """Return the options of a batch system; None if the job has none for it."""
        options = getattr(self, name, None)
        return options if isinstance(options, BaseModel) else None

    @model_validator(mode="after")
    def _validate_added(self, info: ValidationInfo) -> Self:
        added = self.__pydantic_extra__ or {}
        # One model of them all, so that every problem is reported, each at a location that starts with the name.
        fields: dict[str, Any] = {name: (_field(name), ...) for name in added if name in ADDED_BATCH_SYSTEMS}
        sections = create_model("cluster", __config__=ConfigDict(extra="forbid"), **fields)
        added.update(dict(validated(sections, added, info.mode)))
        return self


def _options_of(name: str) -> type[section.Section]:
    """Return the options class of a batch system.

    Raises UnusableComponent if the batch system cannot be imported or declares no options.
    """
    options = getattr(ADDED_BATCH_SYSTEMS.get(name), "Options", None)
    if not (isinstance(options, type) and issubclass(options, section.Section)):
        raise UnusableComponent(f"batch system {name!r} declares no options section")
    return options


def _field(name: str) -> Any:
    """Return the type of an added section; one that refuses every value if its batch system cannot be used."""
    try:
        return _options_of(name) | None
    except UnusableComponent as error:
        reason = str(error)

    def refuse(value: Any) -> Any:
        raise PydanticCustomError("unusable", "{reason}", {"reason": reason})

    return Annotated[Any, BeforeValidator(refuse)]
