"""Reading a Hugging Face config: typed values with errors that name the key, and what most decoders have in common."""

from __future__ import annotations

import math
import sys
from typing import Any

from trtkit.architectures.rules import Config
from trtkit.errors import InputError
from trtkit.untrusted import printable

MAX_EXPERTS = 10_000
ROPE_TYPES = ("linear", "dynamic", "llama3", "yarn")
"""Kinds of rope scaling that TRT-LLM runs with `rope_gpt_neox` positions (tensorrt_llm/functional.py,
RotaryScalingType); long rope has a position type of its own, which only Phi-3's class uses."""


def integer(hf: Config, key: str, default: int | None = None) -> int:
    """A positive integer of a Hugging Face config. A missing or null key gives `default`, if there is one.

    Raises:
        InputError: the value is not one; names the key.
    """
    return int(_number(hf, key, default, (int,), "a positive integer"))


def number(hf: Config, key: str, default: float | None = None) -> float:
    """Like `integer`, for a positive number."""
    return float(_number(hf, key, default, (int, float), "a positive number"))


def share(hf: Config, key: str, default: float) -> float:
    """Like `number`, for one of at most 1."""
    value = number(hf, key, default)
    if value > 1:
        raise unexpected(key, value, "a share of at most 1")
    return value


def flag(hf: Config, key: str, default: bool = False) -> bool:
    """A boolean of a Hugging Face config, `default` where it is missing or null.

    Raises:
        InputError: the value is not one; names the key.
    """
    value = hf.get(key)
    if value is not None and not isinstance(value, bool):
        raise unexpected(key, value, "true or false")
    return default if value is None else value


def choice(hf: Config, key: str, known: tuple[str, ...], default: str | None = None) -> str:
    """One of several strings.

    Raises:
        InputError: the value is none of them; names the key.
    """
    value = hf.get(key)
    if value is None:
        value = default
    if not isinstance(value, str) or value not in known:
        raise unexpected(key, value, "one of " + ", ".join(known))
    return value


def must_be(hf: Config, key: str, wanted: Any, default: Any = None) -> None:
    """Refuses a config whose model TRT-LLM's class cannot express.

    Raises:
        InputError: the value (or `default`, where it is missing or null) is not `wanted`.
    """
    value = hf.get(key)
    if value is None:
        value = default
    if value != wanted:
        raise InputError(
            f"config.json: TRT-LLM's {hf['architectures'][0]} does not run {key} {printable(repr(value))}",
            f"only {wanted!r}",
        )


def unexpected(key: str, value: Any, wanted: str) -> InputError:
    return InputError(f"config.json: {key} is {printable(repr(value))}, expected {wanted}", "download the file again")


def _number(hf: Config, key: str, default: float | None, kinds: tuple[type, ...], wanted: str) -> float:
    value = hf.get(key)
    if value is None and default is not None:
        return default
    if value is None and key not in hf:
        raise InputError(f"config.json: key '{key}' is missing", "download the file again")
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and isinstance(value, kinds)
        and 0 < value <= sys.float_info.max
    ):
        return value
    raise unexpected(key, value, wanted)


def respelled(hf: Config, **names: tuple[str, ...]) -> dict[str, Any]:
    """A Hugging Face config in which each key has the value of the first of its names that says something.

    Some config classes read a size under several names: `respelled(hf, hidden_size=("n_embed", "hidden_size"))`.
    """
    found = {key: next((hf[name] for name in of if hf.get(name) is not None), None) for key, of in names.items()}
    return {**hf, **{key: value for key, value in found.items() if value is not None}}


def decoder_config(
    hf: Config,
    *,
    hidden: str = "hidden_size",
    layers: str = "num_hidden_layers",
    heads: str = "num_attention_heads",
    kv_heads: str = "num_key_value_heads",
) -> dict[str, Any]:
    """The checkpoint keys that every decoder has: sizes of vocabulary, width, layers and heads.

    Args:
        hidden, layers, heads, kv_heads: the Hugging Face config's names of those sizes.

    Raises:
        InputError: a size is missing or is no positive integer, or heads do not divide what they must.
    """
    width, head_count = integer(hf, hidden), integer(hf, heads)
    if hf.get("head_dim") is None and width % head_count:
        raise InputError(f"config.json: {hidden} {width} is no multiple of {heads} {head_count}", "add head_dim")
    kv_count = integer(hf, kv_heads, head_count)
    if head_count % kv_count:
        raise InputError(
            f"config.json: {heads} {head_count} is no multiple of {kv_heads} {kv_count}", "download the file again"
        )
    return {
        "architecture": hf["architectures"][0],
        "vocab_size": integer(hf, "vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": integer(hf, layers),
        "num_attention_heads": head_count,
        "num_key_value_heads": kv_count,
        "head_size": integer(hf, "head_dim", width // head_count),
    }


def rope_config(hf: Config) -> dict[str, Any]:
    """The checkpoint keys of rotary embeddings.

    Raises:
        InputError: a kind of scaling that TRT-LLM does not run.
    """
    scaling = hf["rope_scaling"]
    if scaling is not None and scaling["rope_type"] not in ROPE_TYPES:
        known = ", ".join(ROPE_TYPES)
        raise InputError(
            f"config.json: rope type {scaling['rope_type']!r} is not one that TRT-LLM runs", f"known: {known}"
        )
    if scaling is not None and scaling["rope_type"] == "yarn":
        scaling = _yarn(scaling)
    return {
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": number(hf, "rope_theta"),
        "rotary_scaling": scaling,
    }


def experts_config(hf: Config, *, renormalize: bool) -> dict[str, Any]:
    """`moe` of the checkpoint config (tensorrt_llm/layers/moe.py, MoeConfig, which refuses other keys).

    Args:
        renormalize: whether the weights of the experts that a token is sent to add up to 1. TRT-LLM's mode 1 takes the
            softmax over those only, which is the same as dividing the softmax over all by their sum.

    Raises:
        InputError: fewer experts than TRT-LLM takes for a mixture, or than a token is sent to.
    """
    experts, chosen = integer(hf, "num_local_experts"), integer(hf, "num_experts_per_tok")
    if experts > MAX_EXPERTS:  # a plan has an entry for each
        raise unexpected("num_local_experts", experts, f"at most {MAX_EXPERTS:,}")
    if experts < 2:
        raise InputError("config.json: TRT-LLM runs no mixture of 1 expert", "use a model with more experts")
    if chosen > experts:
        raise InputError(
            f"config.json: num_experts_per_tok {chosen} is more than the {experts} experts", "download the file again"
        )
    return {"num_experts": experts, "top_k": chosen, "normalization_mode": 1 if renormalize else 0}


def _yarn(scaling: Config) -> dict[str, Any]:
    """YaRN with everything written out: where nothing is said, TRT-LLM and transformers take different values.

    Both multiply sine and cosine by `(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)`, transformers
    only if both are given, else by `0.1 ln(factor) + 1` (tensorrt_llm/functional.py, create_sinusoidal_positions_yarn;
    transformers, modeling_rope_utils.py).
    """
    factor, mscale, mscale_all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not (mscale and mscale_all_dim):
        mscale, mscale_all_dim = 1.0, 0.0
    growth = 0.1 * math.log(factor) if factor > 1 else 0.0
    computed = (growth * mscale + 1) / (growth * mscale_all_dim + 1)
    wanted = scaling.get("attention_factor")
    if wanted is not None and not math.isclose(wanted, computed, rel_tol=1e-6):
        raise InputError(
            f"config.json: TRT-LLM does not read YaRN's attention_factor {wanted}, it would take {computed:.6g}",
            "leave it out if the model works without, or use another runtime",
        )
    if scaling.get("truncate") is False:
        raise InputError("config.json: TRT-LLM does not run YaRN with truncate False", "use another runtime")
    return {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": scaling["original_max_position_embeddings"],
        "beta_fast": scaling.get("beta_fast") or 32.0,
        "beta_slow": scaling.get("beta_slow") or 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }


def huggingface_decoder(config: Config, model_type: str) -> dict[str, Any]:
    """The inverse of `decoder_config`, in the names that most Hugging Face configs use."""
    return {
        "architectures": [config["architecture"]],
        "model_type": model_type,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "head_dim": config["head_size"],
    }


def huggingface_rope(config: Config) -> dict[str, Any]:
    """The inverse of `rope_config`."""
    scaling = config["rotary_scaling"]
    return {"rope_theta": config["rotary_base"], "rope_scaling": dict(scaling) if scaling else None}
