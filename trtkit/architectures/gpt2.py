"""GPT-2.

Names and rules: tensorrt_llm/models/gpt/convert.py, tensorrt_llm/models/gpt/config.py and
tensorrt_llm/models/gpt/model.py. GPT-2 stores its linears (in_features, out_features); the position table is sharded
like the token embedding.
"""

from __future__ import annotations

from typing import Any

from trtkit.architectures.rules import (
    Architecture,
    Config,
    Part,
    Weight,
    column,
    embedding,
    joined_qkv,
    layer_norm,
    lm_head,
    replicated,
    row,
)
from trtkit.architectures.settings import choice, decoder_config, flag, integer, must_be, number, respelled

_HF = "transformer.h.{layer}."
_TRT = "transformer.layers.{layer}."
_ACTIVATIONS = ("gelu_new", "gelu", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu")

WEIGHTS = (
    embedding("transformer.wte.weight"),
    Weight(
        "transformer.position_embedding.weight",
        (Part("transformer.wpe.weight", ("positions", "hidden"), "embedding"),),
        "first",
    ),
    *layer_norm(f"{_TRT}input_layernorm", f"{_HF}ln_1"),
    joined_qkv(f"{_TRT}attention.qkv.weight", f"{_HF}attn.c_attn.weight", "hidden", transposed=True),
    joined_qkv(f"{_TRT}attention.qkv.bias", f"{_HF}attn.c_attn.bias"),
    row(f"{_TRT}attention.dense.weight", f"{_HF}attn.c_proj.weight", "hidden", "q", transposed=True),
    replicated(f"{_TRT}attention.dense.bias", f"{_HF}attn.c_proj.bias", "hidden"),
    *layer_norm(f"{_TRT}post_layernorm", f"{_HF}ln_2"),
    column(f"{_TRT}mlp.fc.weight", f"{_HF}mlp.c_fc.weight", "intermediate", "hidden", transposed=True),
    column(f"{_TRT}mlp.fc.bias", f"{_HF}mlp.c_fc.bias", "intermediate"),
    row(f"{_TRT}mlp.proj.weight", f"{_HF}mlp.c_proj.weight", "hidden", "intermediate", transposed=True),
    replicated(f"{_TRT}mlp.proj.bias", f"{_HF}mlp.c_proj.bias", "hidden"),
    *layer_norm("transformer.ln_f", "transformer.ln_f", stage="last"),
    *lm_head("lm_head.weight", "transformer.wte.weight"),
)


def checkpoint_config(hf: Config) -> dict[str, Any]:
    hf = respelled(
        hf,
        n_embd=("n_embd", "hidden_size"),
        n_layer=("n_layer", "num_hidden_layers"),
        n_head=("n_head", "num_attention_heads"),
        n_positions=("n_positions", "max_position_embeddings"),
    )
    must_be(hf, "scale_attn_weights", True, default=True)
    must_be(hf, "scale_attn_by_inverse_layer_idx", False, default=False)
    must_be(hf, "reorder_and_upcast_attn", False, default=False)
    must_be(hf, "add_cross_attention", False, default=False)
    decoder = decoder_config(
        {**hf, "head_dim": None}, hidden="n_embd", layers="n_layer", heads="n_head", kv_heads="n_head"
    )
    return {
        **decoder,
        "gpt_variant": "gpt2",
        "intermediate_size": integer(hf, "n_inner", 4 * decoder["hidden_size"]),
        "max_position_embeddings": integer(hf, "n_positions"),
        "position_embedding_type": "learned_absolute",
        "hidden_act": choice(hf, "activation_function", _ACTIVATIONS, default="gelu_new"),
        "norm_epsilon": number(hf, "layer_norm_epsilon", 1e-5),
        "bias": True,
        "q_scaling": 1.0,
        "embedding_scale": None,
        "apply_query_key_layer_scaling": False,
        "rotary_pct": 1.0,
        "rotary_base": 10000.0,
        "rotary_scaling": None,
        "qk_layernorm": False,
        "inner_layernorm": False,
        "norm_before_bmm1": False,
        "tie_word_embeddings": flag(hf, "tie_word_embeddings", True),
    }


def huggingface_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": [config["architecture"]],
        "model_type": "gpt2",
        "vocab_size": config["vocab_size"],
        "n_positions": config["max_position_embeddings"],
        "n_embd": config["hidden_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_inner": config["intermediate_size"],
        "activation_function": config["hidden_act"],
        "layer_norm_epsilon": config["norm_epsilon"],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=WEIGHTS,
    renames=((r"^(?=(wte|wpe|h|ln_f)\.)", "transformer."),),
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    notes="no scale_attn_by_inverse_layer_idx, no reorder_and_upcast_attn, no cross-attention",
)
