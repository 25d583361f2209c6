"""The data section of a job spec. Torch-free."""

from pydantic import Field, PositiveInt

from parallel.spec import Section


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
