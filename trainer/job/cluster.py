"""The `cluster` section: resources to request from a batch system. Torch-free."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from keepwarm import section
from keepwarm.options import validated
from keepwarm.registry import Registry, UnusableComponent
from keepwarm.section import Count, FewOrNone, Section
from keepwarm.trainer.job.slurm.hostlist import expand
from keepwarm.trainer.job.slurm.sbatch_options import KEYS as SBATCH_KEYS
from keepwarm.trainer.job.slurm.sbatch_options import problem
from keepwarm.trainer.job.slurm.syntax import (
    Begin,
    Dependency,
    FailureDomains,
    Folder,
    Line,
    Memory,
    Nodes,
    Place,
    Resources,
    Time,
    Variable,
    Word,
    Words,
    as_words,
    gpus_in,
    upper_words,
)

ADDED_BATCH_SYSTEMS: Registry[Any] = Registry("batch system", "keepwarm.batch_systems", {})
"""Batch systems of other packages. Each declares its options section in the attribute `Options`."""

Option = Annotated[str, StringConstraints(pattern=r"^--?[A-Za-z][^\n\r]*$")]
MailType = Literal[
    "NONE", "BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT", "TIME_LIMIT", "TIME_LIMIT_90",
    "TIME_LIMIT_80", "TIME_LIMIT_50", "ARRAY_TASKS",
]  # fmt: skip
STORED = {"stored": True}
"""Context of the validation of a job that was accepted before, possibly by another version: it can still be shown."""


class ContainerSpec(Section):
    """The image that every task runs in. It must contain the keepwarm and Python versions that submitted the run."""

    runtime: Literal["pyxis", "apptainer"] = Field("pyxis", description="pyxis is SLURM's plugin for enroot")
    image: Word = Field(description="for example /images/keepwarm.sqsh, or docker://registry#name:tag")
    mounts: tuple[Word, ...] = Field((), description="FROM:TO; the run folder is always mounted")
    python: Word = Field("python3", description="interpreter inside the image")


class MailSpec(Section):
    """Messages that SLURM sends about a job."""

    type: Annotated[tuple[MailType, ...], BeforeValidator(upper_words)] = Field(
        ("END", "FAIL"), description="when; REQUEUE too, if every restart is of interest"
    )
    user: Word | None = Field(None, description="address; default: the submitting user")


class SlurmSpec(Section):
    """Nodes that `keepwarm submit` requests from SLURM: those that cluster.ranks_per_node implies, plus `spares`."""

    launcher: Literal["node", "rank"] = Field(
        "node",
        description="node: one task per node, a supervisor that survives the loss of others; rank: one task per rank",
    )
    job_name: Line | None = Field(None, min_length=1, description="default: name")
    partition: Word | None = Field(None, description="default: the cluster's default")
    account: Word | None = None
    qos: Word | None = None
    reservation: Word | None = None
    time: Time | None = Field(
        None,
        description="time limit of one start: minutes, hours:minutes:seconds or days-hours; default: the partition's",
    )
    begin: Begin | None = Field(None, description="earliest start of this submission; a resumed run does not keep it")
    dependency: Dependency | None = Field(
        None, description="other jobs that this submission waits for; a resumed run does not keep it"
    )
    constraint: Word | None = Field(None, description="features required of every node")
    nodelist: Nodes = Field((), description="nodes that the job must have")
    exclude: Nodes = Field((), description="nodes to exclude")
    spares: FewOrNone = Field(0, description="standby nodes that replace lost ones")
    failure_domains: FailureDomains = Field(
        None,
        description="nodes by what fails at once, such as {rack1: 'node[0-15]'}, or topology: the cluster's switches; "
        "nodes that protect each other are taken from different ones",
    )
    gpus_per_node: Count | None = Field(None, description="default: none requested")
    gres: Resources = Field((), description="generic resources of each node, such as gpu:a100:8")
    cpus_per_rank: Count | None = Field(None, description="default: the CPUs of a node divided by its ranks")
    mem: Memory | None = Field(None, description="memory of each node, 0 for all; default: the partition's")
    modules: Words = Field((), description="environment modules to load")
    conda: Word | None = Field(None, description="conda environment of keepwarm on the nodes: its name or folder")
    venv: Place | None = Field(None, description="virtual environment of keepwarm on the nodes: its folder")
    export: Annotated[tuple[Variable, ...], BeforeValidator(as_words)] = Field(
        (), description="environment variables of `keepwarm submit` that the job gets; ALL: all of them"
    )
    interface: Word | None = Field(None, description="network interface of the collectives, such as ib0")
    scratch: Folder | None = Field(None, description="folder of each node for temporary files; may contain $NAME")
    setup: tuple[Line, ...] = Field((), description="shell lines to run first, such as `ulimit -l unlimited`")
    container: ContainerSpec | None = None
    copy_code: bool = Field(False, description="run a copy of keepwarm, placed in the run folder at submission")
    mail: MailSpec | None = None
    extra: tuple[Option, ...] = Field((), description="additional sbatch options, such as --licenses=NAME")
    save_before_limit: Count = Field(120, description="seconds before the time limit at which the state is saved")

    @property
    def gpus(self) -> int:
        """Return the number of GPUs requested on each node, by either key."""
        return self.gpus_per_node or gpus_in(self.gres)

    @property
    def domain_of_node(self) -> dict[str, str]:
        """Return the failure domain of each node, as far as the job names them."""
        named = self.failure_domains if isinstance(self.failure_domains, dict) else {}
        return {node: name for name, hosts in named.items() for node in expand(hosts)}

    def conflict(self) -> tuple[str, str] | None:
        """Return a key that does not fit the others, and why; None if they fit."""
        if self.gpus_per_node is not None and gpus_in(self.gres):
            return "gres", f"requests GPUs, as gpus_per_node = {self.gpus_per_node} does: keep one of them"
        named = [key for key in ("conda", "venv") if getattr(self, key) is not None]
        if len(named) > 1:
            return "conda", f"there is an environment already, venv = {self.venv}: keep one of them"
        wrong = problem(self.extra, [key for key in SBATCH_KEYS.values() if getattr(self, key) not in (None, ())])
        if wrong is not None:
            return "extra", wrong
        return None

    @model_validator(mode="after")
    def _fits_together(self, info: ValidationInfo) -> Self:
        if (info.context or {}).get("stored") or (found := self.conflict()) is None:
            return self
        key, why = found
        error = PydanticCustomError("conflict", "{why}", {"why": why})
        details = InitErrorDetails(type=error, loc=(key,), input=getattr(self, key))
        raise ValidationError.from_exception_data("slurm", [details], input_type="json")


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
