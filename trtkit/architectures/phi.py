"""Phi-1, Phi-1.5 and Phi-2.

Names and rules: tensorrt_llm/models/phi/convert.py, config.py and model.py. Attention and MLP read the same norm; all
linears have biases, the output projection too. The model class builds embedding, last norm and output projection on
every rank, so it has no pipeline stages; it has neither key/value heads of their own number nor norms of query and key.
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
    lm_head,
    replicated,
    row,
    separate_qkv,
)
from trtkit.architectures.settings import (
    choice,
    decoder_config,
    flag,
    huggingface_decoder,
    huggingface_rope,
    integer,
    must_be,
    rope_config,
    share,
)

_HF = "model.layers.{layer}."
_TRT = "transformer.layers.{layer}."
_ACTIVATIONS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu")
"""Those that TRT-LLM computes as transformers does: its `gelu` is the tanh approximation (functional.py)."""

_LAYER_NORM_EPSILON = 1e-5
"""TRT-LLM's class uses LayerNorm's default, whatever the config says."""


WEIGHTS = (
    embedding("model.embed_tokens.weight"),
    replicated(f"{_TRT}input_layernorm.weight", f"{_HF}input_layernorm.weight", "hidden"),
    replicated(f"{_TRT}input_layernorm.bias", f"{_HF}input_layernorm.bias", "hidden"),
    separate_qkv(f"{_TRT}attention.qkv.weight", *(f"{_HF}self_attn.{which}_proj.weight" for which in "qkv"), "hidden"),
    separate_qkv(f"{_TRT}attention.qkv.bias", *(f"{_HF}self_attn.{which}_proj.bias" for which in "qkv")),
    row(f"{_TRT}attention.dense.weight", f"{_HF}self_attn.dense.weight", "hidden", "q"),
    replicated(f"{_TRT}attention.dense.bias", f"{_HF}self_attn.dense.bias", "hidden"),
    column(f"{_TRT}mlp.fc.weight", f"{_HF}mlp.fc1.weight", "intermediate", "hidden"),
    column(f"{_TRT}mlp.fc.bias", f"{_HF}mlp.fc1.bias", "intermediate"),
    row(f"{_TRT}mlp.proj.weight", f"{_HF}mlp.fc2.weight", "hidden", "intermediate"),
    replicated(f"{_TRT}mlp.proj.bias", f"{_HF}mlp.fc2.bias", "hidden"),
    replicated("transformer.ln_f.weight", "model.final_layernorm.weight", "hidden", stage="last"),
    replicated("transformer.ln_f.bias", "model.final_layernorm.bias", "hidden", stage="last"),
    *lm_head("lm_head.weight", "model.embed_tokens.weight"),
    Weight("lm_head.bias", (Part("lm_head.bias", ("vocab",), "vocab"),), "last"),
)


def checkpoint_config(hf: Config) -> dict[str, Any]:
    must_be(hf, "rope_scaling", None)
    must_be(hf, "qk_layernorm", False, False)
    must_be(hf, "layer_norm_eps", _LAYER_NORM_EPSILON, _LAYER_NORM_EPSILON)
    must_be(hf, "num_key_value_heads", integer(hf, "num_attention_heads"), integer(hf, "num_attention_heads"))
    must_be(hf, "head_dim", None)
    return {
        **decoder_config(hf),
        **rope_config(hf),
        "rotary_pct": share(hf, "partial_rotary_factor", 0.5),
        "intermediate_size": integer(hf, "intermediate_size"),
        "max_position_embeddings": integer(hf, "max_position_embeddings"),
        "hidden_act": choice(hf, "hidden_act", _ACTIVATIONS),
        "norm_epsilon": _LAYER_NORM_EPSILON,
        "tie_word_embeddings": flag(hf, "tie_word_embeddings"),
    }


def huggingface_config(config: Config) -> dict[str, Any]:
    decoder = huggingface_decoder(config, "phi")
    del decoder["head_dim"]  # always hidden_size / num_attention_heads
    return {
        **decoder,
        **huggingface_rope(config),
        "partial_rotary_factor": config["rotary_pct"],
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": config["hidden_act"],
        "layer_norm_eps": config["norm_epsilon"],
        "qk_layernorm": False,
        "tie_word_embeddings": config["tie_word_embeddings"],
    }


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=WEIGHTS,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.(inv_freq|cos_cached|sin_cached)",),
    pipeline=False,
    notes="no pipeline parallelism, no grouped-query attention, no norms of query and key, no rope scaling",
)
