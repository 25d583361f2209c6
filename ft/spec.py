"""Snapshot section of the job spec. Torch-free."""

from typing import Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from keepwarm.ft.codec.kernel import AUTO, KERNELS
from keepwarm.options import check_name
from keepwarm.section import Seconds, Section, Threads

CODE_LIMIT = 32


class CodeSpec(Section):
    """Reed-Solomon code of a group of nodes: any `parity` of `data + parity` nodes may be lost at once."""

    data: PositiveInt | None = Field(
        None, description="k: chunks that a node's state is split into; null: 4, or as many as the nodes allow"
    )
    parity: PositiveInt | None = Field(
        None,
        description="m: nodes of a group that may be lost; memory grows by m/k; null: 2 from 4 nodes on, else 1",
    )
    kernel: str = Field(AUTO, description="what computes it: isal, numpy or a registered one; auto: isal, else numpy")

    @field_validator("kernel")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        check_name(KERNELS, name, AUTO)
        return name

    @model_validator(mode="after")
    def _fits(self) -> "CodeSpec":
        if self.data is not None and self.parity is not None and self.data + self.parity > CODE_LIMIT:
            raise ValueError(
                f"data + parity = {self.data} + {self.parity} = {self.data + self.parity}, at most {CODE_LIMIT} nodes "
                "form a group; choose a smaller data"
            )
        return self


class DurableSpec(Section):
    """Committed snapshots that the agents write to OUTPUT/checkpoints; training never waits for them."""

    every: PositiveInt = Field(description="steps between durable snapshots")
    keep: PositiveInt = Field(2, description="newest ones kept")
    keep_every: PositiveInt | None = Field(None, description="also keep those whose step is a multiple; null: none")
    compress: bool = Field(False, description="zstandard")
    deadline: Seconds = Field(600.0, description="seconds to wait for all nodes' parts of one checkpoint")


class SnapshotSpec(Section):
    """Snapshots of the training state in the memory of the nodes, erasure-coded."""

    every: PositiveInt | Literal["auto"] = Field(
        "auto", description="steps; auto: Young/Daly from the measured cost and mtbf, at least the time of a commit"
    )
    when_busy: Literal["wait", "skip"] = Field("wait", description="when the previous snapshot is not committed yet")
    code: CodeSpec | None = Field(None, description="null: (4, 2), or the strongest of that kind that the nodes allow")
    domains: tuple[str, ...] | Literal["node"] = Field(
        "node", description="what fails at once: a label for each node (rack, switch), or the node itself"
    )
    durable: DurableSpec | None = Field(None, description="null: no durable tier below the memory")
    mtbf: Seconds = Field(14400.0, description="seconds between failures of the whole job, for every: auto")
    bucket: PositiveInt = Field(8 << 20, description="bytes in which state is copied, sent and coded; 4096 x n")
    bandwidth: PositiveFloat | None = Field(None, description="bytes per second each node sends; null: no cap")
    threads: Threads = Field(2, description="coding threads of each agent")
    scrub: Seconds | None = Field(60.0, description="seconds between two readings of memory at rest; null: none")
    peer_timeout: Seconds = Field(5.0, description="seconds without a sign of life after which a peer is dead")
    inventory_deadline: Seconds = Field(10.0, description="seconds that a recovery waits for silent agents")
    commit_deadline: Seconds = Field(
        120.0, description="seconds that a worker waits for a buffer under when_busy: wait before it goes on without"
    )
    lease: Seconds = Field(60.0, description="seconds that an agent outlives the last process of its job")
    authenticate: Literal["control", "all"] = Field(
        "control", description="what carries a MAC between agents: control frames; all: the bytes of the state too"
    )
    port: NonNegativeInt = Field(0, le=65535, description="TCP port of the agents; 0: any free one")

    @model_validator(mode="after")
    def _fits_together(self) -> "SnapshotSpec":
        if self.bucket % 4096 or self.bucket > 64 << 20:
            raise ValueError(f"bucket = {self.bucket}: must be a multiple of 4096 of at most {64 << 20}")
        if self.durable is not None and isinstance(self.every, int) and self.durable.every % self.every:
            raise ValueError(
                f"durable.every = {self.durable.every} must be a multiple of every = {self.every}: "
                "only snapshots become durable"
            )
        return self
