"""Checkpoints of AutoGPTQ and GPTQModel, written here the way their packing is described."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantized_files import MODULE, SCALES, Array, checkpoint, read, read_integers, same_bits, values

from trtkit.errors import InputError
from trtkit.quantize import imports

CONFIG: dict[str, Any] = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False,
    "checkpoint_format": "gptq_v2", "damp_percent": 0.01, "true_sequential": True,
}  # fmt: skip


def packed(codes: Array, bits: int) -> Array:
    """Consecutive rows in a word, the first in its lowest bits (AutoGPTQ, qlinear_cuda_old.py, pack)."""
    per_word = 32 // bits
    words = np.zeros((codes.shape[0] // per_word, codes.shape[1]), np.uint32)
    for row in range(codes.shape[0]):
        words[row // per_word] |= codes[row].astype(np.uint32) << np.uint32(bits * (row % per_word))
    return words.view(np.int32)


def sample(
    outputs: int = 16, inputs: int = 128, group: int = 32, bits: int = 4, *, low: int = 0, seed: int = 0
) -> dict[str, Array]:
    """Unsigned codes, zeros of at least `low`, and scales: (N, K) and (N, K / group)."""
    random = np.random.default_rng(seed)
    shape = (outputs, inputs // group)
    return {
        "codes": random.integers(0, 1 << bits, (outputs, inputs)),
        "zeros": random.integers(low, 1 << bits, shape),
        "scales": random.uniform(1e-4, 0.2, shape).astype(np.float16),
    }


def tensors(linear: dict[str, Array], bits: int = 4, less: int = 0) -> dict[str, Array]:
    inputs = linear["codes"].shape[1]
    return {
        "qweight": packed(linear["codes"].T, bits),
        "qzeros": np.ascontiguousarray(packed(linear["zeros"] - less, bits).T),
        "scales": np.ascontiguousarray(linear["scales"].T),
        "g_idx": (np.arange(inputs) // (inputs // linear["scales"].shape[1])).astype(np.int32),
    }


@given(
    st.sampled_from([4, 8]), st.integers(1, 3), st.integers(1, 4), st.sampled_from([8, 32, 128]), st.booleans(),
    st.sampled_from(["gptq", "gptq_v2"]), st.sampled_from(sorted(SCALES)), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_values_are_the_files(
    bits: int, octets: int, groups: int, group: int, whole: bool, packing: str, dtype: str, seed: int
) -> None:
    inputs, less = groups * group, int(packing == "gptq")
    group = inputs if whole else group
    linear = sample(8 * octets, inputs, group, bits, low=less, seed=seed)
    linear["scales"] = linear["scales"].astype(SCALES[dtype])
    config = {**CONFIG, "bits": bits, "group_size": -1 if whole else group, "checkpoint_format": packing}
    weight = read_integers(tensors(linear, bits, less), config)
    assert same_bits(weight.dequantize(), values(linear["codes"], linear["zeros"], linear["scales"], group))
    assert same_bits(weight.codes, (linear["codes"] - (1 << (bits - 1))).astype(np.int8))
    assert (weight.bits, weight.group_size, weight.prequant, weight.input_scale) == (bits, group, None, None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("less", [0, 1])
def test_symmetric_weights_have_no_zeros(bits: int, less: int) -> None:
    linear = sample(bits=bits)
    linear["zeros"][:] = 1 << (bits - 1)
    config = {**CONFIG, "bits": bits, "sym": True, "checkpoint_format": "gptq" if less else "gptq_v2"}
    weight = read_integers(tensors(linear, bits, less), config)
    assert weight.zeros is None
    assert same_bits(weight.dequantize(), values(linear["codes"], 1 << (bits - 1), linear["scales"], 32))


def test_config_that_says_sym_must_mean_it() -> None:
    with pytest.raises(InputError, match=rf"says sym, but tensor '{MODULE}\.qzeros'"):
        read(tensors(sample()), {**CONFIG, "sym": True})


def borrowed(zeros: Array, bits: int) -> Array:
    """Zeros less one as GPTQModel takes them off: one subtraction for a whole word (convert_gptq_v2_to_v1_format)."""
    ones = sum(1 << (bits * i) for i in range(32 // bits))
    words = packed(zeros, bits).view(np.uint32).astype(np.int64) - ones
    return np.ascontiguousarray((words % (1 << 32)).astype(np.uint32).view(np.int32).T)


@given(st.sampled_from([4, 8]), st.integers(0, 2**32 - 1))
def test_zero_points_of_zero_from_gptqmodel(bits: int, seed: int) -> None:
    linear = sample(bits=bits, seed=seed)
    linear["zeros"][np.random.default_rng(seed).random(linear["zeros"].shape) < 0.3] = 0
    files = tensors(linear, bits) | {"qzeros": borrowed(linear["zeros"], bits)}
    config = {**CONFIG, "bits": bits, "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:1.7.0"]}}
    weight = read_integers(files, config)
    assert same_bits(weight.dequantize(), values(linear["codes"], linear["zeros"], linear["scales"], 32))


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_that_programs_read_differently_are_refused(bits: int) -> None:
    linear = sample(bits=bits, low=1)
    files = tensors(linear, bits, 1)
    files["qzeros"][1, 1] |= np.int32((1 << bits) - 1)
    with pytest.raises(
        InputError, match=rf"'{MODULE}\.qzeros' stores a zero point less one as {(1 << bits) - 1}"
    ) as refused:
        read(files, {**CONFIG, "bits": bits, "checkpoint_format": "gptq"})
    assert "gptq_v2" in refused.value.fix


@pytest.mark.parametrize("desc_act", [False, True])
def test_groups_whose_inputs_do_not_lie_together_are_refused(desc_act: bool) -> None:
    config = {**CONFIG, "desc_act": desc_act}
    files = tensors(sample())
    assert read(files, config) is not None  # in order, whatever the config says
    files["g_idx"][[3, 40]] = files["g_idx"][[40, 3]]
    with checkpoint(files, config) as (scheme, entries, reader), pytest.raises(InputError, match="desc_act") as refused:
        imports.check(MODULE, scheme, entries, reader)
    assert "desc_act false" in refused.value.fix


def test_one_group_may_have_an_index() -> None:
    linear = sample(group=128)
    assert read(tensors(linear), {**CONFIG, "group_size": -1}) is not None
    del (files := tensors(linear))["g_idx"]
    assert read(files, {**CONFIG, "group_size": -1}) is not None


def test_spelling_of_autogptqs_own_file(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text('{"bits": 8, "group_size": -1, "desc_act": false, "sym": true}')
    scheme = imports.detect({}, tmp_path)
    assert scheme is not None
    linear = scheme.targets[0][1]
    assert (scheme.method, linear.bits, linear.scales, linear.group_size) == ("gptq", 8, "channel", None)
    assert linear.quant_algo == "W8A16"


def test_modules_that_are_not_quantised() -> None:
    assert read({"weight": np.zeros((16, 128), np.float16)}, CONFIG) is None
    assert read(tensors(sample()), {**CONFIG, "dynamic": {"-:.*lm_head": {}}}) is not None


REFUSED = [
    ({"bits": 3}, "GPTQ with bits 3"),
    ({"bits": 2}, "GPTQ with bits 2"),
    ({"checkpoint_format": "marlin"}, "marlin is not one"),
    ({"checkpoint_format": None, "format": "bitblas"}, "bitblas is not one"),
    ({"checkpoint_format": "gptq_p"}, "gptq_p is not one"),
    ({"is_marlin_format": True}, "packed for Marlin"),
    ({"pack_dtype": "int8"}, "pack_dtype int8"),
    ({"dynamic": {"+:.*down_proj": {"bits": 8}}}, "other settings for some modules"),
    ({"dynamic": []}, r"'dynamic' is \[\], expected a mapping"),
    ({"group_size": 0}, "group size 0"),
    ({"sym": 1}, "'sym' is 1, expected true or false"),
]


@pytest.mark.parametrize(("change", "cause"), REFUSED, ids=[cause for _, cause in REFUSED])
def test_configs_that_are_refused(change: dict[str, Any], cause: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=cause) as refused:
        imports.detect({"quantization_config": {**CONFIG, **change}}, tmp_path)
    assert refused.value.cause.startswith(str(tmp_path / "config.json"))
    assert refused.value.fix


BAD = [
    ({"qzeros": None}, "'{m}.qzeros' is missing"),
    ({"scales": None}, "'{m}.scales' is missing"),
    ({"qweight": None}, "'{m}.qweight' is missing"),
    ({"qweight": np.zeros((16, 16), np.uint8)}, "'{m}.qweight' is U8, expected I32"),
    ({"qweight": np.zeros((8, 16), np.int32)}, "'{m}.scales' has 4 groups"),
    ({"scales": np.ones((3, 16), np.float16)}, "'{m}.scales' has 3 groups"),
    ({"scales": np.full((4, 16), np.inf, np.float16)}, "'{m}.scales' holds a scale that is infinite"),
    ({"qzeros": np.zeros((4, 3), np.int32)}, r"'{m}.qzeros' has shape \[4, 3\], expected \[4, 2\]"),
    ({"g_idx": np.zeros(64, np.int32)}, r"'{m}.g_idx' has shape \[64\], expected \[128\]"),
    ({"g_idx": np.zeros(128, np.float32)}, "'{m}.g_idx' is F32"),
    ({"qweight": np.zeros((16, 12), np.int32), "scales": np.ones((4, 12), np.float16)}, "12 outputs, no multiple of 8"),
    ({"weight": np.zeros((16, 128), np.float16)}, "'{m}' has a plain weight beside"),
]


@pytest.mark.parametrize(("change", "cause"), BAD, ids=[cause for _, cause in BAD])
def test_tensors_that_are_refused(change: dict[str, Array | None], cause: str) -> None:
    files = {name: value for name, value in (tensors(sample()) | change).items() if value is not None}
    with pytest.raises(InputError, match=cause.format(m=MODULE)):
        read(files, CONFIG)
