"""The table of families in docs/models.md, made from the rows that were found."""

import textwrap
from collections.abc import Sequence

from tests.model_families.family import STEPS, Row

BEGIN, END = "<!-- begin: python -m tests.model_families -->", "<!-- end: python -m tests.model_families -->"


def table(rows: Sequence[Row], dense: Sequence[str], experts: Sequence[str], transformers: str) -> str:
    """Return the section between the two marks, which it includes."""
    passed = [row for row in rows if row.stage == "passed"]
    others = [row for row in rows if row.stage != "passed"]
    missing = [family for family in dense if family not in {row.family for row in rows}]
    lines = [
        BEGIN,
        "",
        *_wrapped(
            f"transformers {transformers} has {len(dense)} dense causal families with both plans. Of these "
            f"{len(passed)} pass, {len(others)} do not, and {len(missing)} have not been tried. "
            f"{len(experts)} mixtures of experts come later."
        ),
        *(_wrapped(f"Not tried: {', '.join(missing)}.") if missing else ()),
        "",
        "| `model_type` | class | tensor x pipeline x data | loss | gradient norm | export | divided |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for row in passed),
        "",
        *_wrapped(
            "Loss and gradient norm: largest relative difference between one rank and that layout, in fp32, in "
            f"{STEPS} steps of three micro-batches with several documents in each sample, none of which changes "
            "another. Export: largest difference between logits of the trained model and those that transformers "
            "computes from the exported folder, relative to the largest logit. Divided: share of the multiplications "
            "by weights that `parallel.tensor` divides."
        ),
        "",
    ]
    if others:
        lines += ["| `model_type` | what failed | reason |", "|---|---|---|"]
        lines += [f"| {row.family} | {row.stage} | {row.reason.replace('|', '/')} |" for row in others]
        lines.append("")
    lines += ["Mixtures of experts:", *_wrapped(", ".join(experts) + "."), "", END]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 125, break_long_words=False, break_on_hyphens=False)


def _line(row: Row) -> str:
    numbers = f"{row.loss:.0e} | {row.norm:.0e} | {_exact(row.logits)} | {100 * (row.divided or 0):.0f} %"
    return f"| {row.family} | {row.class_name} | {row.layout} | {numbers} |"


def _exact(logits: float | None) -> str:
    return "equal" if logits == 0 else f"{logits:.0e}"


def replaced(page: str, section: str) -> str:
    """Return the page with the section in the place of the one that it has."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + section + after
