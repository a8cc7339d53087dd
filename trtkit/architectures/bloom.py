"""BLOOM.

Names and rules: tensorrt_llm/models/bloom/model.py and examples/models/contrib/bloom/convert_checkpoint.py. Query, key
and value of each head lie beside each other in Hugging Face's tensor.
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
from trtkit.architectures.settings import decoder_config, flag, integer, must_be, respelled

_HF = "transformer.h.{layer}."
_TRT = "transformer.layers.{layer}."
_TRAINED_LENGTH = 2048
"""Tokens that the published models were trained with: alibi sets no limit, but engines need one."""

WEIGHTS = (
    embedding("transformer.word_embeddings.weight"),
    *layer_norm("transformer.ln_embed", "transformer.word_embeddings_layernorm", stage="first"),
    *layer_norm(f"{_TRT}input_layernorm", f"{_HF}input_layernorm"),
    grouped_qkv(f"{_TRT}attention.qkv.weight", f"{_HF}self_attention.query_key_value.weight", "hidden"),
    grouped_qkv(f"{_TRT}attention.qkv.bias", f"{_HF}self_attention.query_key_value.bias"),
    row(f"{_TRT}attention.dense.weight", f"{_HF}self_attention.dense.weight", "hidden", "q"),
    replicated(f"{_TRT}attention.dense.bias", f"{_HF}self_attention.dense.bias", "hidden"),
    *layer_norm(f"{_TRT}post_layernorm", f"{_HF}post_attention_layernorm"),
    column(f"{_TRT}mlp.fc.weight", f"{_HF}mlp.dense_h_to_4h.weight", "intermediate", "hidden"),
    column(f"{_TRT}mlp.fc.bias", f"{_HF}mlp.dense_h_to_4h.bias", "intermediate"),
    row(f"{_TRT}mlp.proj.weight", f"{_HF}mlp.dense_4h_to_h.weight", "hidden", "intermediate"),
    replicated(f"{_TRT}mlp.proj.bias", f"{_HF}mlp.dense_4h_to_h.bias", "hidden"),
    *layer_norm("transformer.ln_f", "transformer.ln_f", stage="last"),
    *lm_head("lm_head.weight", "transformer.word_embeddings.weight"),
)


def checkpoint_config(hf: Config) -> dict[str, Any]:
    hf = respelled(
        hf,
        hidden_size=("n_embed", "hidden_size"),
        n_layer=("n_layer", "num_hidden_layers"),
        n_head=("n_head", "num_attention_heads"),
        seq_length=("seq_length", "max_position_embeddings"),
    )
    must_be(hf, "apply_residual_connection_post_layernorm", False, default=False)
    must_be(hf, "layer_norm_epsilon", 1e-5, default=1e-5)  # TRT-LLM's class does not read it
    decoder = decoder_config({**hf, "head_dim": None}, layers="n_layer", heads="n_head", kv_heads="n_head")
    return {
        **decoder,
        "intermediate_size": 4 * decoder["hidden_size"],
        "max_position_embeddings": integer(hf, "seq_length", _TRAINED_LENGTH),
        "position_embedding_type": "alibi",
        "hidden_act": "gelu",
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": flag(hf, "tie_word_embeddings", True),
    }


def huggingface_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": [config["architecture"]],
        "model_type": "bloom",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "max_position_embeddings": config["max_position_embeddings"],
        "layer_norm_epsilon": config["norm_epsilon"],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=WEIGHTS,
    renames=((r"^(?=(word_embeddings|word_embeddings_layernorm|h|ln_f)\.)", "transformer."),),
    pipeline=False,
    notes="no pipeline parallelism",
)
