"""GPT-NeoX and Pythia.

Names and rules: tensorrt_llm/models/gptneox/model.py and examples/models/contrib/gptneox/convert_checkpoint.py. The
class has attention and MLP side by side, an MLP of four times the width, and no setting for either.
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
from trtkit.architectures.settings import choice, decoder_config, flag, integer, must_be, number, share

_HF = "gpt_neox.layers.{layer}."
_TRT = "transformer.layers.{layer}."
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu")

WEIGHTS = (
    embedding("gpt_neox.embed_in.weight"),
    *layer_norm(f"{_TRT}input_layernorm", f"{_HF}input_layernorm"),
    *layer_norm(f"{_TRT}post_attention_layernorm", f"{_HF}post_attention_layernorm"),
    grouped_qkv(f"{_TRT}attention.qkv.weight", f"{_HF}attention.query_key_value.weight", "hidden"),
    grouped_qkv(f"{_TRT}attention.qkv.bias", f"{_HF}attention.query_key_value.bias"),
    row(f"{_TRT}attention.dense.weight", f"{_HF}attention.dense.weight", "hidden", "q"),
    replicated(f"{_TRT}attention.dense.bias", f"{_HF}attention.dense.bias", "hidden"),
    column(f"{_TRT}mlp.fc.weight", f"{_HF}mlp.dense_h_to_4h.weight", "four_hidden", "hidden"),
    column(f"{_TRT}mlp.fc.bias", f"{_HF}mlp.dense_h_to_4h.bias", "four_hidden"),
    row(f"{_TRT}mlp.proj.weight", f"{_HF}mlp.dense_4h_to_h.weight", "hidden", "four_hidden"),
    replicated(f"{_TRT}mlp.proj.bias", f"{_HF}mlp.dense_4h_to_h.bias", "hidden"),
    *layer_norm("transformer.ln_f", "gpt_neox.final_layer_norm", stage="last"),
    *lm_head("embed_out.weight", "gpt_neox.embed_in.weight"),
)


def checkpoint_config(hf: Config) -> dict[str, Any]:
    decoder = decoder_config({**hf, "head_dim": None}, kv_heads="num_attention_heads")
    must_be(hf, "use_parallel_residual", True, default=True)
    must_be(hf, "attention_bias", True, default=True)
    must_be(hf, "intermediate_size", 4 * decoder["hidden_size"])
    must_be(hf, "layer_norm_eps", 1e-5, default=1e-5)
    must_be(hf, "rope_scaling", None)
    base = number(hf, "rope_theta")
    return {
        **decoder,
        "intermediate_size": integer(hf, "intermediate_size"),
        "max_position_embeddings": integer(hf, "max_position_embeddings"),
        "position_embedding_type": "rope_gpt_neox",
        "rotary_pct": share(hf, "partial_rotary_factor", 0.25),
        "rotary_emb_base": base,  # the one that this class reads
        "rotary_base": base,
        "rotary_scaling": None,
        "hidden_act": choice(hf, "hidden_act", _ACTIVATIONS, default="gelu"),
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": flag(hf, "tie_word_embeddings"),
    }


def huggingface_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": [config["architecture"]],
        "model_type": "gpt_neox",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "rotary_pct": config["rotary_pct"],
        "rotary_emb_base": config["rotary_emb_base"],
        "hidden_act": config["hidden_act"],
        "layer_norm_eps": config["norm_epsilon"],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=WEIGHTS,
    sizes=lambda config: {"four_hidden": 4 * config["hidden_size"]},
    renames=((r"^lm_head\.", "embed_out."),),  # the name inside transformers since version 5
    ignored=(
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
        r"embed_out\.weight",  # the stored copy of a tied embedding
    ),
    pipeline=False,
    notes="no pipeline parallelism; only models with parallel residuals",
)
