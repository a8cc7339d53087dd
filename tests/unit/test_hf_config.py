"""config.json as transformers 4 and as transformers 5 write it: the same model, the same normalised keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trtkit.errors import InputError
from trtkit.hf_config import normalize_config, read_config

KEYS = ("dtype", "rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "num_local_experts")
NOTHING: dict[str, Any] = {
    "dtype": "bfloat16", "rope_theta": 10000.0, "rope_scaling": None, "partial_rotary_factor": None,
    "rope_local_base_freq": None, "num_local_experts": None,
}  # fmt: skip
V4: dict[str, Any] = {"torch_dtype": "bfloat16"}
V5: dict[str, Any] = {"dtype": "bfloat16"}


def plain(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **more}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONGROPE = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 2.2]}
LONGROPE_OUT = {
    **LONGROPE, "type": "longrope", "rope_type": "longrope", "original_max_position_embeddings": 4096,
}  # fmt: skip
YARN_OUT = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

# family -> (what version 4 writes, what version 5 writes, the keys that both must give beside NOTHING)
SPELLINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": ({"rope_theta": 5e5, "rope_scaling": None}, plain(5e5), {"rope_theta": 5e5}),
    "llama 3.1": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "rope_type": "llama3", **LLAMA3}},
    ),
    "llama, linear": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    ),
    "mistral": ({"rope_theta": 1e6, "sliding_window": None}, plain(1e6), {"rope_theta": 1e6}),
    "mixtral": (
        {"rope_theta": 1e6, "num_local_experts": 8},
        {**plain(1e6), "num_local_experts": 8},
        {"rope_theta": 1e6, "num_local_experts": 8},
    ),
    "qwen2": ({"rope_theta": 1e6, "rope_scaling": None}, plain(1e6), {"rope_theta": 1e6}),
    "qwen2, yarn": (
        {"rope_theta": 1e6, "max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
         "original_max_position_embeddings": 32768}},
        {"rope_theta": 1e6, "rope_scaling": YARN_OUT},
    ),
    "qwen3": ({"rope_theta": 1e6, "rope_scaling": None}, plain(1e6), {"rope_theta": 1e6}),
    "qwen3_moe": (
        {"rope_theta": 1e6, "num_experts": 128},
        {**plain(1e6), "num_local_experts": 128},
        {"rope_theta": 1e6, "num_local_experts": 128},
    ),
    "gemma": ({"rope_theta": 1e4}, plain(1e4), {}),
    "gemma2": ({"rope_theta": 1e4}, plain(1e4), {}),
    "gemma3_text": (
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                             "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}},
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
    ),
    "gemma3_text, linear": (
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                             "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}},
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4,
         "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0}},
    ),
    "phi": (
        {"rope_theta": 1e4, "partial_rotary_factor": 0.4, "rope_scaling": None},
        plain(1e4, partial_rotary_factor=0.4),
        {"partial_rotary_factor": 0.4},
    ),
    "phi3": (
        {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 1.0},
        {**plain(1e4, partial_rotary_factor=1.0), "original_max_position_embeddings": 4096},
        {"partial_rotary_factor": 1.0},
    ),
    "phi3, long": (
        {"rope_theta": 1e4, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096,
         "max_position_embeddings": 131072, "rope_scaling": {"type": "su", **LONGROPE}},
        {"original_max_position_embeddings": 4096, "max_position_embeddings": 131072,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, **LONGROPE,
                             "original_max_position_embeddings": 4096}},
        {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE_OUT},
    ),
    "gpt2": ({"n_embd": 768}, {"n_embd": 768}, {}),
    "falcon": ({"rope_theta": 1e4, "rope_scaling": None, "alibi": False}, {**plain(1e4), "alibi": False}, {}),
    "opt": ({"ffn_dim": 3072}, {"ffn_dim": 3072}, {}),
    "bloom": ({"n_layer": 2}, {"n_layer": 2}, {}),
    "gpt_neox": (
        {"rotary_pct": 0.25, "rotary_emb_base": 20000, "rope_scaling": None},
        plain(20000, partial_rotary_factor=0.25),
        {"rope_theta": 20000, "partial_rotary_factor": 0.25},
    ),
    "starcoder2": ({"rope_theta": 999999.4, "rope_scaling": None}, plain(999999.4), {"rope_theta": 999999.4}),
}  # fmt: skip


@pytest.mark.parametrize("family", SPELLINGS)
@pytest.mark.parametrize("version", [4, 5])
def test_both_versions_give_the_same_keys(family: str, version: int) -> None:
    four, five, expected = SPELLINGS[family]
    raw = {**V4, **four} if version == 4 else {**V5, **five}
    before = json.dumps(raw)
    config = normalize_config(raw)
    assert {key: config.get(key) for key in KEYS} == {**NOTHING, **expected}
    assert json.dumps(raw) == before, "the caller's config was changed"
    assert config.items() >= {key: value for key, value in raw.items() if key not in KEYS}.items()


CLASSES = {
    "LlamaConfig": {"rope_theta": 10000.0},
    "MistralConfig": {"rope_theta": 10000.0},
    "MixtralConfig": {"rope_theta": 1e6, "num_local_experts": 8},
    "Qwen2Config": {"rope_theta": 10000.0},
    "Qwen3Config": {"rope_theta": 10000.0},
    "Qwen3MoeConfig": {"rope_theta": 10000.0, "num_local_experts": 128},
    "GemmaConfig": {"rope_theta": 10000.0},
    "Gemma2Config": {"rope_theta": 10000.0},
    "Gemma3TextConfig": {"rope_theta": 1e6, "rope_local_base_freq": 10000.0},
    "PhiConfig": {"partial_rotary_factor": 0.5},
    "Phi3Config": {"rope_theta": 10000.0},
    "GPT2Config": {},
    "FalconConfig": {"rope_theta": 10000.0},
    "OPTConfig": {},
    "BloomConfig": {},
    "GPTNeoXConfig": {"partial_rotary_factor": 0.25},
    "Starcoder2Config": {"rope_theta": 10000.0},
}


@pytest.mark.parametrize("name", CLASSES)
def test_what_the_installed_transformers_writes(name: str, tmp_path: Path) -> None:
    """Whichever version that is: its classes' defaults, through a file."""
    transformers = pytest.importorskip("transformers")
    options = {"bos_token_id": 0, "eos_token_id": 0}
    getattr(transformers, name)(dtype="bfloat16", **options).save_pretrained(tmp_path)
    config = normalize_config(json.loads((tmp_path / "config.json").read_text()))
    wanted = {**NOTHING, **CLASSES[name]}
    if name == "Phi3Config":  # written since 4.49
        config["partial_rotary_factor"] = None
    assert {key: config.get(key) for key in KEYS} == wanted


@pytest.mark.parametrize(
    ("raw", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"model_type": "gemma3_text"}, 1e6, None),
        ({"rope_theta": None, "rope_scaling": {}, "rope_parameters": {}}, 10000.0, None),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 5.0}, 5.0, None),
        # Both spellings at once, as files that shall serve both versions have it: transformers 5 reads the older.
        ({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}, **plain(7.0)}, 7.0, "linear"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, 5.0, None),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}, "sliding_attention": None}}, 5.0, None),
    ],
)
def test_rope_in_odd_places(raw: dict[str, Any], theta: float, scaling: str | None) -> None:
    config = normalize_config(raw)
    assert config["rope_theta"] == theta
    assert (config["rope_scaling"] or {}).get("rope_type") == scaling


def test_layer_types_stay() -> None:
    types = ["sliding_attention", "full_attention"]
    assert normalize_config({"layer_types": types})["layer_types"] == types


def test_torch_prefix_of_dtype() -> None:
    assert normalize_config({"torch_dtype": "torch.float16"})["dtype"] == "float16"


def test_multimodal_is_named(tmp_path: Path) -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"several modalities \(its text model is nested in 'text_config'\)"):
        read_config(tmp_path)
