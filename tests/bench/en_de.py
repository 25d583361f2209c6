"""English, then German: what each way of continuing forgets, learns and costs, on real text.

Arms of `configs/jobs/en_de.yaml`, which share their first stage and see as many tokens in the second: no replay, 5 %,
25 %, a constant low rate, an infinite schedule with 25 %; besides them the union from scratch with the tokens of both
stages, and English followed by more English under cosine and infinite schedules. Everything is `keepwarm`'s own run.

    python tests/bench/en_de.py                                            the short form, on the embedded handbook
    python tests/bench/en_de.py --corpora FOLDER --tokens 400_000 --seeds 1,2,3 --table docs/en_de.md    the benchmark

FOLDER holds en, de, en.valid and de.valid as `.jsonl.zst`.

Prints one JSON object; `--table` also writes it as Markdown. Nothing here gates.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

JOB = Path(__file__).parents[2] / "configs" / "jobs" / "en_de.yaml"
EMBEDDED = JOB.parents[1] / "corpora"
VOCABULARY = 4096
PEAK, CONSTANT, FLOOR = 3e-3, 1.65e-3, 3e-4
COSINE = {"schedule": "cosine", "max": PEAK, "min": FLOOR, "warmup": 0.01}
INFINITE = {"schedule": "infinite", "max": PEAK, "constant": CONSTANT, "min": FLOOR, "warmup": 0.01}
HELD = {"schedule": "infinite", "max": CONSTANT, "constant": CONSTANT, "min": FLOOR, "warmup": 0.0, "cooldown_end": 0.0}
LOW = {"schedule": "constant", "max": FLOOR, "warmup": 0.0}
EVERY, SAMPLES = 40, 128
"""Steps between evaluations, and samples of each domain."""

Losses = list[tuple[int, dict[str, float]]]
Figures = dict[str, float]


def stage(name: str, tokens: int, mixture: dict[str, float], lr: dict[str, Any], replay: float = 0.0) -> dict[str, Any]:
    clause = {"name": name, "tokens": tokens, "mixture": mixture, "lr": lr}
    return clause | ({"replay": {"from": ["english"], "fraction": replay}} if replay else {})


def arms(tokens: int) -> dict[str, tuple[str | None, dict[str, Any]]]:
    """By name: the arm that it starts from, and its stage."""
    german: dict[str, float] = {"de": 1}
    english: dict[str, float] = {"en": 1}
    return {
        "english": (None, stage("english", tokens, english, COSINE)),
        "no replay": ("english", stage("german", tokens, german, COSINE)),
        "5 % replay": ("english", stage("german", tokens, german, COSINE, 0.05)),
        "25 % replay": ("english", stage("german", tokens, german, COSINE, 0.25)),
        "constant low rate": ("english", stage("german", tokens, german, LOW)),
        "union from scratch": (None, stage("union", 2 * tokens, english | german, COSINE)),
        "english, infinite": (None, stage("english", tokens, english, INFINITE)),
        "infinite, 25 % replay": ("english, infinite", stage("german", tokens, german, HELD | {"anneal": 0.15}, 0.25)),
        "more english, cosine": ("english", stage("more", tokens, english, COSINE)),
        "more english, infinite": ("english, infinite", stage("more", tokens, english, HELD)),
    }


def prepare(corpora: Path, work: Path) -> list[str]:
    """Tokenizer and token files of the corpora; returns the overrides that name them."""
    from keepwarm.trainer.data.preprocess.tokenize import tokenize
    from keepwarm.trainer.data.preprocess.train_tokenizer import train_tokenizer

    prefix = "" if (corpora / "en.jsonl.zst").is_file() else "handbook_"
    texts = {name: corpora / f"{prefix}{name}.jsonl.zst" for name in ("en", "de", "en.valid", "de.valid")}
    tokenizer = work / "tokenizer.json"
    train_tokenizer([texts["en"], texts["de"]], tokenizer, VOCABULARY)
    for name, text in texts.items():
        tokenize([text], work / name, str(tokenizer))
    paths = {kind: {name: str(work / f"{name}{end}") for name in ("en", "de")} for kind, end in
             (("sources", ""), ("validation", ".valid"))}  # fmt: skip
    model = {"layers": 3, "vocabulary_size": VOCABULARY, "tied_embeddings": True}
    return [
        f"data.tokenizer={tokenizer}",
        *(f"data.{kind}={json.dumps(files)}" for kind, files in paths.items()),
        *(f"model.{key}={json.dumps(value)}" for key, value in model.items()),
    ]


def families(tokens: int) -> dict[str, list[str]]:
    """Arms by the one without a parent that they go back to, largest family first; each after what it starts from."""
    found: dict[str, list[str]] = {}
    for name, (parent, _) in arms(tokens).items():
        found.setdefault(parent or name, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def run_family(work: Path, common: Sequence[str], tokens: int, seed: int, family: Sequence[str]) -> dict[str, Losses]:
    """Losses by arm: (step, by domain) at every evaluation of its last stage."""
    import contextlib
    import io

    from keepwarm.trainer.loop.session import run_session

    found: dict[str, Losses] = {}
    for name in family:
        parent, clause = arms(tokens)[name]
        output = work / f"seed-{seed}" / name.replace(" ", "-").replace("%", "percent").replace(",", "")
        own = [f"output={output}", f"seed={seed}", f"stages={json.dumps([clause])}", f"evaluation.every={EVERY}"]
        if parent is not None:
            own.append(f"init_from={work / f'seed-{seed}' / parent.replace(' ', '-').replace(',', '')}")
        settings = ["checkpoint.every=null", f"evaluation.samples={SAMPLES}", "log.tensorboard=false"]
        with contextlib.redirect_stdout(io.StringIO()):
            assert run_session(JOB, [*common, *settings, *own], resume=False)
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        found[name] = [(line["step"], line["eval"]) for line in lines if "eval" in line]
    return found


def judged(found: dict[str, Losses]) -> Figures:
    """The figures that the criteria are about, of one seed; losses in nats per token."""
    last = {name: losses[-1][1] for name, losses in found.items()}
    mean = {name: (losses["en"] + losses["de"]) / 2 for name, losses in last.items()}
    base = last["english"]["en"]
    spikes = {name: max(loss["en"] for _, loss in found[name]) - found[name][0][1]["en"] for name in found}
    forgotten = {name: last[name]["en"] - base for name in last}
    return {
        "forgetting removed by 5 %": 1 - forgotten["5 % replay"] / forgotten["no replay"],
        "cost of 5 % on German": last["5 % replay"]["de"] - last["no replay"]["de"],
        "gap to the union closed by 25 %": (mean["no replay"] - mean["25 % replay"])
        / (mean["no replay"] - mean["union from scratch"]),
        "gain of re-warming on German": last["constant low rate"]["de"] - last["no replay"]["de"],
        "spike of cosine": spikes["more english, cosine"],
        "spike of infinite": spikes["more english, infinite"],
    }


CRITERIA: dict[str, tuple[str, Callable[[Figures], bool]]] = {
    "forgetting removed by 5 %": ("at least 50 %", lambda one: one["forgetting removed by 5 %"] >= 0.5),
    "cost of 5 % on German": ("under 0.15 nat", lambda one: one["cost of 5 % on German"] < 0.15),
    "gap to the union closed by 25 %": ("at least 80 %", lambda one: one["gap to the union closed by 25 %"] >= 0.8),
    "gain of re-warming on German": ("above 0", lambda one: one["gain of re-warming on German"] > 0),
    "spike of infinite": (
        "at most a third of cosine's",
        lambda one: one["spike of infinite"] <= one["spike of cosine"] / 3,
    ),
}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| run | English | German | mean | forgetting of English |", "|---|---|---|---|---|"]
    for name, row in report["arms"].items():
        cells = " | ".join(f"{row[key]:.3f}" for key in ("en", "de", "mean"))
        lines.append(f"| {name} | {cells} | {row['forgetting']:+.3f} |")
    lines += ["", "| figure | mean | of each seed | criterion | met |", "|---|---|---|---|---|"]
    for name, row in report["figures"].items():
        each = ", ".join(f"{value:.3f}" for value in row["seeds"])
        lines.append(f"| {name} | {row['mean']:.3f} | {each} | {row.get('criterion', '')} | {row.get('met', '')} |")
    conditions = (
        f"{report['corpora']}; {report['tokens']:,} tokens a stage; seeds {', '.join(map(str, report['seeds']))}; "
        f"{report['minutes']:.1f} minutes on {report['processes']} processes. "
        "Losses in nats per token, means over seeds."
    )
    return "\n".join([conditions, "", *lines, ""])


def summary(found: dict[int, dict[str, Losses]]) -> dict[str, Any]:
    """Means over seeds of the last losses, and each criterion's figures."""
    rows: dict[str, dict[str, float]] = {}
    for name in next(iter(found.values())):
        last = [losses[name][-1][1] for losses in found.values()]
        forgotten = [losses[name][-1][1]["en"] - _base(losses, name) for losses in found.values()]
        en, de = (statistics.fmean(loss[domain] for loss in last) for domain in ("en", "de"))
        rows[name] = {"en": en, "de": de, "mean": (en + de) / 2, "forgetting": statistics.fmean(forgotten)}
    seeds = [judged(losses) for losses in found.values()]
    figures: dict[str, dict[str, Any]] = {}
    for name in seeds[0]:
        values = [one[name] for one in seeds]
        figures[name] = {"mean": statistics.fmean(values), "seeds": values}
        if name in CRITERIA:
            text, holds = CRITERIA[name]
            means = {key: statistics.fmean(one[key] for one in seeds) for key in seeds[0]}
            figures[name] |= {"criterion": text, "met": "yes" if holds(means) else "no"}
    return {"arms": rows, "figures": figures}


def _base(losses: dict[str, Losses], name: str) -> float:
    """English at the beginning of the arm's stage, or of its family's English stage at its end."""
    parent = arms(1)[name][0]
    return losses[parent if parent else "english"][-1][1]["en"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, default=EMBEDDED, help="folder with en, de and *.valid.jsonl.zst")
    parser.add_argument("--tokens", type=int, default=150_000, help="of each stage; the benchmark: 400_000")
    parser.add_argument("--seeds", default="1", help="the benchmark: 1,2,3")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        common = prepare(options.corpora.resolve(), work)
        tasks = [(seed, family) for family in families(options.tokens).values() for seed in seeds]
        with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
            asked = [(work, common, options.tokens, seed, family) for seed, family in tasks]
            results = pool.starmap(run_family, asked, chunksize=1)
    found: dict[int, dict[str, Losses]] = {seed: {} for seed in seeds}
    for (seed, _), losses in zip(tasks, results, strict=True):
        found[seed] |= losses
    report = summary(found) | {
        "corpora": "the embedded handbook" if options.corpora == EMBEDDED else "full corpora",
        "tokens": options.tokens,
        "seeds": seeds,
        "processes": options.processes,
        "minutes": (time.monotonic() - began) / 60,
    }
    print(json.dumps(report))
    if options.table is not None:
        options.table.write_text(table(report), encoding="utf-8")


if __name__ == "__main__":
    main()
