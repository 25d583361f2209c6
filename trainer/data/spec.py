"""The data section of a job spec. Torch-free."""

from typing import Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from keepwarm.section import Section


class DataSpec(Section):
    """Where the tokens are and how they are packed into samples.

    A path is a Megatron prefix (`PATH.bin` and `PATH.idx`) or text (`.jsonl`, `.txt`, with `.gz` or `.zst`), which
    is tokenized once into the run folder. Relative paths are relative to the job file.
    """

    sources: dict[str, str] = Field(min_length=1, description="training data by source name")
    validation: dict[str, str] = Field(default_factory=dict, description="held-out data by domain name")
    tokenizer: str = Field("bytes", description="`bytes`, a Hugging Face tokenizer.json or a SentencePiece .model")
    sequence_length: PositiveInt = Field(description="tokens per sample")
    document_mask: bool = Field(
        False, description="attention stays inside documents, positions restart, the crossing target is masked"
    )
    prefetch: PositiveInt = Field(2, description="batches prepared in the background")


class ReplaySpec(Section):
    """A part of a stage's samples that is drawn again from what was seen before; the token budget stays the same."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    origins: tuple[str, ...] = Field(
        (), alias="from", description="earlier stages or sources to draw from; default: all that was seen"
    )
    fraction: float = Field(gt=0, lt=1, description="of the stage's samples")
    distribution: Literal["uniform", "power"] = Field(
        "uniform", description="uniform: nothing twice before all came once; power: (1 + age)^-exponent over stages"
    )
    exponent: PositiveFloat | None = Field(None, description="power: how fast older stages fade; 0.5 and 1 are usual")
    seed: NonNegativeInt = Field(0, description="another order of the same samples")
    proxy_source: str | None = Field(
        None, description="source to draw from where the parent has no ledger; not known to have been seen"
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
