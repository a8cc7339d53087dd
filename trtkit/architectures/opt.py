"""OPT.

Names and rules: tensorrt_llm/models/opt/model.py and examples/models/contrib/opt/convert_checkpoint.py. Hugging Face's
position table starts with two rows that no position uses; TRT-LLM's has only those behind them.
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
    layer_norm,
    lm_head,
    replicated,
    row,
    separate_qkv,
)
from trtkit.architectures.settings import choice, decoder_config, flag, integer, must_be

_HF = "model.decoder.layers.{layer}."
_TRT = "transformer.layers.{layer}."
_UNUSED_POSITIONS = 2
_NORM_EPSILON = 1e-5
"""Of all norms, in Hugging Face's model and in TRT-LLM's: neither has a setting for it."""


def _has_final_norm(config: Config) -> bool:
    return bool(config["do_layer_norm_before"])


WEIGHTS = (
    embedding("model.decoder.embed_tokens.weight"),
    Weight(
        "transformer.position_embedding.weight",
        (
            Part(
                "model.decoder.embed_positions.weight",
                ("positions", "hidden"),
                "embedding",
                sections=(_UNUSED_POSITIONS, "positions"),
                section=1,
            ),
        ),
        "first",
    ),
    *layer_norm(f"{_TRT}input_layernorm", f"{_HF}self_attn_layer_norm"),
    separate_qkv(f"{_TRT}attention.qkv.weight", *(f"{_HF}self_attn.{which}_proj.weight" for which in "qkv"), "hidden"),
    separate_qkv(f"{_TRT}attention.qkv.bias", *(f"{_HF}self_attn.{which}_proj.bias" for which in "qkv")),
    row(f"{_TRT}attention.dense.weight", f"{_HF}self_attn.out_proj.weight", "hidden", "q"),
    replicated(f"{_TRT}attention.dense.bias", f"{_HF}self_attn.out_proj.bias", "hidden"),
    *layer_norm(f"{_TRT}post_layernorm", f"{_HF}final_layer_norm"),
    column(f"{_TRT}mlp.fc.weight", f"{_HF}fc1.weight", "intermediate", "hidden"),
    column(f"{_TRT}mlp.fc.bias", f"{_HF}fc1.bias", "intermediate"),
    row(f"{_TRT}mlp.proj.weight", f"{_HF}fc2.weight", "hidden", "intermediate"),
    replicated(f"{_TRT}mlp.proj.bias", f"{_HF}fc2.bias", "hidden"),
    *layer_norm("transformer.ln_f", "model.decoder.final_layer_norm", stage="last", when=_has_final_norm),
    *lm_head("lm_head.weight", "model.decoder.embed_tokens.weight"),
)


def checkpoint_config(hf: Config) -> dict[str, Any]:
    # OPT-350m projects its embeddings to another width, which TRT-LLM's model has no layers for.
    must_be(hf, "word_embed_proj_dim", hf.get("hidden_size"), default=hf.get("hidden_size"))
    must_be(hf, "enable_bias", True, default=True)
    must_be(hf, "layer_norm_elementwise_affine", True, default=True)
    must_be(hf, "_remove_final_layer_norm", False, default=False)
    return {
        **decoder_config({**hf, "head_dim": None}, kv_heads="num_attention_heads"),
        "intermediate_size": integer(hf, "ffn_dim"),
        "max_position_embeddings": integer(hf, "max_position_embeddings"),
        "position_embedding_type": "learned_absolute",
        "hidden_act": choice(hf, "activation_function", ("relu", "gelu"), default="relu"),
        "norm_epsilon": _NORM_EPSILON,
        "do_layer_norm_before": flag(hf, "do_layer_norm_before", True),
        "tie_word_embeddings": flag(hf, "tie_word_embeddings", True),
    }


def huggingface_config(config: Config) -> dict[str, Any]:
    return {
        "architectures": [config["architecture"]],
        "model_type": "opt",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "word_embed_proj_dim": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "ffn_dim": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "activation_function": config["hidden_act"],
        "do_layer_norm_before": config["do_layer_norm_before"],
        "tie_word_embeddings": config["tie_word_embeddings"],
    }


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=WEIGHTS,
    renames=((r"^(?=decoder\.)", "model."),),
    pipeline=False,
    notes="no pipeline parallelism; not OPT-350m, whose embeddings have a width of their own",
)
