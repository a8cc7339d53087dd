"""Falcon: 7B (one key/value head), 40B, 180B and Falcon2-11B ("new decoder architecture"), Falcon-RW (alibi).

Names and rules: tensorrt_llm/models/falcon/convert.py, tensorrt_llm/models/falcon/config.py and
tensorrt_llm/models/falcon/model.py.
"""

from __future__ import annotations

from typing import Any

from trtkit.architectures.rules import (
    Architecture,
    Config,
    column,
    embedding,
    grouped_qkv,
    layer_norm,
    lm_head,
    replicated,
    row,
)
from trtkit.architectures.settings import decoder_config, flag, integer, must_be, number, respelled, unexpected

_HF = "transformer.h.{layer}."
_TRT = "transformer.layers.{layer}."


def _has_bias(config: Config) -> bool:
    return bool(config["bias"])


def _has_two_norms(config: Config) -> bool:
    """The new architecture norms the inputs of attention and MLP apart, unless it is told not to (Falcon2-11B)."""
    return bool(config["new_decoder_architecture"]) and config.get("num_ln_in_parallel_attn") != 1


def _has_one_norm(config: Config) -> bool:
    return not _has_two_norms(config)


def _is_sequential(config: Config) -> bool:
    return not config["new_decoder_architecture"] and not config["parallel_attention"]


WEIGHTS = (
    embedding("transformer.word_embeddings.weight"),
    *layer_norm(f"{_TRT}input_layernorm", f"{_HF}input_layernorm", when=_has_one_norm),
    *layer_norm(f"{_TRT}input_layernorm", f"{_HF}ln_attn", when=_has_two_norms),
    *layer_norm(f"{_TRT}mlp_layernorm", f"{_HF}ln_mlp", when=_has_two_norms),
    grouped_qkv(f"{_TRT}attention.qkv.weight", f"{_HF}self_attention.query_key_value.weight", "hidden"),
    grouped_qkv(f"{_TRT}attention.qkv.bias", f"{_HF}self_attention.query_key_value.bias", when=_has_bias),
    row(f"{_TRT}attention.dense.weight", f"{_HF}self_attention.dense.weight", "hidden", "q"),
    replicated(f"{_TRT}attention.dense.bias", f"{_HF}self_attention.dense.bias", "hidden", when=_has_bias),
    *layer_norm(f"{_TRT}post_layernorm", f"{_HF}post_attention_layernorm", when=_is_sequential),
    column(f"{_TRT}mlp.fc.weight", f"{_HF}mlp.dense_h_to_4h.weight", "intermediate", "hidden"),
    column(f"{_TRT}mlp.fc.bias", f"{_HF}mlp.dense_h_to_4h.bias", "intermediate", when=_has_bias),
    row(f"{_TRT}mlp.proj.weight", f"{_HF}mlp.dense_4h_to_h.weight", "hidden", "intermediate"),
    replicated(f"{_TRT}mlp.proj.bias", f"{_HF}mlp.dense_4h_to_h.bias", "hidden", when=_has_bias),
    *layer_norm("transformer.ln_f", "transformer.ln_f", stage="last"),
    *lm_head("lm_head.weight", "transformer.word_embeddings.weight"),
)


def checkpoint_config(hf: Config) -> dict[str, Any]:
    hf = respelled(hf, hidden_size=("n_embed", "hidden_size"))
    alibi = flag(hf, "alibi")
    must_be(hf, "activation", "gelu", default="gelu")
    must_be(hf, "apply_residual_connection_post_layernorm", False, default=False)
    must_be(hf, "layer_norm_epsilon", 1e-5, default=1e-5)  # TRT-LLM reads it for some of the norms only
    must_be(hf, "rope_scaling", None)
    decoder = decoder_config({**hf, "head_dim": None, "num_kv_heads": _kv_heads(hf)}, kv_heads="num_kv_heads")
    return {
        **decoder,
        **_block(hf),
        "intermediate_size": integer(hf, "ffn_hidden_size", 4 * decoder["hidden_size"]),
        "max_position_embeddings": integer(hf, "max_position_embeddings", 2048),
        "position_embedding_type": "alibi_with_scale" if alibi else "rope_gpt_neox",
        "rotary_base": number(hf, "rope_theta"),
        "rotary_scaling": None,
        "hidden_act": "gelu",
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": flag(hf, "tie_word_embeddings", True),
    }


def _kv_heads(hf: Config) -> int:
    heads = integer(hf, "num_attention_heads")
    if flag(hf, "new_decoder_architecture"):
        return integer(hf, "num_kv_heads", heads)
    if flag(hf, "multi_query", True):
        return 1  # whatever num_kv_heads says: Falcon-7B's config has 71 there
    must_be(hf, "num_kv_heads", heads, default=heads)
    return heads


def _block(hf: Config) -> dict[str, Any]:
    """The keys that tell how attention and MLP of a layer hang together."""
    new, parallel = flag(hf, "new_decoder_architecture"), flag(hf, "parallel_attn", True)
    bias, norms = flag(hf, "bias"), hf.get("num_ln_in_parallel_attn")
    if new:
        must_be(hf, "parallel_attn", True, default=True)
        norms = 2 if norms is None else norms
        if norms not in (1, 2):
            raise unexpected("num_ln_in_parallel_attn", norms, "1 or 2")
    elif norms == 2:
        must_be(hf, "num_ln_in_parallel_attn", 1)
    if new or parallel:
        # TRT-LLM sums such blocks over the ranks after their biases are added, so TP would add them several times.
        must_be(hf, "bias", False, default=False)
    return {
        "new_decoder_architecture": new,
        "parallel_attention": parallel,
        "num_ln_in_parallel_attn": norms,
        "bias": bias,
    }


def huggingface_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": [config["architecture"]],
        "model_type": "falcon",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "multi_query": config["num_key_value_heads"] == 1,
        "new_decoder_architecture": config["new_decoder_architecture"],
        "parallel_attn": config["parallel_attention"],
        "num_ln_in_parallel_attn": config["num_ln_in_parallel_attn"],
        "bias": config["bias"],
        "ffn_hidden_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "alibi": config["position_embedding_type"] == "alibi_with_scale",
        "rope_theta": config["rotary_base"],
        "layer_norm_epsilon": config["norm_epsilon"],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=WEIGHTS,
    ignored=(r"transformer\.h\.\d+\.self_attention\.(maybe_rotary|rotary_emb)\.inv_freq",),
    notes="biases only without parallel attention (Falcon-RW); no scaled rope",
)
