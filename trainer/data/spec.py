"""The data section of a job spec. Torch-free."""

from typing import Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, model_validator

from keepwarm.section import Count, Section, Threads


class DataSpec(Section):
    """The token data and how they are packed into samples.

    A path is a Megatron prefix (`PATH.bin` and `PATH.idx`) or text (`.jsonl`, `.ndjson`, `.json`, `.txt`, with
    `.gz` or `.zst`), which is tokenized once into the run folder. Relative paths are relative to the job file.
    """

    sources: dict[str, str] = Field(min_length=1, description="training data by source name")
    validation: dict[str, str] = Field(default_factory=dict, description="held-out data by domain name")
    tokenizer: str = Field("bytes", description="`bytes`, a Hugging Face tokenizer.json or a SentencePiece .model")
    end_of_document: str | None = Field(
        None, min_length=1, description="token that ends each document of text; default: the tokenizer's own"
    )
    sequence_length: Count = Field(description="tokens per sample")
    document_mask: bool = Field(
        False, description="attention stays within documents, positions restart, targets across boundaries are masked"
    )
    prefetch: Threads = Field(2, description="number of batches to prepare in the background")


class ReplaySpec(Section):
    """A fraction of a stage's samples drawn again from seen data; the token budget stays the same."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    origins: tuple[str, ...] = Field(
        (), alias="from", description="earlier stages or sources to draw from; default: everything seen"
    )
    fraction: float = Field(gt=0, lt=1, description="of the stage's samples")
    distribution: Literal["uniform", "power"] = Field(
        "uniform",
        description="uniform: no sample repeats before all were drawn; power: (1 + age)^-exponent over stages",
    )
    exponent: PositiveFloat | None = Field(None, description="power: how fast older stages fade; typically 0.5 or 1")
    seed: NonNegativeInt = Field(0, description="seed of the order of samples")
    proxy_source: str | None = Field(
        None, description="source to draw from if the parent has no ledger; not known to have been seen"
    )

    @model_validator(mode="after")
    def _is_whole(self) -> "ReplaySpec":
        if (self.distribution == "power") != (self.exponent is not None):
            raise ValueError(
                "distribution power needs an exponent"
                if self.distribution == "power"
                else "exponent belongs to distribution power"
            )
        if self.proxy_source is not None and (self.origins or self.distribution != "uniform"):
            raise ValueError(
                "proxy_source is drawn uniformly from one source: leave out from, distribution and exponent"
            )
        return self
