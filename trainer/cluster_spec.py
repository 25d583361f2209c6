"""What a cluster is asked for. Torch-free."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, StringConstraints

from keepwarm.section import Section

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
    notice: PositiveInt = Field(120, description="seconds before the time limit at which the state is saved")


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
