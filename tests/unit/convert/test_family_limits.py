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
ROTARY = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 96, "rms_norm_eps": 1e-6}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BASES: dict[str, dict[str, Any]] = {
    "BloomForCausalLM": {"vocab_size": 131, "n_embed": 64, "n_layer": 4, "num_attention_heads": 8},
    "FalconForCausalLM": SIZES,
    "GemmaForCausalLM": ROTARY,
    "Gemma2ForCausalLM": ROTARY,
    "Gemma3ForCausalLM": ROTARY,
    "GPT2LMHeadModel": {"vocab_size": 131, "n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 64},
    "GPTNeoXForCausalLM": {**SIZES, "intermediate_size": 256},
    "OPTForCausalLM": {**SIZES, "ffn_dim": 96},
    "Phi3ForCausalLM": {**ROTARY, "hidden_act": "silu"},
    "PhiForCausalLM": {**SIZES, "intermediate_size": 96, "hidden_act": "gelu_new"},
    "Starcoder2ForCausalLM": {**SIZES, "intermediate_size": 96},
    "MixtralForCausalLM": {**ROTARY, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2ForCausalLM": ROTARY,
    "Qwen2MoeForCausalLM": {**ROTARY, **MIXTURE, "shared_expert_intermediate_size": 40},
    "Qwen3ForCausalLM": ROTARY,
    "Qwen3MoeForCausalLM": {**ROTARY, **MIXTURE},
}
"""The least that a config of each architecture must say."""
NEW_FALCON = {"new_decoder_architecture": True}
LINEAR_ROPE = {"type": "linear", "factor": 2.0}
YARN_ROPE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
LONG_ROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
MIXED = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
EXTENDED = {"original_max_position_embeddings": 16}
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
    ("GemmaForCausalLM", {"hidden_act": "silu"}, "does not run hidden_act 'silu'"),
    ("GemmaForCausalLM", {"hidden_activation": "gelu"}, "does not run hidden_activation 'gelu'"),
    ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "does not run use_bidirectional_attention True"),
    ("GemmaForCausalLM", {"rope_scaling": {"type": "other"}}, "rope type 'other' is not one that TRT-LLM runs"),
    ("Gemma2ForCausalLM", {"attn_logit_softcapping": "50"}, "attn_logit_softcapping is '50', expected a positive"),
    ("Gemma2ForCausalLM", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0, expected a positive number"),
    ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 0.5}, "query_pre_attn_scalar is 0.5, expected a positive integer"),
    ("Gemma2ForCausalLM", {"layer_types": ["full_attention"]}, "expected 4 of sliding_attention and full_attention"),
    ("Gemma2ForCausalLM", {"layer_types": ["chunked_attention"] * 4}, "expected 4 of sliding_attention and"),
    ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "does not run attn_logit_softcapping 50.0"),
    ("Gemma3ForCausalLM", {"rope_scaling": LINEAR_ROPE}, "would scale the sliding-window layers too"),
    ("Gemma3ForCausalLM", {"layer_types": MIXED}, "does not run these layer_types"),
    ("Gemma3ForCausalLM", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0, expected a positive integer"),
    ("Phi3ForCausalLM", {"hidden_act": "gelu"}, "does not run hidden_act 'gelu'"),
    ("Phi3ForCausalLM", {"attention_bias": True}, "does not run attention_bias True"),
    ("Phi3ForCausalLM", {"head_dim": 16}, "does not run head_dim 16"),
    ("Phi3ForCausalLM", {"rope_scaling": LINEAR_ROPE}, "does not run rope_type 'linear'"),
    ("Phi3ForCausalLM", {"rope_scaling": {**LONG_ROPE, "long_factor": [2.0] * 3}}, "long_factor has 3 factors"),
    ("Phi3ForCausalLM", {"rope_scaling": LONG_ROPE, "original_max_position_embeddings": 1}, "is 1, expected more than"),
    ("Phi3ForCausalLM", {"rope_scaling": {**LONG_ROPE, "factor": 2.0}, **EXTENDED}, "does not run the factors"),
    ("Phi3ForCausalLM", {"rope_scaling": {**LONG_ROPE, "attention_factor": 1.1}, **EXTENDED}, "does not run the fac"),
    ("Phi3ForCausalLM", {"rope_theta": 10**400}, "rope_theta is 10"),
    ("PhiForCausalLM", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, expected a share of at most 1"),
    ("PhiForCausalLM", {"qk_layernorm": True}, "does not run qk_layernorm True"),
    ("PhiForCausalLM", {"num_key_value_heads": 2}, "does not run num_key_value_heads 2"),
    ("PhiForCausalLM", {"layer_norm_eps": 1e-6}, "does not run layer_norm_eps 1e-06"),
    ("PhiForCausalLM", {"rope_scaling": LINEAR_ROPE}, "does not run rope_scaling"),
    ("PhiForCausalLM", {"hidden_act": "mish"}, "hidden_act is 'mish', expected one of gelu_new"),
    ("Starcoder2ForCausalLM", {"hidden_act": "relu"}, "hidden_act is 'relu', expected one of gelu_pytorch_tanh"),
    ("Starcoder2ForCausalLM", {"partial_rotary_factor": 0.5}, "does not run partial_rotary_factor 0.5"),
    ("Starcoder2ForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "does not run rope_type 'dynamic'"),
    ("MixtralForCausalLM", {"hidden_act": "gelu"}, "does not run hidden_act 'gelu'"),
    ("MixtralForCausalLM", {"num_local_experts": 1}, "TRT-LLM runs no mixture of 1 expert"),
    ("MixtralForCausalLM", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than the 4 experts"),
    ("MixtralForCausalLM", {"num_local_experts": None}, "num_local_experts is None, expected a positive integer"),
    ("MixtralForCausalLM", {"sliding_window": 0}, "sliding_window is 0, expected a positive integer"),
    ("Qwen2ForCausalLM", {"hidden_act": "gelu"}, "does not run hidden_act 'gelu'"),
    ("Qwen2ForCausalLM", {**WINDOW, "layer_types": ["full_attention"]}, "expected a list of 4 types of layers"),
    ("Qwen2ForCausalLM", {**WINDOW, "layer_types": ["linear_attention"] * 4}, "layer type 'linear_attention'"),
    ("Qwen2ForCausalLM", {**WINDOW, "max_window_layers": "all"}, "max_window_layers is 'all', expected a number"),
    ("Qwen2ForCausalLM", {"rope_scaling": {**YARN_ROPE, "attention_factor": 1.5}}, "it would take 1.13863"),
    ("Qwen2ForCausalLM", {"rope_scaling": {**YARN_ROPE, "truncate": False}}, "does not run YaRN with truncate False"),
    ("Qwen2MoeForCausalLM", {"mlp_only_layers": [0]}, "does not run mlp_only_layers [0]"),
    ("Qwen2MoeForCausalLM", {"decoder_sparse_step": 2}, "does not run decoder_sparse_step 2"),
    ("Qwen2MoeForCausalLM", {"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
    ("Qwen2MoeForCausalLM", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
    ("Qwen3ForCausalLM", {"attention_bias": True}, "does not run attention_bias True"),
    ("Qwen3MoeForCausalLM", {"attention_bias": True}, "does not run attention_bias True"),
    ("Qwen3MoeForCausalLM", {"mlp_only_layers": [3]}, "does not run mlp_only_layers [3]"),
]

YARN = {
    **YARN_ROPE, "rope_type": "yarn", "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0,
}  # fmt: skip
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
    ("MixtralForCausalLM", {}, {"moe": {"num_experts": 4, "top_k": 2, "normalization_mode": 1}}),
    ("MixtralForCausalLM", {}, {"hidden_act": "swiglu", "attn_bias": False, "mlp_bias": False}),
    ("Qwen2ForCausalLM", {}, {"qwen_type": "qwen2", "attn_bias": True, "mlp_bias": False, "hidden_act": "silu"}),
    ("Qwen2ForCausalLM", {**WINDOW, "max_window_layers": 3}, {"sliding_window": 8, "sliding_window_layers": [3]}),
    ("Qwen2ForCausalLM", {"rope_scaling": YARN_ROPE}, {"rotary_scaling": YARN}),
    (
        "Qwen2ForCausalLM",
        {"rope_scaling": {**YARN_ROPE, "attention_factor": 1.138629436, "beta_fast": 16, "mscale": 0.7}},
        {"rotary_scaling": {**YARN, "beta_fast": 16}},
    ),
    (
        "Qwen2ForCausalLM",
        {"rope_scaling": {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 0.5}},
        {"rotary_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}},
    ),
    ("Qwen2MoeForCausalLM", {}, {"qwen_type": "qwen2_moe", "attn_bias": True, "hidden_act": "swiglu"}),
    ("Qwen2MoeForCausalLM", {"qkv_bias": False}, {"attn_bias": False, "moe_shared_expert_intermediate_size": 40}),
    ("Qwen2MoeForCausalLM", {**WINDOW, "max_window_layers": 2}, {"sliding_window_layers": [0]}),
    ("Qwen3ForCausalLM", {}, {"qwen_type": "qwen3", "attn_bias": False, "head_size": 128}),
    ("Qwen3MoeForCausalLM", {}, {"qwen_type": "qwen3_moe", "attn_bias": False, "head_size": 8}),
    ("Qwen3MoeForCausalLM", WINDOW, {"sliding_window": 8, "sliding_window_layers": [0, 1, 2, 3]}),
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
