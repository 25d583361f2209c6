"""`keepwarm data train-tokenizer`: train a byte-level BPE on text and save it as `tokenizer.json`."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from keepwarm.files import READABLE, atomic_write
from keepwarm.trainer import tool
from keepwarm.trainer.data.end_of_document import KNOWN_NAMES
from keepwarm.trainer.data.preprocess.progress import LogObserver, Observer, input_bytes
from keepwarm.trainer.data.preprocess.text import parts, prefixed_documents, sentences
from keepwarm.trainer.data.preprocess.tokenize_options import DEFAULT_OPTIONS, Inputs, SkipBadLines, TextOptions
from keepwarm.trainer.errors import DataError, OutputError

if TYPE_CHECKING:
    import tokenizers

SPECIAL_TOKENS = (KNOWN_NAMES[0], "<|padding|>")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def train_tokenizer(
    inputs: Sequence[Path],
    output: Path,
    vocabulary_size: int,
    *,
    special: Sequence[str] = (),
    options: TextOptions = DEFAULT_OPTIONS,
    observer: Observer | None = None,
) -> int:
    """Train a byte-level BPE (Sennrich et al., 2016; bytes as in GPT-2) and write it to `output`.

    Any text can be encoded: the vocabulary contains the special tokens, including `special`, all 256 bytes, and merges.

    Returns:
        The vocabulary's size, smaller than requested if the text offers too few merges.

    Raises:
        DataError: an input cannot be used or has no text, or the vocabulary is too small.
        OutputError: `output` exists or cannot be written.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    specials = list(dict.fromkeys((*SPECIAL_TOKENS, *special)))
    if vocabulary_size < 256 + len(specials):
        raise DataError(
            f"--vocabulary-size {vocabulary_size}: 256 bytes and {len(specials)} special tokens need "
            f"{256 + len(specials)}"
        )
    if output.suffix != ".json":
        raise OutputError(f"{output}: tokenizers are recognised by suffix: use .json")
    if output.exists():
        raise OutputError(f"{output}: exists already; remove it or choose another --output")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=os.isatty(2),
    )
    texts = _Texts(inputs, options, observer or Observer())
    tokenizer.train_from_iterator(texts.batches(), trainer)
    if not texts.count:
        raise DataError(f"{inputs[0]}: contains no text to train on")
    _save(tokenizer, output)
    return tokenizer.get_vocab_size(with_added_tokens=True)


class _Texts:
    """The documents of the inputs, counted while they are read."""

    def __init__(self, inputs: Sequence[Path], options: TextOptions, observer: Observer) -> None:
        self._inputs, self._options, self._observer = inputs, options, observer
        self.count = 0

    def batches(self) -> Iterator[list[str]]:
        for path in self._inputs:
            done = 0
            for part in parts(path, self._options.part_bytes, self._options.selection):
                pairs, bad = prefixed_documents(part, self._options.text_key)
                self._observer.left_out(len(bad), sentences(part, bad))
                self._observer.read(part.read_bytes - done)
                done = part.read_bytes
                self.count += len(pairs)
                yield [text for _, text in pairs]


def _save(tokenizer: "tokenizers.Tokenizer", output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(output, (tokenizer.to_str(pretty=True) + "\n").encode(), mode=READABLE)
    except OSError as error:
        raise OutputError(f"{output}: cannot write: {error.strerror or error}") from None


@app.command()
def command(
    input: Inputs,
    output: Annotated[Path, typer.Option(help="Write the tokenizer.json to this file.")],
    vocabulary_size: Annotated[int, typer.Option(help="Number of tokens, special ones included.")] = 8192,
    special: Annotated[
        list[str] | None, typer.Option(help="Special token that no text contains, such as <|good|>; repeatable.")
    ] = None,
    skip_bad_lines: SkipBadLines = False,
    text_key: Annotated[str, typer.Option(help="Key of the text in each JSON line.")] = "text",
) -> None:
    """Train a byte-level BPE tokenizer on text."""
    options = TextOptions(text_key=text_key, skip_bad_lines=skip_bad_lines)
    # On a terminal the library draws its own bars.
    seen = LogObserver("train-tokenizer", input_bytes(input)) if not os.isatty(2) else Observer()
    size = train_tokenizer(input, output, vocabulary_size, special=special or (), options=options, observer=seen)
    seen.report()
    typer.echo(f"{output}: vocabulary of {size:,}; documents end with {SPECIAL_TOKENS[0]}")


if __name__ == "__main__":
    tool.run(app)
