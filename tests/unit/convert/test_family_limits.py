"""Settings that TRT-LLM's model classes cannot express are refused, by the key's name; what they can express is not."""

from __future__ import annotations

from typing import Any

import pytest

from trtkit import architectures
from trtkit.errors import InputError
from trtkit.hf import normalize_config

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
BASES: dict[str, dict[str, Any]] = {
    "BloomForCausalLM": {"vocab_size": 131, "n_embed": 64, "n_layer": 4, "num_attention_heads": 8},
    "FalconForCausalLM": SIZES,
    "GPT2LMHeadModel": {"vocab_size": 131, "n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 64},
    "GPTNeoXForCausalLM": {**SIZES, "intermediate_size": 256},
    "OPTForCausalLM": {**SIZES, "ffn_dim": 96},
    "Starcoder2ForCausalLM": {**SIZES, "intermediate_size": 96},
}
"""The least that a config of each architecture must say."""
NEW_FALCON = {"new_decoder_architecture": True}
LINEAR_ROPE = {"type": "linear", "factor": 2.0}
LIMITS: list[tuple[str, dict[str, Any], str]] = [
    ("BloomForCausalLM", {"apply_residual_connection_post_layernorm": True}, "does not run apply_residual_connection"),
    ("BloomForCausalLM", {"layer_norm_epsilon": 1e-6}, "does not run layer_norm_epsilon 1e-06"),
    ("BloomForCausalLM", {"n_embed": 60}, "no multiple of n_head 8"),
    ("FalconForCausalLM", {"activation": "relu"}, "does not run activation 'relu'"),
    ("FalconForCausalLM", {"layer_norm_epsilon": 1e-6}, "does not run layer_norm_epsilon 1e-06"),
    ("FalconForCausalLM", {"rope_scaling": LINEAR_ROPE}, "does not run rope_scaling"),
    ("FalconForCausalLM", {"bias": True}, "does not run bias True"),
    ("FalconForCausalLM", {**NEW_FALCON, "bias": True}, "does not run bias True"),
    ("FalconForCausalLM", {**NEW_FALCON, "parallel_attn": False}, "does not run parallel_attn False"),
    ("FalconForCausalLM", {**NEW_FALCON, "num_ln_in_parallel_attn": 3}, "parallel_attn is 3, expected 1 or 2"),
    ("FalconForCausalLM", {**NEW_FALCON, "num_kv_heads": 3}, "8 is no multiple of num_kv_heads 3"),
    ("FalconForCausalLM", {"num_ln_in_parallel_attn": 2}, "does not run num_ln_in_parallel_attn 2"),
    ("FalconForCausalLM", {"multi_query": False, "num_kv_heads": 2}, "does not run num_kv_heads 2"),
    ("FalconForCausalLM", {"alibi": "yes"}, "alibi is 'yes', expected true or false"),
    ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "does not run scale_attn_by_inverse_layer_idx True"),
    ("GPT2LMHeadModel", {"reorder_and_upcast_attn": True}, "does not run reorder_and_upcast_attn True"),
    ("GPT2LMHeadModel", {"scale_attn_weights": False}, "does not run scale_attn_weights False"),
    ("GPT2LMHeadModel", {"add_cross_attention": True}, "does not run add_cross_attention True"),
    ("GPT2LMHeadModel", {"activation_function": "mish"}, "activation_function is 'mish', expected one of gelu_new"),
    ("GPT2LMHeadModel", {"n_positions": None}, "n_positions is None, expected a positive integer"),
    ("GPT2LMHeadModel", {"n_head": 7}, "n_embd 64 is no multiple of n_head 7"),
    ("GPTNeoXForCausalLM", {"use_parallel_residual": False}, "does not run use_parallel_residual False"),
    ("GPTNeoXForCausalLM", {"attention_bias": False}, "does not run attention_bias False"),
    ("GPTNeoXForCausalLM", {"intermediate_size": 128}, "does not run intermediate_size 128"),
    ("GPTNeoXForCausalLM", {"layer_norm_eps": 1e-6}, "does not run layer_norm_eps 1e-06"),
    ("GPTNeoXForCausalLM", {"rope_scaling": LINEAR_ROPE}, "does not run rope_scaling"),
    ("GPTNeoXForCausalLM", {"hidden_act": "mish"}, "hidden_act is 'mish', expected one of gelu"),
    ("OPTForCausalLM", {"word_embed_proj_dim": 32}, "does not run word_embed_proj_dim 32"),
    ("OPTForCausalLM", {"enable_bias": False}, "does not run enable_bias False"),
    ("OPTForCausalLM", {"layer_norm_elementwise_affine": False}, "does not run layer_norm_elementwise_affine False"),
    ("OPTForCausalLM", {"_remove_final_layer_norm": True}, "does not run _remove_final_layer_norm True"),
    ("OPTForCausalLM", {"activation_function": "mish"}, "activation_function is 'mish', expected one of relu"),
    ("Starcoder2ForCausalLM", {"hidden_act": "relu"}, "hidden_act is 'relu', expected one of gelu_pytorch_tanh"),
    ("Starcoder2ForCausalLM", {"partial_rotary_factor": 0.5}, "does not run partial_rotary_factor 0.5"),
    ("Starcoder2ForCausalLM", {"rope_scaling": {"type": "other"}}, "rope type 'other' is not one that TRT-LLM runs"),
]

KEYS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("BloomForCausalLM", {}, {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "head_size": 8}),
    ("BloomForCausalLM", {}, {"intermediate_size": 256, "max_position_embeddings": 2048, "tie_word_embeddings": True}),
    ("BloomForCausalLM", {"seq_length": 4096}, {"max_position_embeddings": 4096, "position_embedding_type": "alibi"}),
    ("FalconForCausalLM", {"num_kv_heads": 8}, {"num_key_value_heads": 1, "parallel_attention": True}),
    ("FalconForCausalLM", {"multi_query": False}, {"num_key_value_heads": 8, "new_decoder_architecture": False}),
    ("FalconForCausalLM", {**NEW_FALCON, "num_kv_heads": 2}, {"num_key_value_heads": 2, "num_ln_in_parallel_attn": 2}),
    ("FalconForCausalLM", {**NEW_FALCON, "num_ln_in_parallel_attn": 1}, {"num_ln_in_parallel_attn": 1}),
    ("FalconForCausalLM", {}, {"position_embedding_type": "rope_gpt_neox", "intermediate_size": 256}),
    ("FalconForCausalLM", {"rope_theta": 500042.0}, {"rotary_base": 500042.0, "tie_word_embeddings": True}),
    ("FalconForCausalLM", {"alibi": True}, {"position_embedding_type": "alibi_with_scale"}),
    ("FalconForCausalLM", {"parallel_attn": False, "bias": True}, {"bias": True, "parallel_attention": False}),
    ("GPT2LMHeadModel", {}, {"gpt_variant": "gpt2", "hidden_act": "gelu_new", "intermediate_size": 256, "bias": True}),
    ("GPT2LMHeadModel", {}, {"position_embedding_type": "learned_absolute", "max_position_embeddings": 64}),
    ("GPT2LMHeadModel", {"layer_norm_epsilon": 1e-6, "n_inner": 96}, {"norm_epsilon": 1e-6, "intermediate_size": 96}),
    ("GPTNeoXForCausalLM", {"rotary_emb_base": 5000}, {"rotary_emb_base": 5000.0, "rotary_base": 5000.0}),
    ("GPTNeoXForCausalLM", {}, {"rotary_pct": 0.25, "tie_word_embeddings": False}),
    ("GPTNeoXForCausalLM", {"rotary_pct": 1.0}, {"rotary_pct": 1.0, "rotary_scaling": None}),
    ("OPTForCausalLM", {}, {"do_layer_norm_before": True, "intermediate_size": 96, "hidden_act": "relu"}),
    ("OPTForCausalLM", {"do_layer_norm_before": False}, {"do_layer_norm_before": False, "max_position_embeddings": 64}),
    ("Starcoder2ForCausalLM", {"num_key_value_heads": 2}, {"num_key_value_heads": 2, "gpt_variant": "starcoder2"}),
    ("Starcoder2ForCausalLM", {"sliding_window": 16}, {"sliding_window": 16, "rotary_pct": 1.0, "bias": True}),
]
"""What a config becomes in the checkpoint's: TRT-LLM builds another model, silently, from a wrong value here."""


def checkpoint_config(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    raw = {**BASES[name], **changes, "architectures": [name]}
    return architectures.get(name).checkpoint_config(normalize_config(raw))


@pytest.mark.parametrize("name", BASES)
def test_the_least_config_is_enough(name: str) -> None:
    assert checkpoint_config(name, {})["architecture"] == name


@pytest.mark.parametrize(("name", "changes", "message"), LIMITS)
def test_what_trt_llm_does_not_run_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        checkpoint_config(name, changes)
    assert message in error.value.cause


@pytest.mark.parametrize(("name", "changes", "expected"), KEYS)
def test_keys_of_the_checkpoint(name: str, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    config = checkpoint_config(name, changes)
    assert {key: config[key] for key in expected} == expected
