"""The layout of TensorRT-LLM's mixed kernels, against hashes of what TensorRT-LLM's own Python code wrote."""

from __future__ import annotations

import hashlib

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtkit.convert.interleave import deinterleave, gptq_tensors, gptq_values, interleave
from trtkit.convert.number_formats import IntegerWeight
from trtkit.errors import InputError

GOLDEN = {
    (8, 16): {
        80: "517c25f5c65f228428a156252fea39c5",
        90: "0d5c80f995d7116f17ec703749960ca8",
        100: "d8413c53febe6a252e38553c381b0c13",
    },
    (4, 16): {
        80: "5b4190a549b4126986eec53aaf3867a2",
        90: "03d334703dd7eade1937944980193d6e",
        100: "4d2b5a14a74321e8039f3436bb457c5c",
    },
    (4, 8): {
        80: "1a6dd3d60e01dfcda7057ec0870dfd44",
        90: "efda2e361f56d50396627ae8e173929a",
        100: "4d2b5a14a74321e8039f3436bb457c5c",
    },
}
"""(bits of a weight, bits of an activation) -> GPU -> first half of the SHA-256 of `preprocess_weights_for_mixed_gemm`
of TensorRT-LLM for `known_codes`."""

SAME = {75: 80, 80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 103: 100, 120: 80, 121: 80}
"""GPU -> the one whose layout it has."""

FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def known_codes(bits: int) -> npt.NDArray[np.int8]:
    k, n = np.arange(256)[:, None], np.arange(128)[None]
    return ((131 * k + 17 * n + k * n % 251) % (1 << bits) - (1 << (bits - 1))).astype(np.int8)


@pytest.mark.parametrize("sm", SAME)
@pytest.mark.parametrize(("bits", "activation_bits"), GOLDEN)
def test_bytes_are_those_of_tensorrt_llm(bits: int, activation_bits: int, sm: int) -> None:
    packed = interleave(known_codes(bits), bits, activation_bits, sm)
    assert packed.dtype == np.int8
    assert packed.shape == (256, 128 * bits // 8)
    assert hashlib.sha256(packed.tobytes()).hexdigest()[:32] == GOLDEN[bits, activation_bits][SAME[sm]]


@pytest.mark.parametrize(("bits", "activation_bits"), GOLDEN)
def test_experts_have_the_layout_of_older_gpus_on_newer_ones(bits: int, activation_bits: int) -> None:
    codes = known_codes(bits)
    stack = np.stack([codes, codes[::-1]])
    expected = [interleave(expert, bits, activation_bits, 80) for expert in stack]
    for sm in SAME:
        packed = interleave(stack, bits, activation_bits, sm)
        assert np.array_equal(packed, expected)
        assert np.array_equal(deinterleave(packed, bits, activation_bits, sm), stack)


@given(
    st.sampled_from(sorted(GOLDEN)), st.sampled_from(sorted(SAME)), st.integers(1, 4), st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_deinterleave_undoes_interleave(widths: tuple[int, int], sm: int, tiles: int, octets: int, seed: int) -> None:
    bits, activation_bits = widths
    half = 1 << (bits - 1)
    shape = (tiles * 1024 // activation_bits, octets * 8)
    codes = np.random.default_rng(seed).integers(-half, half, shape, np.int8)
    packed = interleave(codes, bits, activation_bits, sm)
    assert packed.nbytes * 8 == codes.size * bits
    assert np.array_equal(deinterleave(packed, bits, activation_bits, sm), codes)
    assert np.array_equal(deinterleave(packed.view(np.uint8), bits, activation_bits, sm), codes)


@pytest.mark.parametrize(
    ("shape", "bits", "activation_bits", "sm", "cause"),
    [
        ((96, 64), 4, 16, 80, "96 inputs"),
        ((32, 64), 8, 16, 89, "32 inputs"),
        ((64, 64), 4, 8, 80, "64 inputs"),
        ((24, 64), 8, 16, 90, "24 inputs"),
        ((128, 60), 4, 16, 80, "60 outputs"),
        ((128, 64), 8, 8, 80, "8-bit weights with 8-bit activations"),
        ((128, 64), 3, 16, 80, "3-bit weights"),
        ((128, 64), 4, 16, 70, "sm 70"),
        ((128, 64), 4, 16, 101, "sm 101"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(
    shape: tuple[int, int], bits: int, activation_bits: int, sm: int, cause: str
) -> None:
    with pytest.raises(InputError, match=cause) as refused:
        interleave(np.zeros(shape, np.int8), bits, activation_bits, sm)
    assert refused.value.fix


def test_smaller_blocks_do_where_columns_are_not_interleaved() -> None:
    interleave(np.zeros((96, 64), np.int8), 4, 16, 90)
    interleave(np.zeros((96, 64), np.int8), 4, 16, 100)


@pytest.mark.parametrize("bits", [4, 8])
def test_deinterleave_refuses_the_same(bits: int) -> None:
    with pytest.raises(InputError, match="32 inputs"):
        deinterleave(np.zeros((32, 8 * bits), np.int8), bits, 16, 80)


def random_weight(bits: int, group: int, seed: int, *, symmetric: bool) -> IntegerWeight:
    random = np.random.default_rng(seed)
    half, shape = 1 << (bits - 1), (64, 256)
    scales = random.uniform(0.001, 0.1, (shape[0], shape[1] // group)).astype(np.float16).astype(np.float32)
    zeros = None if symmetric else random.integers(-half, half, scales.shape, np.int8)
    return IntegerWeight(random.integers(-half, half, shape, np.int8), scales, zeros, bits)


@given(
    st.sampled_from([4, 8]), st.sampled_from([64, 128, 256]), st.booleans(), st.sampled_from([80, 90, 103]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_gptq_tensors_hold_the_weight(bits: int, group: int, symmetric: bool, sm: int, seed: int) -> None:
    weight = random_weight(bits, group, seed, symmetric=symmetric)
    tensors, rounded = gptq_tensors(weight, FLOAT16, sm)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "weight": (256, 64 * bits // 16),
        "weights_scaling_factor": (256 // group, 64),
        "zero": (256 // group, 64),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {FLOAT16}
    # As TensorRT-LLM computes it: (8 - unsigned zero) * scale, both in the checkpoint's dtype.
    offsets = np.zeros(weight.scales.shape, np.int64) if weight.zeros is None else -weight.zeros.astype(np.int64)
    exact = offsets.astype(np.float32) * weight.scales
    assert tensors["zero"].tobytes() == exact.T.astype(np.float16).tobytes()  # no negative zeros either
    assert (rounded.scales, rounded.zeros) == (0, np.count_nonzero(exact != exact.astype(np.float16)))
    zero = np.repeat(tensors["zero"].T.astype(np.float32), group, axis=1)
    scales = np.repeat(weight.scales, group, axis=1)
    values = gptq_values(tensors["weight"], tensors["weights_scaling_factor"], tensors["zero"], bits, sm)
    assert np.array_equal(values, weight.codes.astype(np.float32) * scales + zero)
    if rounded.zeros == 0:
        assert np.array_equal(values, weight.dequantize())


def test_scales_of_eight_significant_bits_lose_nothing_in_float16() -> None:
    weight = random_weight(4, 64, 0, symmetric=False)
    coarse = weight.scales.astype(BFLOAT16).astype(np.float32)  # three bits are left for the zeros
    tensors, rounded = gptq_tensors(IntegerWeight(weight.codes, coarse, weight.zeros), FLOAT16, 80)
    assert (rounded.scales, rounded.zeros) == (0, 0)
    values = gptq_values(tensors["weight"], tensors["weights_scaling_factor"], tensors["zero"], 4, 80)
    assert np.array_equal(values, IntegerWeight(weight.codes, coarse, weight.zeros).dequantize())


def test_what_bfloat16_rounds_is_counted() -> None:
    weight = random_weight(4, 64, 1, symmetric=False)
    tensors, rounded = gptq_tensors(weight, BFLOAT16, 80)
    stored = weight.scales.astype(BFLOAT16)
    assert rounded.scales == np.count_nonzero(stored.astype(np.float32) != weight.scales) > 0
    assert weight.zeros is not None
    exact = -weight.zeros.astype(np.float32) * stored.astype(np.float32)
    assert rounded.zeros == np.count_nonzero(exact.astype(BFLOAT16).astype(np.float32) != exact) > 0
    assert np.array_equal(tensors["weights_scaling_factor"], stored.T)


def test_symmetric_weights_have_plain_zeros() -> None:
    tensors, rounded = gptq_tensors(random_weight(4, 64, 2, symmetric=True), FLOAT16, 80)
    assert not tensors["zero"].view(np.uint16).any()
    assert rounded.zeros == 0


def test_what_the_format_does_not_know_is_refused() -> None:
    weight = random_weight(4, 64, 3, symmetric=True)
    with pytest.raises(InputError, match="scaled nor quantised inputs"):
        gptq_tensors(IntegerWeight(weight.codes, weight.scales, prequant=np.ones(256, np.float32)), FLOAT16, 80)
    with pytest.raises(InputError, match="scaled nor quantised inputs"):
        gptq_tensors(IntegerWeight(weight.codes, weight.scales, input_scale=0.5), FLOAT16, 80)
    with pytest.raises(InputError, match="overflows float16"):
        gptq_tensors(IntegerWeight(weight.codes, weight.scales * np.float32(1e7)), FLOAT16, 80)
