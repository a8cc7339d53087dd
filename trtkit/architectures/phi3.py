"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini (dense).

Names and rules: tensorrt_llm/models/phi3/convert.py, split_weights.py, config.py and model.py. Hugging Face fuses the
gated MLP as [gate; up]; TRT-LLM's plain MLP with "swiglu" wants [up; gate], each half split on its own. The model class
builds embedding, last norm and output projection on every rank, so it has no pipeline stages.
"""

from __future__ import annotations

import math
from typing import Any

from trtkit.architectures.rules import (
    Architecture,
    Config,
    Part,
    Weight,
    embedding,
    joined_qkv,
    lm_head,
    replicated,
    row,
)
from trtkit.architectures.settings import (
    decoder_config,
    flag,
    huggingface_decoder,
    integer,
    must_be,
    number,
    share,
    unexpected,
)
from trtkit.errors import InputError

_HF = "model.layers.{layer}."
_TRT = "transformer.layers.{layer}."


def _half(section: int) -> Part:
    """The gate (0) or up (1) half of Hugging Face's gate_up_proj."""
    return Part(
        f"{_HF}mlp.gate_up_proj.weight",
        ("intermediate", "hidden"),
        "axis0",
        sections=("intermediate", "intermediate"),
        section=section,
    )


WEIGHTS = (
    embedding("model.embed_tokens.weight"),
    replicated(f"{_TRT}input_layernorm.weight", f"{_HF}input_layernorm.weight", "hidden"),
    joined_qkv(f"{_TRT}attention.qkv.weight", f"{_HF}self_attn.qkv_proj.weight", "hidden"),
    row(f"{_TRT}attention.dense.weight", f"{_HF}self_attn.o_proj.weight", "hidden", "q"),
    replicated(f"{_TRT}post_layernorm.weight", f"{_HF}post_attention_layernorm.weight", "hidden"),
    Weight(f"{_TRT}mlp.fc.weight", (_half(1), _half(0))),
    row(f"{_TRT}mlp.proj.weight", f"{_HF}mlp.down_proj.weight", "hidden", "intermediate"),
    replicated("transformer.ln_f.weight", "model.norm.weight", "hidden", stage="last"),
    *lm_head("lm_head.weight", "model.embed_tokens.weight"),
)


def checkpoint_config(hf: Config) -> dict[str, Any]:
    must_be(hf, "hidden_act", "silu")
    for bias in ("attention_bias", "mlp_bias", "lm_head_bias"):
        must_be(hf, bias, False, False)
    must_be(hf, "head_dim", None)
    config = {
        **decoder_config(hf),
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": number(hf, "rope_theta"),
        "rotary_scaling": None,
        "rotary_pct": share(hf, "partial_rotary_factor", 1.0),
        "intermediate_size": integer(hf, "intermediate_size"),
        "max_position_embeddings": integer(hf, "max_position_embeddings"),
        "hidden_act": "swiglu",
        "norm_epsilon": number(hf, "rms_norm_eps"),
        "tie_word_embeddings": flag(hf, "tie_word_embeddings"),
    }
    if hf["rope_scaling"] is not None:
        config |= _long_rope(hf, config)
    if hf.get("sliding_window") is not None:
        # TRT-LLM takes the window at run time (max_attention_window_size); here it is a note for whoever sets that.
        config["sliding_window"] = integer(hf, "sliding_window")
    return config


def _long_rope(hf: Config, config: Config) -> dict[str, Any]:
    """The keys of long rope. TRT-LLM scales attention by what the paper suggests for maximum / original positions
    (RopeEmbeddingUtils in functional.py); Hugging Face can say otherwise."""
    scaling = hf["rope_scaling"]
    must_be({**hf, "rope_type": scaling["rope_type"]}, "rope_type", "longrope")
    count = int(config["head_size"] * config["rotary_pct"]) // 2
    for key in ("short_factor", "long_factor"):
        if len(scaling[key]) != count:
            raise InputError(
                f"config.json: {key} has {len(scaling[key])} factors, expected one per two rotary dimensions: {count}",
                "download the file again",
            )
    original = integer(scaling, "original_max_position_embeddings")
    if original == 1:
        raise unexpected("original_max_position_embeddings", original, "more than one position")
    extension = config["max_position_embeddings"] / original
    suggested = math.sqrt(1 + math.log(extension) / math.log(original)) if extension > 1 else 1.0
    factor = number(scaling, "factor", extension)
    implied = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if not math.isclose(number(scaling, "attention_factor", implied), suggested, rel_tol=1e-6):
        raise InputError(
            f"config.json: TRT-LLM's {config['architecture']} does not run the factors of rope_scaling",
            f"it scales attention by {suggested:.6g} for {config['max_position_embeddings']} positions from {original}",
        )
    return {
        "position_embedding_type": "long_rope",
        "original_max_position_embeddings": original,
        "longrope_scaling_short_factors": scaling["short_factor"],
        "longrope_scaling_long_factors": scaling["long_factor"],
    }


def huggingface_config(config: Config) -> dict[str, Any]:
    decoder = huggingface_decoder(config, "phi3")
    del decoder["head_dim"]  # always hidden_size / num_attention_heads
    result = {
        **decoder,
        "rope_theta": config["rotary_base"],
        "rope_scaling": None,
        "partial_rotary_factor": config["rotary_pct"],
        "intermediate_size": config["intermediate_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "hidden_act": "silu",
        "rms_norm_eps": config["norm_epsilon"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "sliding_window": config.get("sliding_window"),
        "pad_token_id": None,  # the default is no token of smaller vocabularies
    }
    if config["position_embedding_type"] == "long_rope":
        result["original_max_position_embeddings"] = config["original_max_position_embeddings"]
        result["rope_scaling"] = {
            "type": "longrope",  # and no `rope_type`: transformers 4 refuses a fourth key
            "short_factor": config["longrope_scaling_short_factors"],
            "long_factor": config["longrope_scaling_long_factors"],
        }
    return result


ARCHITECTURE = Architecture(
    checkpoint_config=checkpoint_config,
    huggingface_config=huggingface_config,
    weights=WEIGHTS,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    pipeline=False,
    notes="no pipeline parallelism; long rope of 128k models kept; sliding windows are set at run time",
)
