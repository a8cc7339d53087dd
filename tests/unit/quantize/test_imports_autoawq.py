"""Checkpoints of AutoAWQ, written here the way its packing is described."""

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
    "quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None,
}  # fmt: skip


def packed(codes: Array) -> Array:
    """AutoAWQ's words: nibble i of word c is column 8 c + order[i] (awq/modules/linear/gemm.py, from_linear)."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for nibble in range(8):
            words[:, column] |= codes[:, 8 * column + order[nibble]].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def sample(
    outputs: int = 16, inputs: int = 128, group: int = 64, dtype: str = "float16", seed: int = 0
) -> dict[str, Array]:
    """Unsigned codes and zeros and scales, (N, K) and (N, K / group)."""
    random = np.random.default_rng(seed)
    shape = (outputs, inputs // group)
    return {
        "codes": random.integers(0, 16, (outputs, inputs)),
        "zeros": random.integers(0, 16, shape),
        "scales": random.uniform(1e-4, 0.2, shape).astype(SCALES[dtype]),
    }


def tensors(linear: dict[str, Array]) -> dict[str, Array]:
    return {
        "qweight": packed(linear["codes"].T),
        "qzeros": packed(linear["zeros"].T),
        "scales": np.ascontiguousarray(linear["scales"].T),
    }


@given(
    st.integers(1, 4), st.integers(1, 4), st.sampled_from([8, 32, 64, 128]), st.sampled_from(sorted(SCALES)),
    st.booleans(), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_values_are_the_files(octets: int, groups: int, group: int, dtype: str, whole: bool, seed: int) -> None:
    inputs = groups * group
    group = inputs if whole else group
    linear = sample(8 * octets, inputs, group, dtype, seed)
    weight = read_integers(tensors(linear), {**CONFIG, "group_size": -1 if whole else group})
    expected = values(linear["codes"], linear["zeros"], linear["scales"], group)
    assert same_bits(weight.dequantize(), expected)
    assert same_bits(weight.codes, (linear["codes"] - 8).astype(np.int8))
    assert (weight.bits, weight.group_size, weight.prequant, weight.input_scale) == (4, group, None, None)


def test_zero_points_in_the_middle_are_none() -> None:
    linear = sample()
    linear["zeros"][:] = 8
    assert read_integers(tensors(linear), CONFIG).zeros is None


def test_spelling_of_autoawqs_own_file(tmp_path: Path) -> None:
    (tmp_path / "quant_config.json").write_text(
        '{"zero_point": true, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}'
    )
    scheme = imports.detect({}, tmp_path)
    assert scheme is not None
    assert (scheme.method, scheme.targets[0][1].group_size) == ("awq", 64)
    assert scheme.targets[0][1].quant_algo == "W4A16_GPTQ"


def test_modules_that_are_not_quantised() -> None:
    plain = {"weight": np.zeros((16, 128), np.float16)}
    assert read(plain, CONFIG) is None
    assert read(plain, {**CONFIG, "modules_to_not_convert": ["up_proj"]}) is None
    with pytest.raises(InputError, match=rf"'{MODULE}' is listed as not quantised"):
        read(tensors(sample()), {**CONFIG, "modules_to_not_convert": ["layers.0.mlp"]})
    assert read(tensors(sample()), {**CONFIG, "modules_to_not_convert": ["lm_head"]}) is not None


def test_what_no_linear_uses_is_left_over() -> None:
    with checkpoint(tensors(sample()) | {"other.scales": np.ones(3, np.float32)}, CONFIG) as (scheme, entries, _):
        assert imports.leftovers(scheme, entries, [MODULE]) == ["other.scales"]
        assert imports.leftovers(scheme, entries, [MODULE, "other"]) == []
        with pytest.raises(InputError, match=r"'other\.scales' belongs to no linear"):
            imports.refuse_leftovers(scheme, entries, [MODULE])


REFUSED = [
    ({"bits": 8}, "AWQ with bits 8"),
    ({"version": "gemv"}, "gemv is not one"),
    ({"version": "GEMV_FAST"}, "gemv_fast is not one"),
    ({"version": "marlin"}, "marlin is not one"),
    ({"version": "exllama"}, "exllama is not one"),
    ({"backend": "llm-awq"}, "llm-awq"),
    ({"zero_point": False}, "without zero points"),
    ({"group_size": 0}, "group size 0"),
    ({"group_size": -5}, "group size -5"),
    ({"group_size": True}, "'group_size' is True, expected a whole number"),
    ({"bits": "4"}, "'bits' is '4', expected a whole number"),
    ({"modules_to_not_convert": "lm_head"}, "'modules_to_not_convert' is 'lm_head', expected a list"),
    ({"modules_to_not_convert": [3]}, "'modules_to_not_convert' is no list of module names"),
]


@pytest.mark.parametrize(("change", "cause"), REFUSED, ids=[cause for _, cause in REFUSED])
def test_configs_that_are_refused(change: dict[str, Any], cause: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=cause) as refused:
        imports.detect({"quantization_config": {**CONFIG, **change}}, tmp_path)
    assert refused.value.cause.startswith(str(tmp_path / "config.json"))
    assert refused.value.fix
    assert "\n" not in refused.value.cause


BAD = [
    ({"qweight": None}, "'{m}.qweight' is missing"),
    ({"qzeros": None}, "'{m}.qzeros' is missing"),
    ({"scales": None}, "'{m}.scales' is missing"),
    ({"qweight": np.zeros((128, 2), np.int64)}, "'{m}.qweight' is I64, expected I32"),
    ({"qweight": np.zeros((0, 2), np.int32)}, "'{m}.qweight' is empty"),
    ({"qweight": np.zeros(4, np.int32)}, r"'{m}.qweight' has shape \[4\], expected \[any, any\]"),
    ({"qweight": np.zeros((96, 2), np.int32)}, "'{m}.scales' has 2 groups"),
    ({"scales": np.ones((2, 8), np.float16)}, r"'{m}.scales' has shape \[2, 8\], expected \[any, 16\]"),
    ({"scales": np.ones((2, 16), np.int8)}, "'{m}.scales' is I8, expected F16 or BF16 or F32"),
    ({"scales": np.full((2, 16), np.nan, np.float16)}, "'{m}.scales' holds a scale that is infinite or no number"),
    ({"qzeros": np.zeros((1, 2), np.int32)}, r"'{m}.qzeros' has shape \[1, 2\], expected \[2, 2\]"),
    ({"weight": np.zeros((16, 128), np.float16)}, "'{m}' has a plain weight beside its quantised one"),
]


@pytest.mark.parametrize(("change", "cause"), BAD, ids=[cause for _, cause in BAD])
def test_tensors_that_are_refused(change: dict[str, Array | None], cause: str) -> None:
    files = {name: value for name, value in (tensors(sample()) | change).items() if value is not None}
    with pytest.raises(InputError, match=cause.format(m=MODULE)):
        read(files, CONFIG)
