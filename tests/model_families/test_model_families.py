"""The command that fills the table in docs/models.md, and the table itself."""

import re

import pytest

from tests.model_families.__main__ import PAGE
from tests.model_families.family import Row, divided, families, tried
from tests.model_families.page import BEGIN, END, replaced, table
from tests.support.transformers.models import spec_of

PASSED = Row(
    family="wren", class_name="WrenForCausalLM", stage="passed", layout="2 x 2 x 2", loss=1.2e-7, norm=3.4e-6,
    isolated=True, logits=0.0, divided=0.999,
)  # fmt: skip
FAILED = Row(family="tern", stage="builds", reason="its plan | is none")
IN_THE_TABLE = re.compile(r"^\| (\w+) \| \w+ForCausalLM \|", re.MULTILINE)


def test_table_counts_what_passed_what_failed_and_what_was_not_tried() -> None:
    section = table([PASSED, FAILED], ["owl", "tern", "wren"], ["moa"], "5.0")
    assert "| wren | WrenForCausalLM | 2 x 2 x 2 | 1e-07 | 3e-06 | equal | 100 % |" in section
    assert "| tern | builds | its plan / is none |" in section
    assert (
        "has 3 dense causal families with both plans. Of these 1 pass, 1 do not, and 1 have not been tried." in section
    )
    assert "Not tried: owl." in section
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replaced(page, section) == f"before\n{section}\nafter\n"
    assert replaced(replaced(page, "x" + section), section).count(END) == 1


def test_families_are_dense_or_mixtures_of_experts() -> None:
    dense, experts = families()
    assert {"llama", "gemma3_text", "phi3"} <= set(dense)
    assert {"mixtral", "qwen3_moe", "gpt_oss"} <= set(experts)
    assert not set(dense) & set(experts)


def test_share_that_the_tensor_axis_divides_is_that_of_all_matrices() -> None:
    spec = spec_of("llama")
    assert divided(spec) == 1.0
    description = spec.description.model_copy(update={"no_tensor": "its plan says nothing"})
    assert divided(spec.model_copy(update={"description": description})) == 0.0


@pytest.mark.long
@pytest.mark.dist
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", IN_THE_TABLE.findall(PAGE.read_text()))
def test_family_that_the_page_lists_passes(family: str) -> None:
    row = tried(family)
    assert row.stage == "passed", row
