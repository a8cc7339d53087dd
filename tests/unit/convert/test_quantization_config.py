"""Requests, the `quantization` dict of config.json, and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.convert.quantization import (
    DEFAULT_EXCLUDE,
    FORMATS,
    Quantization,
    layers_config,
    quantization_config,
    read_quantization,
)
from trtkit.errors import InputError

MODULES = [
    f"transformer.layers.{layer}.{kind}"
    for layer in range(3)
    for kind in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
]
LINEAR_WISE = [name for name, form in FORMATS.items() if not form.linear_wise]
MIXABLE = [name for name in LINEAR_WISE if not FORMATS[name].import_only]
KV = st.sampled_from([None, "int8", "fp8"])


@st.composite
def requests(draw: st.DrawFn) -> Quantization:
    """Any request of one format that a checkpoint can express."""
    name = draw(st.sampled_from([None, *FORMATS]))
    options: dict[str, Any] = {"kv_cache": draw(KV)}
    if name and FORMATS[name].group_sizes:
        options["group_size"] = draw(st.sampled_from([None, *FORMATS[name].group_sizes]))
    if name in LINEAR_WISE:
        patterns = st.sampled_from(["*mlp.proj", "*.layers.0.*", "*attention.qkv.weight", "*router", *MODULES])
        options["exclude"] = tuple(draw(st.lists(patterns, max_size=4)))
    if name == "int4_awq":
        options["zero_point"] = draw(st.booleans())
    if name in ("int4_awq", "w4a8_awq"):
        options["pre_quant_scale"] = draw(st.booleans())
    if name == "fp8_rowwise":
        options["clamp"] = draw(st.sampled_from([None, (-1200.0, 1200.0)]))
    return Quantization(name, **options)


@given(requests())
def test_a_config_is_read_back_as_what_was_asked_for(q: Quantization) -> None:
    written = json.loads(json.dumps(quantization_config(q)))
    assert read_quantization(written) == q
    assert quantization_config(read_quantization(written)) == quantization_config(q)


@given(
    st.sampled_from(MIXABLE),
    KV,
    st.dictionaries(st.sampled_from(MODULES), st.sampled_from(MIXABLE), min_size=1),
    st.lists(st.sampled_from(["*mlp.gate", "*layers.1.*"]), max_size=2),
)
def test_mixed_precision_is_read_back_linear_by_linear(
    name: str, kv: Any, overrides: dict[str, str], exclude: list[str]
) -> None:
    q = Quantization(name, None, kv, tuple(exclude), overrides)
    if not q.mixed:
        return
    config, layers = json.loads(json.dumps([quantization_config(q), layers_config(q, MODULES)]))
    again = read_quantization(config, layers)
    assert config == {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": kv and kv.upper()}
    assert [again.format_of(module) for module in MODULES] == [q.format_of(module) for module in MODULES]
    assert layers_config(again, MODULES) == layers_config(q, MODULES)
    for module, asked in overrides.items():
        assert q.format_of(module) is FORMATS[asked]


GROUPED = {"group_size": 128, "has_zero_point": False, "pre_quant_scale": True}


@pytest.mark.parametrize(
    ("q", "expected"),
    [
        (Quantization(), {"quant_algo": None, "kv_cache_quant_algo": None}),
        (Quantization("int8_wo"), {"quant_algo": "W8A16", "kv_cache_quant_algo": None}),
        (Quantization("fp8", kv_cache="fp8"), {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}),
        (Quantization("int4_awq"), {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, **GROUPED}),
        (
            Quantization("int4_awq", 64, kv_cache="int8", zero_point=True),
            {
                "quant_algo": "W4A16_AWQ",
                "kv_cache_quant_algo": "INT8",
                "group_size": 64,
                "has_zero_point": True,
                "pre_quant_scale": False,
            },
        ),
        (
            Quantization("int8_sq", exclude=("*mlp.proj",)),
            {
                "quant_algo": "W8A8_SQ_PER_CHANNEL",
                "kv_cache_quant_algo": None,
                "exclude_modules": [*DEFAULT_EXCLUDE, "*mlp.proj"],
            },
        ),
    ],
)
def test_config_has_the_keys_of_its_algorithm(q: Quantization, expected: dict[str, Any]) -> None:
    assert quantization_config(q) == expected


@pytest.mark.parametrize("name", ["int8_wo", "int4_wo"])
def test_weight_only_leaves_out_modules_and_their_weights(name: str) -> None:
    patterns = quantization_config(Quantization(name, exclude=("*mlp.proj", "*layers.0.*")))["exclude_modules"]
    assert {"*mlp.proj", "*mlp.proj.weight", "*layers.0.*", "*shared_expert_gate.weight"} <= set(patterns)
    assert "*layers.0.*.weight" not in patterns


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"quant_algo": "w8a16"}, "w8a16"),
        ({"quant_algo": ["FP8"]}, "FP8"),
        ({"quant_algo": "FP8", "use_weight_only": True}, "use_weight_only"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, "NVFP4"),
        ({"quant_algo": "W4A16_AWQ", "group_size": 32}, "group_size 32"),
        ({"quant_algo": "W4A8_AWQ", "group_size": 64}, "group_size 64"),
        ({"quant_algo": "W4A16_AWQ", "has_zero_point": 1}, "has_zero_point"),
        ({"quant_algo": "W4A16_AWQ", "has_zero_point": True, "pre_quant_scale": True}, "zero points"),
        ({"quant_algo": "FP8", "exclude_modules": "lm_head"}, "exclude_modules"),
        ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "clamp_val": [1]}, "clamp_val"),
        ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "use_meta_recipe": True}, "use_meta_recipe"),
        ({"quant_algo": "MIXED_PRECISION"}, "quantized_layers"),
    ],
)
def test_a_config_that_is_not_known_is_refused_by_key(config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_quantization(config)
    assert said in caught.value.cause and caught.value.fix


@pytest.mark.parametrize(
    ("options", "said", "fix"),
    [
        ({"format": "int4_aqw"}, "int4_aqw", "int4_awq"),
        ({"format": "int4_awq", "group_size": 32}, "groups of 32", "128 or 64"),
        ({"format": "w4a8_awq", "group_size": 64}, "groups of 64", "128"),
        ({"format": "fp8", "group_size": 128}, "no groups", "int4_awq"),
        ({"format": "int8_sq_plugin", "exclude": ("*proj",)}, "whole attention", "int8_sq"),
        ({"format": "fp8_rowwise", "overrides": {MODULES[0]: "fp8"}}, "whole attention", "fp8"),
        ({"format": "fp8", "kv_cache": "int4"}, "int4", "int8 or fp8"),
        ({"exclude": ("*proj",)}, "no format", "give a format"),
        ({"format": "fp8", "exclude": (".weight",)}, "empty", "remove"),
        ({"format": "fp8", "zero_point": True}, "zero points", "int4_awq"),
    ],
)
def test_requests_that_no_checkpoint_can_say(options: dict[str, Any], said: str, fix: str) -> None:
    with pytest.raises(InputError) as caught:
        Quantization(**options)
    assert said in caught.value.cause and fix in caught.value.fix


def test_a_format_for_a_linear_that_is_not_there() -> None:
    q = Quantization("fp8", overrides={"transformer.layers.2.mlp.prj": "int8_sq"})
    with pytest.raises(InputError, match=r"mlp\.prj") as caught:
        layers_config(q, MODULES)
    assert "transformer.layers.2.mlp.proj" in caught.value.fix
