"""Megatron Core's own GPTModel on the CPU, written and read back by its own `dist_checkpointing`, converted in between.

    python -m tests.support.foreign.megatron_gpt FOLDER

For each kind of `SHAPES`, FOLDER/kind has the `model.yaml`. `theirs` is a random model that Megatron saved, `native`
what was converted from that, `back` what was converted back; weights and logits of its model as it was, and as it is
after loading `back`, go to `theirs.safetensors` and `back.safetensors`. A process of its own: Megatron wants a main
module that it can start again, and two attributes of torch.cuda.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "add_bias_linear": False,
    },
    "gpt": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "normalization": "LayerNorm",
        "add_bias_linear": True,
    },
}
SHAPES["llama-3.2"] = SHAPES["llama"]
SHAPES["qwen3"] = SHAPES["llama"] | {"qk_layernorm": True, "kv_channels": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt": {"position_embedding_type": "learned_absolute", "share_embeddings_and_output_weights": True},
    "llama-3.2": {
        "share_embeddings_and_output_weights": True,
        "rotary_base": 500000,
        "rope_scaling": True,
        "rope_scaling_factor": 32,
    },
    "qwen3": {"rotary_base": 1000000},
}
"""What the model gets beside its configuration."""
VOCABULARY, SEQUENCE = 40, 16
TOKENS = torch.arange(2 * 8).reshape(2, 8) * 7 % VOCABULARY


def model(kind: str) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    activation = torch.nn.functional.gelu if kind == "gpt" else torch.nn.functional.silu
    config = TransformerConfig(
        **SHAPES[kind],
        use_cpu_initialization=True,
        activation_func=activation,
        layernorm_epsilon=1e-5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=True,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "max_sequence_length": SEQUENCE,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "rotary_base": 10000,
    }
    layer = get_gpt_layer_local_spec(
        normalization=SHAPES[kind]["normalization"], qk_layernorm=SHAPES[kind].get("qk_layernorm", False)
    )
    return GPTModel(config=config, transformer_layer_spec=layer, **(common | MODELS[kind])).eval()


def logits(gpt: Any) -> torch.Tensor:
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    mask = torch.ones(TOKENS.shape[1], TOKENS.shape[1], dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        found: torch.Tensor = gpt(TOKENS, positions, mask)
    return found


def state_of(gpt: Any) -> dict[str, torch.Tensor]:
    weights = {name: value.detach().contiguous() for name, value in gpt.named_parameters()}
    return {**weights, "logits": logits(gpt).contiguous()}


def main(folder: Path) -> None:
    import megatron.core.tensor_parallel.random as tracker
    import safetensors.torch
    from megatron.core import dist_checkpointing, parallel_state

    from keepwarm.trainer.convert.dcp.exporter import to_dcp
    from keepwarm.trainer.convert.importer import ImportOptions, from_dcp

    torch.cuda.synchronize = lambda *arguments: None
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.distributed.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tracker.initialize_rng_tracker(inference_rng_tracker=True)
    for kind in SHAPES:
        at = folder / kind
        gpt = model(kind)
        torch.manual_seed(11)
        with torch.no_grad():
            for name, parameter in gpt.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2 + float("norm" in name and "weight" in name))
        (at / "theirs").mkdir()
        dist_checkpointing.save({**gpt.sharded_state_dict(), "iteration": 3}, str(at / "theirs"))
        safetensors.torch.save_file(state_of(gpt), at / "theirs.safetensors")
        from_dcp(at / "theirs", at / "native", kind="megatron", options=ImportOptions(config=at / "model.yaml"))
        to_dcp(at / "native", at / "back", kind="megatron")
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.zero_()
        loaded, *differences = dist_checkpointing.load(gpt.sharded_state_dict(), str(at / "back"), strict="return_all")
        # What Transformer Engine keeps for FP8, empty without it.
        odd = [name for names in differences for name in names if not name.endswith("._extra_state")]
        assert not odd, odd
        gpt.load_state_dict({name: value for name, value in loaded.items() if name in gpt.state_dict()}, strict=False)
        safetensors.torch.save_file(state_of(gpt), at / "back.safetensors")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(Path(sys.argv[1]))
