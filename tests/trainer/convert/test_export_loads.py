"""An export is a folder that transformers loads whole: weights, tokenizer, chat template, generation defaults."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.data.preprocess.train_tokenizer import train_tokenizer
from tests.support.foreign.hf_models import CASES, hf_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
CHAT = [{"role": "user", "content": "what goes along?"}, {"role": "assistant", "content": "everything"}]


def parent_folder(folder: Path, kind: str, changes: dict[str, Any], **generation: Any) -> None:
    """Write a model with a tokenizer, a chat template and generation defaults."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    folder.mkdir()
    text, words = folder / "text.txt", folder / "words.json"
    text.write_text("the tokenizer goes along with the model that knows its tokens " * 20)
    train_tokenizer([text], words, 290)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(words))
    tokenizer.chat_template = TEMPLATE
    model = hf_model(kind, changes | {"vocab_size": len(tokenizer)})
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=2, pad_token_id=0, **generation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in (text, words):
        file.unlink()


@pytest.mark.parametrize("case", ["llama-llama3", "qwen3"])
def test_export_generates_what_its_parent_generates(tmp_path: Path, case: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parent, export = tmp_path / "parent", tmp_path / "export"
    parent_folder(parent, *CASES[case], max_new_tokens=7, repetition_penalty=1.3)

    from_huggingface(parent, tmp_path / "native")
    done = to_huggingface(tmp_path / "native", export)
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(
        done["carried"]
    )
    made = []
    for folder in (parent, export):
        words: Any = AutoTokenizer.from_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        asked = words.apply_chat_template(CHAT, return_tensors="pt", return_dict=True)["input_ids"]
        made.append((asked, again.generate(asked), again.generation_config.to_dict()))
    (asked, expected, options), (asked_again, found, options_again) = made
    assert torch.equal(asked, asked_again)
    assert asked.shape[1] < expected.shape[1] <= asked.shape[1] + 7
    assert torch.equal(expected, found)
    assert options == options_again
    assert (options["max_new_tokens"], options["repetition_penalty"]) == (7, 1.3)
