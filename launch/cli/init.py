"""`keepwarm init`: its options and its help. Importing this module loads neither torch nor the planner."""

from pathlib import Path
from typing import Annotated

import typer

first_job = typer.Typer()

Model = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Hugging Face folder to start from. [default: a small model from scratch]"),
]
Data = Annotated[
    list[Path],
    typer.Option(metavar="PATH", help="Corpus: a file, a prefix of token files, or a folder of them; repeat for more."),
]
Replay = Annotated[
    list[Path] | None, typer.Option(metavar="PATH", help="Corpus like what the model was trained on, to be replayed.")
]
Validation = Annotated[
    list[Path] | None, typer.Option(metavar="PATH", help="Held-out text. [default: files named valid, dev or test]")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="`bytes`, or a tokenizer file. [default: the model's, or that of token files]"),
]
EndOfDocument = Annotated[
    str | None, typer.Option(metavar="TOKEN", help="Token that ends a document. [default: the tokenizer's own]")
]
Tokens = Annotated[
    int | None, typer.Option(min=1, max=2**53, help="Tokens to train on. [default: the corpora once; less on a CPU]")
]
Gpus = Annotated[
    int | None, typer.Option(min=0, max=2**17, help="Number of GPUs, 0 for the CPU. [default: those of this machine]")
]
Gpu = Annotated[
    str | None, typer.Option(help="Kind of GPU: A100, H100, H200 or B200. [default: what this machine has]")
]
PerNode = Annotated[int | None, typer.Option(min=1, max=2**17, help="GPUs of a node. [default: 8]")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Job file to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]


@first_job.command("init")
def init(
    data: Data,
    model: Model = None,
    replay: Replay = None,
    validation: Validation = None,
    tokenizer: Tokenizer = None,
    end_of_document: EndOfDocument = None,
    tokens: Tokens = None,
    gpus: Gpus = None,
    gpu: Gpu = None,
    gpus_per_node: PerNode = None,
    output: Output = Path("job.yaml"),
    force: Force = False,
) -> None:
    """Write a first job for a model folder and a corpus, with every choice explained in the file.

    It reads the folder's config.json and the beginning of the corpus, looks at the machine, and chooses stages,
    learning rates, sequence length, batch and layout. It starts nothing; the file is then yours to change.

    keepwarm init --data corpus.jsonl

    keepwarm init --model llama-3.2-1b --data german.jsonl.zst --replay english.jsonl.zst -o german.yaml

    keepwarm init --model llama-3.1-8b --data corpora --gpus 64 --gpu H100 --tokens 10_000_000_000
    """
    from keepwarm.launch.init.command import Request, write_first_job

    write_first_job(
        Request(
            model=model,
            data=data,
            replay=replay or (),
            validation=validation or (),
            tokenizer=tokenizer,
            end_of_document=end_of_document,
            tokens=tokens,
            gpus=gpus,
            gpu=gpu,
            gpus_per_node=gpus_per_node,
            output=output,
            force=force,
        )
    )
