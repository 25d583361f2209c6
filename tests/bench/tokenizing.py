"""`keepwarm data tokenize` against a bare loop around the `tokenizers` library, on 15 MB of JSON lines,
or as many bytes as its argument says.

Prints one JSON object: medians of seconds and of processor seconds, from start to end of a process, and their ratios to
the bare loop. Every round runs all of them in turns. The loop reads the lines, encodes them with all threads of the
library and writes the ids: no end of documents, no index, no checks, no files that a killed run could continue from.
"""

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from keepwarm.trainer.data.preprocess.text import documents, parts
from keepwarm.trainer.data.preprocess.train_tokenizer import train_tokenizer

ROUNDS = 5
BYTES = 15_000_000
CORPORA = ("handbook_en", "handbook_de")
BARE = """
import json, sys
import numpy as np, tokenizers
corpus, tokenizer, target = sys.argv[1:]
loaded = tokenizers.Tokenizer.from_file(tokenizer)
with open(corpus) as lines, open(target, "wb") as out:
    while texts := [json.loads(line)["text"] for _, line in zip(range(2000), lines)]:
        for encoding in loaded.encode_batch_fast(texts, add_special_tokens=False):
            np.array(encoding.ids, np.uint16).tofile(out)
"""


def write_corpus(path: Path, size: int) -> None:
    """Write documents of about 2 kB, drawn from the shipped corpora, until the file has `size` bytes."""
    draw = random.Random(0)
    whole = "\n".join(
        text for name in CORPORA for part in parts(Path(f"configs/corpora/{name}.jsonl.zst"), 1 << 30)
        for text in documents(part, "text")
    )  # fmt: skip
    with path.open("w") as file:
        while file.tell() < size:
            start = draw.randrange(len(whole) - 4000)
            file.write(json.dumps({"text": whole[start : start + draw.randrange(4000)]}, ensure_ascii=False) + "\n")


def seconds(command: list[str]) -> tuple[float, float]:
    """Return the time that a process takes, and the processor time of it and its children."""
    start, before = time.perf_counter(), _processor()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start, _processor() - before


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    size = int(sys.argv[1]) if sys.argv[1:] else BYTES
    with tempfile.TemporaryDirectory(prefix="keepwarm-bench-") as name:
        folder = Path(name)
        corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer.json"
        write_corpus(corpus, size)
        train_tokenizer([corpus], tokenizer, 8192)
        taken: dict[str, list[tuple[float, float]]] = {"bare": [], "one": [], "two": []}
        for turn in range(ROUNDS):
            taken["bare"].append(seconds([sys.executable, "-c", BARE, str(corpus), str(tokenizer), f"{folder}/bare"]))
            for kind, processes in (("one", "1"), ("two", "2")):
                command = [sys.executable, "-m", "keepwarm", "data", "tokenize", "--input", str(corpus)]
                command += ["--output-prefix", f"{folder}/{kind}{turn}", "--tokenizer", str(tokenizer)]
                taken[kind].append(seconds([*command, "--processes", processes]))
    report: dict[str, float] = {"bytes": size, "rounds": ROUNDS}
    for index, unit in enumerate(("seconds", "processor_seconds")):
        medians = {kind: statistics.median(times[index] for times in found) for kind, found in taken.items()}
        report |= {f"{kind}_{unit}": value for kind, value in medians.items()}
        report |= {f"{kind}_to_bare_{unit}": medians[kind] / medians["bare"] for kind in ("one", "two")}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
