"""Which fields of a config.json refuse a model: those that may change what it computes, and no others."""

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keepwarm.trainer.convert.__main__ import app
from keepwarm.trainer.convert.huggingface.exporter import to_huggingface
from keepwarm.trainer.convert.huggingface.importer import from_huggingface
from keepwarm.trainer.errors import SpecError
from keepwarm.trainer.model.families.config_fields import _HARMLESS, GENERIC, ConfigFields
from keepwarm.trainer.model.families.registry import FAMILIES
from keepwarm.trainer.model.huggingface_config import model_spec_from_hf_config, read_hf_config
from tests.support.foreign.hf_models import CASES, hf_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 96,
}

# From the config.json of published models.
HARMLESS: dict[str, Any] = {
    "is_llama_config": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "predict_special_tokens": True,
    "_num_labels": 1,
    "_flash_attn_2_enabled": True,
    "use_flash_attn": True,
    "attention_dropout": 0.1,
    "hidden_dropout_prob": 0.1,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "unsloth_version": "2024.9",
    "unsloth_fixed": True,
    "gradient_checkpointing": True,
    "decoder_start_token_id": 0,
    "sep_token_id": 5,
    "temperature": 0.7,
    "max_length": 20,
    "repetition_penalty": 1.2,
    "tokenizer_model_max_length": 4096,
    "generation_config": {"top_p": 0.9},
    "torch_dtype": "bfloat16",
    "id2label": {"0": "LABEL_0"},
    "pretraining_tp": 2,
    "use_cache": False,
    "finetuning_task": "qa",
}

# Each changes what some architecture computes; the value is that of a published model.
COMPUTING: dict[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "n_routed_experts": 64,
    "moe_intermediate_size": 1408,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "alibi": True,
    "clip_qkv": 8.0,
    "use_qk_norm": True,
    "layernorm_embedding": True,
    "quantization_config": {"bits": 4},
    "compressed_quantization": {"format": "int-quantized"},
    "state_size": 16,
    "conv_kernel": 4,
    "attention_sink_size": 4,
    "ffn_dim_multiplier": 1.3,
    "sliding_window_pattern": 6,
    "parallel_attn": True,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_config_field_that_changes_nothing_does_not_refuse_the_model(name: str) -> None:
    assert model_spec_from_hf_config(LLAMA | {name: HARMLESS[name]}) == model_spec_from_hf_config(LLAMA)


@pytest.mark.parametrize("name", COMPUTING)
def test_config_field_that_may_change_the_computation_is_refused_with_its_value(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        model_spec_from_hf_config(LLAMA | {name: COMPUTING[name]})
    text = str(caught.value)
    assert f"{name} = {COMPUTING[name]!r}" in text
    assert f"--ignore-key {name}" in text
    assert f"init_from_ignore_keys: [{name}]" in text


@pytest.mark.parametrize("name", COMPUTING)
def test_config_field_declared_harmless_is_passed_over(name: str) -> None:
    spec, unread = read_hf_config(LLAMA | {name: COMPUTING[name]}, ignored=(name,))
    assert spec == model_spec_from_hf_config(LLAMA)
    assert unread == [name]


def test_config_field_that_is_read_cannot_be_declared_harmless() -> None:
    with pytest.raises(SpecError, match="num_hidden_layers is a field that keepwarm reads"):
        read_hf_config(LLAMA, ignored=("num_hidden_layers",))


def test_config_of_a_model_with_its_own_code_is_judged_strictly() -> None:
    own = LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling_tern.TernForCausalLM"}}
    assert model_spec_from_hf_config(own) == model_spec_from_hf_config(LLAMA)
    with pytest.raises(SpecError, match="feathers = 3 is not understood, and the model's own code"):
        model_spec_from_hf_config(own | {"feathers": 3})


@pytest.mark.parametrize("model_type", FAMILIES.names())
def test_family_takes_every_field_that_its_transformers_class_declares(model_type: str) -> None:
    from transformers import AutoConfig

    if int(importlib.metadata.version("transformers").split(".")[0]) < 5:
        pytest.skip("configuration classes declare their fields since transformers 5")
    config = AutoConfig.for_model(model_type)
    fields = ConfigFields({**config.to_dict(), "model_type": model_type})
    FAMILIES.get(model_type)().read_config(fields)
    declared = {field.name for field in dataclasses.fields(config)}
    unread = {name for name in declared - fields._used - GENERIC if not _HARMLESS.search(name)}
    assert unread - {"is_encoder_decoder"} == set()


def test_convert_passes_over_a_field_that_the_user_declares_harmless(tmp_path: Path) -> None:
    hf_model(*CASES["llama"]).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"logit_scale": 3.0, "is_llama_config": True}))
    command = ["--from", "hf", "--to", "native", str(tmp_path / "hf"), str(tmp_path / "native"), "--json"]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, SpecError)
    assert "--ignore-key logit_scale" in str(refused.exception)
    done = CliRunner().invoke(app, [*command, "--ignore-key", "logit_scale"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["unread"] == ["is_llama_config", "logit_scale"]
    to_huggingface(tmp_path / "native", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["logit_scale"] == 3.0


def test_convert_takes_ignored_fields_for_the_config_of_other_formats(tmp_path: Path) -> None:
    hf_model(*CASES["llama"]).save_pretrained(tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "native")
    path = str(tmp_path / "dcp")
    assert CliRunner().invoke(app, ["--from", "native", "--to", "dcp", str(tmp_path / "native"), path]).exit_code == 0
    (tmp_path / "dcp/keepwarm.json").unlink()
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads((tmp_path / "hf/config.json").read_text()) | {"logit_scale": 3.0}))
    command = ["--from", "dcp", "--to", "native", path, str(tmp_path / "again"), "--config", str(config)]
    refused = CliRunner().invoke(app, command)
    assert f"{config}: logit_scale = 3.0" in str(refused.exception)
    assert CliRunner().invoke(app, [*command, "--ignore-key", "logit_scale"]).exit_code == 0


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"is_causal": False}, "is_causal = False"),
        ({"auto_map": {"AutoModelForCausalLM": "m.X"}, "use_x": 0}, "use_x = 0"),
    ],
)
def test_config_field_that_is_off_is_refused_if_that_may_change_the_computation(
    tmp_path: Path, extra: dict[str, object], named: str
) -> None:
    hf_model(*CASES["llama"]).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | extra))
    with pytest.raises(SpecError, match=named):
        from_huggingface(tmp_path / "hf", tmp_path / "native")


def test_config_field_that_states_causal_attention_is_read(tmp_path: Path) -> None:
    hf_model(*CASES["llama"]).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_causal": True}))
    from_huggingface(tmp_path / "hf", tmp_path / "native")
