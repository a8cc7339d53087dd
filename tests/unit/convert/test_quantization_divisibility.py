"""What fits a model's linears and their parallel layout."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit.convert.divisibility import Sides, check_divisible, check_stages, fits, sides
from trtkit.convert.quantization import Quantization
from trtkit.errors import InputError


def llama(hidden: int, intermediate: int, heads: int, kv: int, head: int, experts: bool = False) -> list[Sides]:
    layer = "transformer.layers.0."
    return [
        Sides(f"{layer}attention.qkv", (heads + 2 * kv) * head, hidden, "rows", kv * head, head),
        Sides(f"{layer}attention.dense", hidden, heads * head, "columns"),
        Sides(f"{layer}mlp.fc", intermediate, hidden, "rows", experts=experts),
        Sides(f"{layer}mlp.proj", hidden, intermediate, "columns", experts=experts),
    ]


LLAMA_7B, QWEN_72B, TINY = (4096, 11008, 32, 32, 128), (8192, 29568, 64, 8, 128), (192, 512, 4, 2, 48)


@pytest.mark.parametrize(
    ("model", "q", "tp", "said", "fix"),
    [
        (LLAMA_7B, Quantization("int4_awq"), 4, "TP 4 splits a group of transformer.layers.0.mlp.proj", "size 64"),
        (LLAMA_7B, Quantization("w4a8_awq"), 8, "11008 input features are 1376 per rank", "TP 1 or 2"),
        (QWEN_72B, Quantization("int4_awq"), 4, "7392 per rank, no multiple of group size 128", "TP 1"),
        (TINY, Quantization("int4_awq"), 1, "groups of 128 do not divide the 192 input features", "group size 64"),
        ((256, 640, 8, 2, 32), Quantization("int8_wo"), 4, "640 output features of transformer.layers.0.mlp.fc are no "
         "multiple of 256 (64 x TP 4)", "TP 1 or 2"),
        ((256, 512, 3, 1, 32), Quantization("int4_wo"), 1, "160 output features", "int8_sq"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_told_with_what_does(
    model: tuple[int, int, int, int, int], q: Quantization, tp: int, said: str, fix: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_divisible(q, llama(*model), tp)
    assert said in caught.value.cause and fix in caught.value.fix
    assert "\n" not in caught.value.cause + caught.value.fix


@given(
    st.integers(1, 40).map(lambda n: 32 * n),
    st.sampled_from([(8, 8), (8, 2), (16, 4), (4, 1)]),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([(None, "int8_wo"), (128, "int4_awq"), (64, "int4_awq"), (None, "w4a8_awq"), (None, "fp8")]),
)
@settings(max_examples=300)
def test_what_fits_is_what_layers_would_not_round_up(
    intermediate: int, heads: tuple[int, int], head: int, tp: int, asked: tuple[int | None, str]
) -> None:
    group, name = asked
    hidden = 256
    multiple = {"int8_wo": 64, "int4_awq": max(64, group or 0), "w4a8_awq": 128, "fp8": 1}[name] * tp
    replicated = max(heads[1], tp)
    lengths = (hidden, intermediate, heads[0] * head, (heads[0] + 2 * replicated) * head)
    shapes = llama(hidden, intermediate, *heads, head)
    assert fits(Quantization(name, group), shapes, tp) == all(length % multiple == 0 for length in lengths)


def test_left_out_linears_experts_and_the_pytorch_backend_need_less() -> None:
    shapes = llama(4096, 11008, 32, 32, 128)
    assert not fits(Quantization("int4_awq"), shapes, 4)
    assert fits(Quantization("int4_awq", exclude=("*mlp.*",)), shapes, 4)
    assert fits(Quantization("int4_awq", overrides={each.name: "fp8" for each in shapes[2:]}), shapes, 4)
    narrow = llama(256, 128 * 8, 8, 8, 128, experts=True)
    assert not fits(Quantization("int4_awq"), llama(256, 128 * 8, 8, 8, 128), 8)
    assert fits(Quantization("int4_awq"), narrow[2:], 8)
    assert not fits(Quantization("int4_awq"), llama(256, 128 * 4, 8, 8, 128, experts=True)[2:], 8)
    assert fits(Quantization("int4_awq"), llama(256, 128 * 4, 8, 8, 128, experts=True)[2:], 8, ep=2)
    assert fits(Quantization("int4_awq"), llama(256, 128 * 8, 8, 8, 128), 8, runtime="llmapi")
    assert not fits(Quantization("int4_awq"), llama(256, 128 * 4, 8, 8, 128), 8, runtime="llmapi")


def test_sizes_come_from_a_checkpoints_config() -> None:
    config = {
        "architecture": "LlamaForCausalLM", "dtype": "float16", "vocab_size": 100, "hidden_size": 256,
        "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2, "head_size": 64,
        "intermediate_size": 512, "max_position_embeddings": 64, "attn_bias": False, "mlp_bias": False,
    }  # fmt: skip
    found = {each.name.split(".", 3)[3]: each for each in sides(config)}
    assert set(found) == {"attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"}
    qkv = found["attention.qkv"]
    assert (qkv.rows, qkv.columns, qkv.split) == (12 * 64, 256, "rows")
    assert [qkv.rows_of(tp) // 64 for tp in (1, 2, 4, 8)] == [12, 12, 16, 24]
    assert (found["mlp.proj"].rows, found["mlp.proj"].columns, found["mlp.proj"].split) == (256, 512, "columns")


def test_layers_by_number_need_one_pipeline_stage() -> None:
    check_stages(Quantization("fp8", exclude=("*mlp.proj",)), 4)
    check_stages(Quantization("fp8", exclude=("*layers.3.*",)), 1)
    one_linear = Quantization("fp8", overrides={"transformer.layers.0.mlp.fc": "int8_sq"})
    for q in (Quantization("fp8", exclude=("*layers.3.*",)), one_linear):
        with pytest.raises(InputError, match="2 pipeline stages"):
            check_stages(q, 2)
