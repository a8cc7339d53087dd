"""Checkpoints of llm-compressor, written here the way compressed-tensors describes them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantized_files import MODULE, SCALES, Array, checkpoint, read, read_integers, same_bits, values

from trtkit.convert.number_formats import Float8Weight, IntegerWeight
from trtkit.errors import InputError
from trtkit.quantize import imports

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)

WEIGHTS: dict[str, Any] = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
    "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {}, "scale_dtype": None,
    "zp_dtype": None,
}  # fmt: skip
INT8 = {**WEIGHTS, "num_bits": 8, "strategy": "channel", "group_size": None}
FP8 = {**INT8, "type": "float"}
TOKEN = {**INT8, "strategy": "token", "dynamic": True}
TENSOR = {**INT8, "strategy": "tensor"}


def config(packing: str, weights: Any, inputs: Any = None, **other: Any) -> dict[str, Any]:
    """As llm-compressor 0.14 writes it."""
    group = {
        "targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None,
        "format": packing,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": packing, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None, "sparsity_config": {},
        "transform_config": {}, "global_compression_ratio": None, "version": "0.19.0", **other,
    }  # fmt: skip


PACKED = config("pack-quantized", WEIGHTS)
W8A8 = config("int-quantized", INT8, TOKEN)
FLOAT = config("float-quantized", FP8, {**TOKEN, "type": "float"})


def packed(codes: Array, bits: int) -> Array:
    """Rows of signed codes, each as one long number whose bits i * bits on hold code i plus half of the range."""
    words = -(-codes.shape[1] * bits // 32)
    rows = []
    for row in codes:
        number = sum((int(code) + (1 << (bits - 1))) << (bits * i) for i, code in enumerate(row))
        rows.append(np.frombuffer(number.to_bytes(4 * words, "little"), np.int32))
    return np.stack(rows)


def integers(outputs: int, inputs: int, group: int, bits: int, dtype: str, seed: int) -> dict[str, Array]:
    """Signed codes, zeros and scales: (N, K) and (N, K / group)."""
    random = np.random.default_rng(seed)
    half, shape = 1 << (bits - 1), (outputs, inputs // group)
    return {
        "codes": random.integers(-half, half, (outputs, inputs), np.int8),
        "zeros": random.integers(-half, half, shape, np.int8),
        "scales": random.uniform(1e-4, 0.2, shape).astype(SCALES[dtype]),
    }


def pack_quantized(linear: dict[str, Array], bits: int, *, symmetric: bool) -> dict[str, Array]:
    files = {
        "weight_packed": packed(linear["codes"], bits),
        "weight_scale": linear["scales"],
        "weight_shape": np.array(linear["codes"].shape, np.int64),
    }
    zeros = np.ascontiguousarray(packed(linear["zeros"].T, bits).T)
    return files if symmetric else files | {"weight_zero_point": zeros}


@given(
    st.sampled_from([4, 8]), st.integers(1, 20), st.integers(1, 4), st.sampled_from([4, 12, 32, 128]), st.booleans(),
    st.booleans(), st.sampled_from(sorted(SCALES)), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_packed_values_are_the_files(
    bits: int, outputs: int, groups: int, group: int, whole: bool, symmetric: bool, dtype: str, seed: int
) -> None:
    inputs = groups * group
    group = inputs if whole else group
    linear = integers(outputs, inputs, group, bits, dtype, seed)
    weights = {**WEIGHTS, "num_bits": bits, "symmetric": symmetric}
    weights |= {"strategy": "channel", "group_size": -1 if seed % 2 else None} if whole else {"group_size": group}
    weight = read_integers(pack_quantized(linear, bits, symmetric=symmetric), config("pack-quantized", weights))
    zeros = 0 if symmetric else linear["zeros"]
    assert same_bits(weight.dequantize(), values(linear["codes"], zeros, linear["scales"], group))
    assert same_bits(weight.codes, linear["codes"])
    assert (weight.bits, weight.group_size, weight.prequant, weight.input_scale) == (bits, group, None, None)


def test_unpacked_zero_points_of_old_releases() -> None:
    linear = integers(16, 64, 32, 4, "float16", 0)
    files = pack_quantized(linear, 4, symmetric=False) | {"weight_zero_point": linear["zeros"]}
    weight = read_integers(files, config("pack-quantized", {**WEIGHTS, "symmetric": False}))
    assert same_bits(weight.dequantize(), values(linear["codes"], linear["zeros"], linear["scales"], 32))


@given(
    st.integers(1, 20), st.integers(1, 64), st.sampled_from(["channel", "tensor"]),
    st.sampled_from(["static", "dynamic", None]), st.sampled_from(["int-quantized", "naive-quantized"]),
    st.sampled_from(sorted(SCALES)), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_int8_values_are_the_files(
    outputs: int, inputs: int, strategy: str, activations: str | None, packing: str, dtype: str, seed: int
) -> None:
    linear = integers(outputs, inputs, inputs, 8, dtype, seed)
    scales = linear["scales"] if strategy == "channel" else linear["scales"][:1, 0]
    files = {"weight": linear["codes"], "weight_scale": scales}
    if activations == "static":
        files["input_scale"] = np.array([0.0123], SCALES[dtype])
    arguments = {"static": TENSOR, "dynamic": TOKEN, None: None}[activations]
    weight = read_integers(files, config(packing, {**INT8, "strategy": strategy}, arguments))
    wide = np.broadcast_to(scales.reshape(-1, 1), (outputs, 1))
    assert same_bits(weight.dequantize(), values(linear["codes"], 0, wide, inputs))
    assert weight.bits == 8
    assert weight.zeros is None
    assert weight.input_scale == (float(files["input_scale"][0]) if activations == "static" else None)


@given(
    st.integers(1, 20), st.integers(1, 64), st.sampled_from(["channel", "tensor"]),
    st.sampled_from(["static", "dynamic"]), st.sampled_from(sorted(SCALES)), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_float8_values_are_the_files(
    outputs: int, inputs: int, strategy: str, activations: str, dtype: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    stored = random.normal(0, 100, (outputs, inputs)).clip(-448, 448).astype(FLOAT8)
    scales = random.uniform(1e-4, 0.2, (outputs, 1) if strategy == "channel" else (1,)).astype(SCALES[dtype])
    files = {"weight": stored, "weight_scale": scales}
    if activations == "static":
        files["input_scale"] = np.array([0.5], SCALES[dtype])
    arguments = {"static": TENSOR, "dynamic": TOKEN}[activations]
    settings = config("float-quantized", {**FP8, "strategy": strategy}, {**arguments, "type": "float"})
    weight = read(files, settings)
    assert isinstance(weight, Float8Weight)
    assert same_bits(weight.values, stored)
    assert weight.scales.shape == ((outputs,) if strategy == "channel" else (1,))
    assert same_bits(weight.dequantize(), stored.astype(np.float32) * scales.astype(np.float32).reshape(-1, 1))
    assert weight.input_scale == (0.5 if activations == "static" else None)


def test_formats_say_what_tensorrt_llm_calls_them(tmp_path: Path) -> None:
    fp8_static = {**TENSOR, "type": "float"}
    cases = {
        "W4A16_AWQ": PACKED,
        "W4A16_GPTQ": config("pack-quantized", {**WEIGHTS, "symmetric": False}),
        "W8A16": config("pack-quantized", INT8),
        "W8A8_SQ_PER_CHANNEL": config("int-quantized", INT8, TENSOR),
        "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": W8A8,
        "FP8": config("float-quantized", {**FP8, "strategy": "tensor"}, fp8_static),
        "FP8_PER_CHANNEL_PER_TOKEN": FLOAT,
        None: config("float-quantized", FP8, fp8_static),
    }
    found = {}
    for algo, settings in cases.items():
        scheme = imports.detect({"quantization_config": settings}, tmp_path)
        assert scheme is not None
        found[algo] = scheme.targets[0][1].quant_algo
    assert found == {algo: algo for algo in cases}


def mixed() -> dict[str, Any]:
    """Two groups, the more special one second, and an ignore list with a pattern."""
    settings = config("mixed-precision", WEIGHTS, ignore=["lm_head", r"re:.*\.gate$"])
    settings["config_groups"]["group_0"]["format"] = "pack-quantized"
    special = copy.deepcopy(W8A8["config_groups"]["group_0"])
    settings["config_groups"]["group_1"] = {**special, "targets": [r"re:.*(up|down)_proj$", "model.layers.0.mlp.x"]}
    return settings


def test_names_count_before_patterns_and_patterns_before_classes() -> None:
    linear = integers(16, 64, 64, 8, "float16", 0)
    with checkpoint({"weight": linear["codes"], "weight_scale": linear["scales"]}, mixed()) as (
        scheme,
        entries,
        reader,
    ):
        found = imports.check(MODULE, scheme, entries, reader)
        assert found is not None
        assert (found.bits, found.inputs) == (8, "dynamic")
        formats = {
            name: imports.compressed_tensors.format_of(name, scheme)
            for name in (
                "model.layers.0.mlp.x",
                "model.layers.1.self_attn.q_proj",
                "lm_head",
                "model.layers.3.mlp.gate",
            )
        }
    assert [None if linear is None else linear.bits for linear in formats.values()] == [8, 4, None, None]


def test_modules_that_are_not_quantised() -> None:
    plain = {"weight": np.zeros((16, 64), np.float16)}
    linear = pack_quantized(integers(16, 64, 32, 4, "float16", 0), 4, symmetric=True)
    assert read(plain, PACKED) is None
    assert read(plain, {**PACKED, "ignore": ["re:.*up_proj"]}) is None
    for ignored in (MODULE, "re:.*up_proj"):
        with pytest.raises(InputError, match=f"'{MODULE}' is listed as not quantised"):
            read(linear, {**PACKED, "ignore": [ignored]})


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj.output_scale", "v_proj.output_scale")])
def test_scales_of_the_kv_cache(names: tuple[str, str]) -> None:
    attention = "model.layers.0.self_attn"
    scales = {f"{attention}.{name}": np.array([0.25 * (i + 1)], np.float16) for i, name in enumerate(names)}
    settings = {**PACKED, "kv_cache_scheme": {**TENSOR, "type": "float"}}
    with checkpoint(scales, settings) as (scheme, entries, reader):
        assert scheme.kv_cache == "FP8"
        assert imports.read_kv_scales(attention, scheme, entries, reader) == (0.25, 0.5)
        assert imports.read_kv_scales("model.layers.1.self_attn", scheme, entries, reader) is None
    del scales[f"{attention}.{names[1]}"]
    with checkpoint(scales, settings) as (scheme, entries, reader), pytest.raises(InputError, match="is missing"):
        imports.read_kv_scales(attention, scheme, entries, reader)
    with checkpoint(scales, {**PACKED, "kv_cache_scheme": TENSOR}) as (scheme, _, _):
        assert scheme.kv_cache == "INT8"


def test_the_nesting_of_old_checkpoints(tmp_path: Path) -> None:
    inner = {key: value for key, value in PACKED.items() if key not in ("sparsity_config", "quant_method")}
    scheme = imports.detect({"compression_config": {"quantization_config": inner}}, tmp_path)
    assert scheme is not None
    assert scheme.method == "compressed-tensors"
    with pytest.raises(InputError, match="sparse checkpoint"):
        imports.detect(
            {"compression_config": {"quantization_config": inner, "sparsity_config": {"format": "sparse-bitmask"}}},
            tmp_path,
        )


ROTATED = {"config_groups": {"R1": {"type": "hadamard"}}}
REFUSED = [
    (config("marlin-24", WEIGHTS), "marlin-24 is not one"),
    (config("nvfp4-pack-quantized", WEIGHTS), "nvfp4-pack-quantized is not one"),
    (config("dense", WEIGHTS), "dense is not one"),
    (config("mxfp8-quantized", WEIGHTS), "mxfp8-quantized is not one"),
    (config("pack-quantized", {**WEIGHTS, "num_bits": 3}), "num_bits 3"),
    (config("pack-quantized", {**WEIGHTS, "actorder": "group"}), "actorder group"),
    (config("pack-quantized", {**WEIGHTS, "actorder": "dynamic"}), "actorder dynamic"),
    (config("pack-quantized", {**WEIGHTS, "actorder": True}), "actorder True"),
    (config("pack-quantized", {**WEIGHTS, "strategy": "tensor_group"}), "one scale per tensor_group"),
    (config("pack-quantized", {**WEIGHTS, "strategy": "tensor", "group_size": None}), "one scale per tensor is not"),
    (config("pack-quantized", {**WEIGHTS, "group_size": None}), "group size 0"),
    (config("pack-quantized", {**WEIGHTS, "dynamic": True}), "dynamic scales"),
    (config("pack-quantized", {**WEIGHTS, "type": "float"}), r"floats of 4 bits .*nvfp4"),
    (config("pack-quantized", WEIGHTS, TOKEN), "4 bits with quantised inputs"),
    (config("pack-quantized", WEIGHTS, {**TOKEN, "type": "float"}), "int weights with inputs of type float8"),
    (config("float-quantized", {**FP8, "strategy": "block", "block_structure": [128, 128]}), "one scale per block"),
    (config("float-quantized", {**FP8, "strategy": "group", "group_size": 128}), "one scale per group is not"),
    (config("float-quantized", INT8, TOKEN), "float-quantized holds no weights of type int"),
    (config("int-quantized", FP8, {**TOKEN, "type": "float"}), "int-quantized holds no weights of type float8"),
    (config("int-quantized", {**INT8, "num_bits": 4}, TOKEN), "num_bits 4"),
    (config("int-quantized", {**INT8, "symmetric": False}, TOKEN), "weights with zero points"),
    (config("int-quantized", INT8, {**TOKEN, "symmetric": False}), "inputs with zero points"),
    (config("int-quantized", INT8, {**TENSOR, "dynamic": True}), "inputs with one scale per tensor"),
    (config("int-quantized", INT8, {**TOKEN, "dynamic": "local"}), "inputs that are dynamic local"),
    (config("int-quantized", INT8, {**TOKEN, "num_bits": 4}), "inputs of type int"),
    (config("int-quantized", None, TOKEN), "quantised inputs alone"),
    ({**W8A8, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse checkpoint"),
    ({**W8A8, "transform_config": ROTATED}, "rotated weights"),
    ({**W8A8, "quantization_status": "frozen"}, "quantization_status frozen"),
    ({**W8A8, "config_groups": {}}, "without config_groups"),
    ({**W8A8, "config_groups": {"W8A8": ["Linear"]}}, "'W8A8' is .*expected a mapping"),
    ({**W8A8, "kv_cache_scheme": TOKEN}, "KV cache with dynamic scales"),
    ({**W8A8, "kv_cache_scheme": {**TENSOR, "strategy": "attn_head"}}, "one scale per attn_head"),
    ({**W8A8, "ignore": ["re:(a+)+"]}, r"pattern 're:\(a\+\)\+' is more than"),
    ({**W8A8, "ignore": {}}, "'ignore' is"),
]


@pytest.mark.parametrize(("settings", "cause"), REFUSED, ids=[cause for _, cause in REFUSED])
def test_configs_that_are_refused(settings: dict[str, Any], cause: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=cause) as refused:
        imports.detect({"quantization_config": json.loads(json.dumps(settings))}, tmp_path)
    assert refused.value.cause.startswith(str(tmp_path / "config.json"))
    assert refused.value.fix


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"targets": ["LlamaAttention"]}, "targets of class LlamaAttention"),
        ({"targets": ["re:a{5}"]}, "more than trtkit matches"),
        ({"output_activations": TENSOR}, "quantised outputs"),
        ({"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized is not one"),
    ],
)
def test_groups_that_are_refused(change: dict[str, Any], cause: str, tmp_path: Path) -> None:
    settings = copy.deepcopy(W8A8)
    settings["config_groups"]["group_0"] |= change
    with pytest.raises(InputError, match=cause):
        imports.detect({"quantization_config": settings}, tmp_path)


LINEAR = integers(16, 64, 32, 4, "float16", 1)
SQUARE = integers(16, 64, 64, 8, "float16", 1)
ASYMMETRIC = config("pack-quantized", {**WEIGHTS, "symmetric": False})
STATIC = config("int-quantized", INT8, TENSOR)
BAD: list[tuple[dict[str, Any], dict[str, Array | None], str]] = [
    (PACKED, {"weight_packed": None}, "'{m}.weight_packed' is missing"),
    (PACKED, {"weight_scale": None}, "'{m}.weight_scale' is missing"),
    (PACKED, {"weight_shape": None}, "'{m}.weight_shape' is missing"),
    (PACKED, {"weight_shape": np.array([16, 72])}, "'{m}.weight_packed' of shape .* does not hold the 16 x 72"),
    (PACKED, {"weight_shape": np.array([-1, 64])}, "'{m}.weight_shape' holds no shape"),
    (PACKED, {"weight_shape": np.array([16, 64, 1])}, r"'{m}.weight_shape' has shape \[3\]"),
    (PACKED, {"weight_scale": np.ones((16, 3), np.float16)}, "'{m}.weight_scale' has 3 groups"),
    (PACKED, {"weight_scale": np.ones((8, 2), np.float16)}, r"'{m}.weight_scale' has shape \[8, 2\]"),
    (PACKED, {"weight_packed": np.zeros((16, 8), np.uint8)}, "'{m}.weight_packed' is U8"),
    (PACKED, {"weight_g_idx": np.zeros(64, np.int32)}, "weight_g_idx"),
    (PACKED, {"weight_global_scale": np.ones(1, np.float32)}, "weight_global_scale"),
    (PACKED, {"weight": np.zeros((16, 64), np.float16)}, "plain weight beside"),
    (PACKED, {"weight_zero_point": np.ones((2, 2), np.int32)}, "'{m}.weight_zero_point' is not zero"),
    (ASYMMETRIC, {}, "'{m}.weight_zero_point' is missing"),
    (ASYMMETRIC, {"weight_zero_point": np.ones((16, 2), np.int32)}, "does not hold 16 x 2 zero points"),
    (ASYMMETRIC, {"weight_zero_point": np.ones((2, 2), np.int8)}, "does not hold 16 x 2 zero points"),
    (STATIC, {"input_scale": None}, "'{m}.input_scale' is missing"),
    (STATIC, {"input_scale": np.ones(2, np.float32)}, r"'{m}.input_scale' has shape \[2\]"),
    (STATIC, {"input_scale": np.array([np.inf], np.float32)}, "'{m}.input_scale' holds a scale that is infinite"),
    (STATIC, {"input_zero_point": np.ones(1, np.int8)}, "'{m}.input_zero_point' is not zero"),
    (STATIC, {"weight": np.zeros((16, 64), np.float16)}, "'{m}.weight' is F16, expected I8"),
    (STATIC, {"weight_scale": None}, "'{m}.weight' is I8, but has no scales"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "change", "cause"), BAD, ids=[cause for _, _, cause in BAD])
def test_tensors_that_are_refused(settings: dict[str, Any], change: dict[str, Array | None], cause: str) -> None:
    files: dict[str, Array | None] = dict(pack_quantized(LINEAR, 4, symmetric=True))
    if settings is STATIC:
        scales = {"weight_scale": SQUARE["scales"], "input_scale": np.ones(1, np.float32)}
        files = {"weight": SQUARE["codes"], **scales}
    with pytest.raises(InputError, match=cause.format(m=MODULE)):
        read({name: value for name, value in (files | change).items() if value is not None}, settings)


def test_zero_zero_points_of_symmetric_weights_are_fine() -> None:
    files = pack_quantized(LINEAR, 4, symmetric=True) | {"weight_zero_point": np.zeros((16, 2), np.int8)}
    assert isinstance(read(files, PACKED), IntegerWeight)
