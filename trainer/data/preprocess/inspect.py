"""`keepwarm data inspect`: show the contents of a token file."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from keepwarm.trainer import tool
from keepwarm.trainer.data.indexed import TokenFile
from keepwarm.trainer.data.tokenizer import Tokenizer, load_tokenizer
from keepwarm.trainer.errors import DataError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def inspect(prefix: Path, *, document: int = 0, length: int = 64, tokenizer_name: str | None = None) -> dict[str, Any]:
    """Return documents, tokens, and the first `length` tokens of one document, decoded if the tokenizer is known.

    Without `tokenizer_name`, uses the tokenizer that the sidecar names, if it has not changed.

    Raises:
        DataError: the file or the tokenizer cannot be used, or there is no such document.
    """
    tokens = TokenFile(prefix)
    if not 0 <= document < tokens.documents:
        raise DataError(f"{prefix}: has no document {document}; it has {tokens.documents}, counted from 0")
    whole = tokens.document(document)
    sample = whole[:length]
    tokenizer = _tokenizer(tokens, tokenizer_name)
    sidecar = tokens.sidecar
    return {
        "prefix": str(prefix),
        "documents": tokens.documents,
        "tokens": tokens.count,
        "content": tokens.content,
        "tokenizer": sidecar.tokenizer if sidecar else None,
        "vocabulary_size": sidecar.vocabulary_size if sidecar else None,
        "max_id": sidecar.max_id if sidecar else None,
        "prefixed": sidecar.prefixed if sidecar else None,
        "sample": {
            "document": document,
            "document_tokens": len(whole),
            "ids": sample.tolist(),
            "text": tokenizer.decode(sample.tolist()) if tokenizer else None,
        },
    }


def _tokenizer(tokens: TokenFile, name: str | None) -> Tokenizer | None:
    sidecar = tokens.sidecar
    if name is None and (sidecar is None or not (sidecar.tokenizer == "bytes" or Path(sidecar.tokenizer).is_file())):
        return None
    end = sidecar.end_of_document if sidecar and (name is None or name == sidecar.tokenizer) else None
    tokenizer = load_tokenizer(name if name is not None else sidecar.tokenizer if sidecar else "bytes", end)
    if sidecar is not None and tokenizer.hash != sidecar.tokenizer_hash:
        if name is None:
            return None
        raise DataError(f"{tokens.path}: was not tokenized with {name}, but with {sidecar.tokenizer}")
    return tokenizer


@app.command()
def command(
    prefix: Annotated[Path, typer.Argument(help="Path of the token file without .bin and .idx.")],
    document: Annotated[int, typer.Option(help="Index of the document to show, from 0.")] = 0,
    length: Annotated[int, typer.Option(min=1, help="Number of its tokens to show.")] = 64,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer; default: the one that wrote the file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the documents, tokens and a decoded sample of a token file."""
    report = inspect(prefix, document=document, length=length, tokenizer_name=tokenizer)
    if json:
        typer.echo(msgspec.json.encode(report).decode())
        return
    typer.echo(f"{prefix}: {report['documents']:,} documents, {report['tokens']:,} tokens")
    typer.echo(f"tokenizer: {report['tokenizer'] or 'unknown'}   content: {report['content']}")
    if report["prefixed"]:
        typer.echo(f"{report['prefixed']:,} documents have a prefix without loss")
    sample = report["sample"]
    typer.echo(f"document {document} ({sample['document_tokens']:,} tokens) begins with ids {sample['ids']}")
    typer.echo(sample["text"] if sample["text"] is not None else "(give --tokenizer to decode it)")


if __name__ == "__main__":
    tool.run(app)
