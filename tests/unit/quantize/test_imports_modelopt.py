"""Checkpoints of NVIDIA's Model-Optimizer: written here the way it describes them, and by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantized_files import MODULE, Array, checkpoint, read, read_integers, same_bits, values

from trtkit.convert.number_formats import Float8Weight, IntegerWeight
from trtkit.errors import InputError
from trtkit.quantize import imports

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


def config(algo: str, **other: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head"], **other}


def packed(codes: Array) -> Array:
    """Two output rows in a byte, the even one in the lower half (quant_utils.py, pack_int4_in_uint8)."""
    rows = []
    for row in range(0, len(codes), 2):
        rows.append([(int(a) & 15) | (int(b) & 15) << 4 for a, b in zip(codes[row], codes[row + 1], strict=True)])
    return np.array(rows, np.uint8)


def positive(random: np.random.Generator, *shape: int) -> Array:
    return random.uniform(1e-4, 0.2, shape).astype(np.float32)


@given(
    st.integers(1, 8), st.integers(1, 4), st.sampled_from([4, 32, 128]), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_int4_values_are_the_files(
    pairs: int, groups: int, group: int, says_group: bool, with_inputs: bool, prequant: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(-8, 8, (2 * pairs, groups * group), np.int8)
    files = {"weight": packed(codes), "weight_scale": positive(random, 2 * pairs, groups)}
    if prequant:
        files["pre_quant_scale"] = positive(random, groups * group).astype(ml_dtypes.bfloat16)
    if with_inputs:
        files |= {"input_scale": np.float32(0.25), "weight_scale_2": np.float32(0.125)}
    settings = config("W4A8_AWQ" if with_inputs else "W4A16_AWQ", **({"group_size": group} if says_group else {}))
    with checkpoint(files, settings) as (scheme, entries, reader):
        weight = imports.read(MODULE, scheme, entries, reader)
        linear = imports.check(MODULE, scheme, entries, reader)
        assert imports.read_second_scale(MODULE, scheme, entries, reader) == (0.125 if with_inputs else None)
    assert linear is not None
    assert (linear.group_size, linear.quant_algo) == (group, settings["quant_algo"])
    assert isinstance(weight, IntegerWeight)
    assert same_bits(weight.dequantize(), values(codes, 0, files["weight_scale"], group))
    assert (weight.bits, weight.group_size) == (4, group)
    assert weight.zeros is None
    assert weight.input_scale == (0.25 if with_inputs else None)
    if prequant:
        assert weight.prequant is not None
        assert same_bits(weight.prequant, files["pre_quant_scale"].astype(np.float32))
    else:
        assert weight.prequant is None


@given(st.integers(1, 20), st.integers(1, 64), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_int8_values_are_the_files(
    outputs: int, inputs: int, smooth: bool, prequant: bool, column: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(-128, 128, (outputs, inputs), np.int8)
    scales = positive(random, outputs, 1)
    files = {"weight": codes, "weight_scale": scales if column else scales[:, 0]}
    if prequant:
        files["pre_quant_scale"] = positive(random, inputs)
    if smooth:
        files["input_scale"] = np.array([0.25], np.float32)
    weight = read_integers(files, config("W8A8_SQ_PER_CHANNEL" if smooth else "W8A16"))
    assert same_bits(weight.dequantize(), values(codes, 0, scales, inputs))
    assert weight.bits == 8
    assert weight.input_scale == (0.25 if smooth else None)
    assert (weight.prequant is None) == (not prequant)


@given(st.integers(1, 20), st.integers(1, 64), st.booleans(), st.integers(0, 2**32 - 1))
def test_float8_values_are_the_files(outputs: int, inputs: int, rows: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    stored = random.normal(0, 100, (outputs, inputs)).clip(-448, 448).astype(FLOAT8)
    scales = positive(random, outputs) if rows else np.asarray(positive(random, 1)[0])
    files = {"weight": stored, "weight_scale": scales} | ({} if rows else {"input_scale": np.float32(0.5)})
    weight = read(files, config("FP8_PER_CHANNEL_PER_TOKEN" if rows else "FP8"))
    assert isinstance(weight, Float8Weight)
    assert same_bits(weight.values, stored)
    assert same_bits(weight.scales, scales.reshape(-1))
    assert same_bits(weight.dequantize(), stored.astype(np.float32) * scales.reshape(-1, 1))
    assert weight.input_scale == (None if rows else 0.5)


LAYERS = {
    MODULE: {"quant_algo": "W8A16"},
    "model.layers.0.mlp.down_proj": {"quant_algo": "W4A16_AWQ", "group_size": 32, "has_zero_point": False},
}


@pytest.mark.parametrize("beside", [False, True])
def test_layers_of_their_own_format(beside: bool, tmp_path: Path) -> None:
    quantization: dict[str, Any] = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8"}
    if beside:  # where TensorRT-LLM reads it
        (tmp_path / "quant_cfg.json").write_text(json.dumps({"quantized_layers": LAYERS}))
    else:
        quantization["quantized_layers"] = LAYERS
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    scheme = imports.detect({}, tmp_path)
    assert scheme is not None
    assert scheme.kv_cache == "FP8"
    found = {name: imports.modelopt.format_of(name, scheme) for name in (*LAYERS, "model.layers.1.mlp.up_proj")}
    assert [None if linear is None else linear.quant_algo for linear in found.values()] == ["W8A16", "W4A16_AWQ", None]


def test_excluded_modules() -> None:
    plain = {"weight": np.zeros((16, 64), np.float16)}
    files = {"weight": np.zeros((16, 64), np.int8), "weight_scale": np.ones(16, np.float32)}
    assert read(plain, config("W8A16")) is None
    assert read(plain, config("W8A16", ignore=["model.layers.0*"])) is None
    assert read(files, config("W8A16", ignore=["model.layers.1*", "mlp*"])) is not None
    for pattern in ("model.layers.0*", MODULE, "*.mlp.*"):
        with pytest.raises(InputError, match=f"'{MODULE}' is listed as not quantised"):
            read(files, config("W8A16", ignore=[pattern]))


def test_scales_of_the_kv_cache() -> None:
    attention = "model.layers.0.self_attn"
    scales: dict[str, Array] = {
        f"{attention}.k_proj.k_scale": np.array(0.25, np.float32),
        f"{attention}.v_proj.v_scale": np.array([0.5], np.float32),
    }
    described = {"dynamic": False, "num_bits": 8, "type": "float"}
    for settings in (config("FP8", kv_cache_scheme=described), config("FP8", kv_cache_quant_algo="FP8")):
        with checkpoint(scales, settings) as (scheme, entries, reader):
            assert scheme.kv_cache == "FP8"
            assert imports.read_kv_scales(attention, scheme, entries, reader) == (0.25, 0.5)
            assert imports.read_kv_scales("model.layers.1.self_attn", scheme, entries, reader) is None
    with checkpoint(scales, config("", kv_cache_scheme="INT8")) as (scheme, _, _):
        assert (scheme.kv_cache, scheme.targets) == ("INT8", ())
    biased = scales | {f"{attention}.k_proj.k_bias": np.zeros(1, np.float32)}
    with checkpoint(biased, settings) as (scheme, entries, reader), pytest.raises(InputError, match="with offsets"):
        imports.read_kv_scales(attention, scheme, entries, reader)


REFUSED = [
    (config("NVFP4"), "quant_algo NVFP4 is not one"),
    (config("NVFP4_AWQ"), "quant_algo NVFP4_AWQ is not one"),
    (config("W4A8_NVFP4_FP8"), "quant_algo W4A8_NVFP4_FP8 is not one"),
    (config("MXFP8"), "quant_algo MXFP8 is not one"),
    (config("fp8_pb_wo"), "quant_algo fp8_pb_wo is not one"),
    (config("w4a16_awq"), "quant_algo w4a16_awq is not one"),
    (config("W4A16_AWQ", has_zero_point=True), "W4A16_AWQ with zero points"),
    (config("W4A16_AWQ", group_size=-128), "group size -128"),
    (config("W4A16_AWQ", group_size="128"), "'group_size' is '128'"),
    (config("FP8", kv_cache_quant_algo="NVFP4"), "a KV cache of NVFP4"),
    (config("FP8", kv_cache_scheme={"num_bits": 4, "type": "float"}), "kv_cache_scheme .* is not one"),
    (config("MIXED_PRECISION"), "without quantized_layers"),
    (config("MIXED_PRECISION", quantized_layers={"a.b": {"quant_algo": "NVFP4"}}), "'a.b' with quant_algo NVFP4"),
    (config("MIXED_PRECISION", quantized_layers={"a.b": 3}), "'a.b' is 3, expected a mapping"),
    (config("FP8", ignore="lm_head"), "'ignore' is 'lm_head'"),
]


@pytest.mark.parametrize(("settings", "cause"), REFUSED, ids=[cause for _, cause in REFUSED])
def test_configs_that_are_refused(settings: dict[str, Any], cause: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=cause) as refused:
        imports.detect({"quantization_config": settings}, tmp_path)
    assert refused.value.cause.startswith(str(tmp_path / "config.json"))
    assert refused.value.fix


INT4 = {"weight": np.zeros((8, 64), np.uint8), "weight_scale": np.ones((16, 2), np.float32)}
W4A8 = INT4 | {"input_scale": np.float32(1), "weight_scale_2": np.float32(1)}
FP8 = {"weight": np.zeros((16, 64), FLOAT8), "weight_scale": np.float32(1), "input_scale": np.float32(1)}
BAD: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("W4A16_AWQ", INT4, {"weight": None}, "'{m}.weight' is missing"),
    ("W4A16_AWQ", INT4, {"weight_scale": None}, "'{m}.weight' is U8, but has no scales"),
    ("W4A16_AWQ", INT4, {"weight": np.zeros((16, 64), np.float16)}, "'{m}.weight' is F16, expected U8"),
    ("W4A16_AWQ", INT4, {"weight_scale": np.ones((16, 3), np.float32)}, "'{m}.weight_scale' has 3 groups"),
    ("W4A16_AWQ", INT4, {"weight_scale": np.ones((8, 2), np.float32)}, r"'{m}.weight_scale' has shape \[8, 2\]"),
    ("W4A16_AWQ", INT4, {"input_scale": np.float32(1)}, "'{m}' has a tensor input_scale"),
    ("W4A16_AWQ", INT4, {"pre_quant_scale": np.ones(16, np.float16)}, r"'{m}.pre_quant_scale' has shape \[16\]"),
    ("W4A16_AWQ", INT4, {"pre_quant_scale": np.full(64, np.nan, np.float16)}, "'{m}.pre_quant_scale' holds"),
    ("W4A8_AWQ", W4A8, {"weight_scale_2": None}, "'{m}.weight_scale_2' is missing"),
    ("W4A8_AWQ", W4A8, {"input_scale": None}, "'{m}.input_scale' is missing"),
    ("W8A16", INT4, {}, "'{m}.weight' is U8, expected I8"),
    ("FP8", FP8, {"weight_scale": np.ones(16, np.float32)}, r"'{m}.weight_scale' has shape \[16\]"),
    ("FP8", FP8, {"input_scale": None}, "'{m}.input_scale' is missing"),
    ("FP8", FP8, {"pre_quant_scale": np.ones(64, np.float32)}, "'{m}' has a tensor pre_quant_scale"),
    ("FP8", FP8, {"weight": np.zeros((16, 64), np.int8)}, "'{m}.weight' is I8, expected F8_E4M3"),
    ("FP8", FP8, {"weight_scale_2": np.float32(1)}, "'{m}' has a tensor weight_scale_2"),
]


@pytest.mark.parametrize(("algo", "files", "change", "cause"), BAD, ids=[f"{row[0]} {row[3]}" for row in BAD])
def test_tensors_that_are_refused(algo: str, files: dict[str, Array], change: dict[str, Any], cause: str) -> None:
    changed = {name: value for name, value in (files | change).items() if value is not None}
    with pytest.raises(InputError, match=cause.format(m=MODULE)):
        read(changed, config(algo))


PEER = {
    "FP8_DEFAULT_CFG": ("fp8", "FP8"),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": ("fp8_pc_pt", "FP8_PER_CHANNEL_PER_TOKEN"),
    "INT4_AWQ_CFG": ("int4_awq", "W4A16_AWQ"),
    "W4A8_AWQ_BETA_CFG": ("w4a8_awq", "W4A8_AWQ"),
    "INT8_SMOOTHQUANT_CFG": ("int8_sq", "W8A8_SQ_PER_CHANNEL"),
    "INT8_WEIGHT_ONLY_CFG": ("int8_wo", "W8A16"),
}
"""Model-Optimizer's configurations -> its own name of the format, and the quant_algo that it writes."""


@pytest.mark.peer
def test_files_of_modelopt_itself(tmp_path: Path) -> None:
    """It packs the values that we read into the bytes that we read them from, and dequantises them alike."""
    script = Path(__file__).with_name("modelopt_files.py")
    command = [sys.executable, str(script), str(tmp_path), json.dumps({name: row[0] for name, row in PEER.items()})]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, f"needs the extra `peer`; or leave out with -m 'not peer'\n{done.stderr[-3000:]}"
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == list(PEER)
    for name, (_, algo) in PEER.items():
        assert found[name]["algos"] == [algo], name
        assert found[name]["linears"] == 2 * 7, name
        assert found[name]["wrong"] == [], name
        assert found[name]["leftovers"] == [], name
        assert found[name]["kv"] == 2, name
