"""What a cluster is asked for. Torch-free."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from keepwarm import section
from keepwarm.registry import Registry, UnusableComponent
from keepwarm.section import Section

ADDED_BATCH_SYSTEMS: Registry[Any] = Registry("batch system", "keepwarm.batch_systems", {})
"""Batch systems of other packages. Each has the section of its options as its attribute `options`."""

Line = Annotated[str, StringConstraints(pattern=r"^[^\n\r]*$")]
"""One line of a script."""
Option = Annotated[str, StringConstraints(pattern=r"^--?[A-Za-z][^\n\r]*$")]
Word = Annotated[str, StringConstraints(pattern=r"^[^\s\"'`$\\]+$")]

Time = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    StringConstraints(pattern=r"^(\d+-)?\d+(:\d+){0,2}$"),
]
"""A time as SLURM writes it; a bare number of minutes need not be quoted in YAML."""


class ContainerSpec(Section):
    """The image that every task runs in. It holds the same keepwarm and Python as the run was submitted with."""

    runtime: Literal["pyxis", "apptainer"] = Field("pyxis", description="pyxis is SLURM's plugin for enroot")
    image: Word = Field(description="for example /images/keepwarm.sqsh, or docker://registry#name:tag")
    mounts: tuple[Word, ...] = Field((), description="FROM:TO; the run folder is mounted in any case")
    python: Word = Field("python3", description="interpreter inside the image")


class SlurmSpec(Section):
    """How `keepwarm submit` asks SLURM for nodes: cluster.ranks_per_node gives their number, and `spares` more."""

    launcher: Literal["node", "rank"] = Field(
        "node", description="one task per node: a supervisor that survives the loss of others; or one task per rank"
    )
    partition: Word | None = Field(None, description="default: the cluster's own")
    account: Word | None = None
    qos: Word | None = None
    time: Time | None = Field(
        None,
        description="limit of one start, as minutes, hours:minutes:seconds or days-hours; default: the partition's",
    )
    constraint: Word | None = Field(None, description="features that every node must have")
    exclude: tuple[Word, ...] = Field((), description="nodes to leave out")
    spares: NonNegativeInt = Field(0, description="nodes that wait to take the place of one that dies")
    gpus_per_node: PositiveInt | None = Field(None, description="default: none are asked for")
    cpus_per_rank: PositiveInt | None = Field(None, description="default: numerics.threads_per_rank")
    setup: tuple[Line, ...] = Field((), description="shell lines before the start, as `module load cuda`")
    container: ContainerSpec | None = None
    copy_code: bool = Field(False, description="run a copy of keepwarm, taken at submission, in the run folder")
    extra: tuple[Option, ...] = Field((), description="further options of sbatch, as --mem=0")
    save_before_limit: PositiveInt = Field(120, description="seconds before the time limit at which the state is saved")


class KubernetesSpec(Section):
    """What `keepwarm submit --backend kubernetes` asks for: a pod for each of the layout's nodes, and `spares` more."""

    image: Word = Field(description="holds the same keepwarm as the run was planned with")
    claim: Word = Field(description="persistent volume claim that all pods share, ReadWriteMany")
    mount: Word = Field(description="where the pods see it; output and data must lie below")
    namespace: Word | None = None
    python: Word = Field("python3", description="interpreter inside the image")
    spares: NonNegativeInt = Field(0, description="pods that wait to take the place of one that dies")
    gpus_per_node: PositiveInt | None = Field(None, description="default: none are asked for")
    gpu_resource: Word = Field("nvidia.com/gpu", description="what GPUs are called there")
    cpus_per_node: PositiveInt | None = Field(None, description="default: numerics.threads_per_rank for each rank")
    memory: Word | None = Field(None, description="as 900Gi")
    service_account: Word | None = None
    node_selector: dict[Word, Word] = Field(default_factory=dict, description="labels that every machine must have")


class BatchSections(Section):
    """Base of the section `cluster`: takes a section for each batch system that another package added, by its name."""

    model_config = ConfigDict(extra="allow")

    @classmethod
    def added_names(cls) -> list[str]:
        """Keys that other packages added; imports none of them."""
        return ADDED_BATCH_SYSTEMS.names()

    @classmethod
    def added_section(cls, name: str) -> type[section.Section] | None:
        """The class of an added section; None if no installed package added it or it cannot be imported."""
        try:
            return _options_of(name) if name in ADDED_BATCH_SYSTEMS else None
        except UnusableComponent:
            return None

    def batch_options(self, name: str) -> BaseModel | None:
        """The options of a batch system; None if the job has none for it."""
        found = getattr(self, name, None)
        return found if isinstance(found, BaseModel) else None

    @model_validator(mode="after")
    def _validate_added(self, info: ValidationInfo) -> Self:
        added = self.__pydantic_extra__ or {}
        for name, value in added.items():
            added[name] = _validated(name, value, as_json=info.mode == "json")
        return self


def _options_of(name: str) -> type[section.Section]:
    """Raises UnusableComponent if the batch system cannot be imported or declares no options."""
    options = getattr(ADDED_BATCH_SYSTEMS.get(name), "options", None)
    if not (isinstance(options, type) and issubclass(options, section.Section)):
        raise UnusableComponent(f"batch system {name!r} declares no section of options")
    return options


def _validated(name: str, value: Any, *, as_json: bool) -> section.Section | None:
    """Raises ValidationError with locations that begin with the name."""
    if name not in ADDED_BATCH_SYSTEMS:
        raise _at(name, "extra_forbidden", value)
    try:
        options = _options_of(name)
    except UnusableComponent as error:
        raise _at(name, PydanticCustomError("unusable", "{reason}", {"reason": str(error)}), value) from error
    if value is None or isinstance(value, options):
        return value
    # A model of this one key, so that errors are located below it.
    around = create_model("cluster", **{name: (options, ...)})  # type: ignore[call-overload]
    found = around.model_validate_json(json.dumps({name: value})) if as_json else around.model_validate({name: value})
    return getattr(found, name)  # type: ignore[no-any-return]


def _at(name: str, kind: str | PydanticCustomError, value: Any) -> ValidationError:
    return ValidationError.from_exception_data("cluster", [InitErrorDetails(type=kind, loc=(name,), input=value)])
