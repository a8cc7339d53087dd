"""Which format a checkpoint is in, and which none of them is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.errors import InputError
from trtkit.quantize import imports
from trtkit.safetensors_io import Reader


def test_a_checkpoint_that_is_not_quantised(tmp_path: Path) -> None:
    assert imports.detect({"architectures": ["LlamaForCausalLM"]}, tmp_path) is None
    assert imports.detect({"quantization_config": None}, tmp_path) is None


@pytest.mark.parametrize(
    "method",
    ["bitsandbytes", "fp8", "mxfp4", "aqlm", "hqq", "quanto", "torchao", "fbgemm_fp8", "auto-round", "exl3", ""],
)
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"quantised by '{method}' are not imported") as refused:
        imports.detect({"quantization_config": {"quant_method": method}}, tmp_path)
    assert "awq, gptq, compressed-tensors, modelopt" in refused.value.cause
    assert refused.value.fix == "convert the original model with --quantization instead"


@pytest.mark.parametrize("section", [3, [], "awq", True])
def test_sections_that_are_no_mapping(section: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a mapping"):
        imports.detect({"quantization_config": section}, tmp_path)


@pytest.mark.parametrize("method", [3, None, ["awq"], {"a": 1}])
def test_methods_that_are_no_name(method: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        imports.detect({"quantization_config": {"quant_method": method}}, tmp_path)


def test_hf_quant_config_counts(tmp_path: Path) -> None:
    quantization = {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    for config in ({}, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}):
        scheme = imports.detect(config, tmp_path)
        assert scheme is not None
        assert (scheme.method, scheme.excluded, scheme.file) == (
            "modelopt", ("lm_head",), tmp_path / "hf_quant_config.json",
        )  # fmt: skip
    for other in ({"quant_method": "awq"}, {"quant_method": "modelopt", "quant_algo": "W8A16"}):
        with pytest.raises(InputError, match=r"says FP8, but config\.json beside it says"):
            imports.detect({"quantization_config": other}, tmp_path)


def test_a_message_holds_no_control_characters(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        imports.detect({"quantization_config": {"quant_method": "x\x1b[31m\ny" * 100}}, tmp_path)
    assert refused.value.cause.isprintable()
    assert len(refused.value.cause) < 600


ARGUMENTS: dict[str, Any] = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
    "actorder": None,
}  # fmt: skip
TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
GOOD: list[dict[str, Any]] = [
    {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
    {
        "quant_method": "gptq", "bits": 8, "group_size": 64, "sym": True, "desc_act": False, "format": "gptq",
        "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:1"]}, "dynamic": {"-:lm_head": {}},
    },
    {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": ARGUMENTS, "input_activations": None}},
        "ignore": ["lm_head", "re:.*gate$"], "kv_cache_scheme": TOKEN, "sparsity_config": {"format": "dense"},
    },
    {
        "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "kv_cache_scheme": TOKEN, "ignore": ["lm_head"],
        "quantized_layers": {"a.b": {"quant_algo": "W4A16_AWQ", "group_size": 128}},
    },
]  # fmt: skip

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    if isinstance(value, dict):
        pairs: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        return []
    return [place for name, inner in pairs for place in [(value, name), *places(inner)]]


@given(st.sampled_from(range(len(GOOD))), st.lists(st.tuples(st.integers(0), anything), max_size=2))
def test_whatever_a_config_says_is_read_or_refused(which: int, changes: list[tuple[int, Any]]) -> None:
    config = copy.deepcopy(GOOD[which])
    for index, value in changes:
        found = places(config)
        container, name = found[index % len(found)]
        container[name] = value
    try:
        scheme = imports.detect({"quantization_config": config}, Path("nowhere"))
    except InputError as error:
        assert changes
        assert error.cause.isprintable()
        assert error.fix
    else:
        assert scheme is not None
        for module in ("lm_head", "model.layers.0.mlp.gate", "a.b", ""):
            with Reader() as reader:
                assert imports.check(module, scheme, {}, reader) is None
