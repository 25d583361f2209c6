"""Commands that are programs of their own, in `trainer`: keepwarm replaces itself with them and never imports torch."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

import typer

from keepwarm.launch.cli.arguments import PASSED_THROUGH

PROGRAMS: Mapping[str, tuple[str, str]] = {
    "report": (
        "keepwarm.trainer.continual.report",
        "Write a one-page report about a run: losses by domain, schedule, forgetting, data drawn, goodput.",
    ),
    "refine": (
        "keepwarm.trainer.continual.refine",
        "Refine a learning-rate schedule from the gradient norms of a run.",
    ),
    "average": (
        "keepwarm.trainer.continual.average_command",
        "Average the weights of several branches into one checkpoint.",
    ),
    "convert": (
        "keepwarm.trainer.convert",
        "Convert checkpoints from and to Hugging Face, DCP, torchtitan, Megatron Core and DeepSpeed.",
    ),
    "surgery": (
        "keepwarm.trainer.surgery",
        "Derive models from models: task vectors, growth, pruning, other vocabularies.",
    ),
    "sample": ("keepwarm.trainer.inference.sample", "Continue a prompt with the newest checkpoint of a run."),
    "eval": (
        "keepwarm.trainer.inference.lm_eval",
        "Export the newest checkpoint of a run and score it with the LM Evaluation Harness.",
    ),
    "lineage": (
        "keepwarm.trainer.continual.lineage_command",
        "Show what a run, checkpoint or export was derived from, and what was derived from it.",
    ),
    "checkpoint": ("keepwarm.trainer.checkpoint.command", "Verify, show, diff or prune checkpoints."),
}
"""Module and help of each command of `keepwarm`."""
DATA_PROGRAMS: Mapping[str, tuple[str, str]] = {
    "train-tokenizer": (
        "keepwarm.trainer.data.preprocess.train_tokenizer",
        "Train a byte-level BPE tokenizer on text.",
    ),
    "tokenize": (
        "keepwarm.trainer.data.preprocess.tokenize",
        "Tokenize JSON lines or text into Megatron .bin and .idx files.",
    ),
    "inspect": (
        "keepwarm.trainer.data.preprocess.inspect",
        "Show the documents, tokens and a decoded sample of tokenized data.",
    ),
}
"""The same for `keepwarm data`."""


def add_programs(app: typer.Typer, programs: Mapping[str, tuple[str, str]]) -> None:
    """Add a command for each program; arguments and options are passed on as they are."""
    for name, (module, text) in programs.items():
        app.command(name, help=text, context_settings=PASSED_THROUGH)(_command(module))


def _command(module: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        _become(module, context.args)

    return command


def _become(module: str, arguments: list[str]) -> NoReturn:
    """Replace this process with the program, which handles its own options, output and exit code."""
    from keepwarm.trainer.job.renames import refuse_old_options

    refuse_old_options(arguments)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])
