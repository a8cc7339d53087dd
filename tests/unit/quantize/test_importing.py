"""Sources that somebody else quantised become checkpoints that stand for the same numbers, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import quantized_models as models
from quantized_files import Array, same_bits
from quantized_models import FLOAT8, LLAMA, Format, make

from trtkit import hf
from trtkit.checkpoint import open_checkpoint
from trtkit.convert.conversion import Options, convert
from trtkit.convert.readback import CheckpointReader, load_transformers_model, read_tensors
from trtkit.convert.source import Layout, plan_conversion
from trtkit.errors import InputError
from trtkit.quantize import imports
from trtkit.quantize.import_linears import Account
from trtkit.quantize.importing import Import, identity, import_plan, importing

FORMATS: dict[str, tuple[Format, str, dict[str, Any]]] = {
    "awq": (models.awq(), "W4A16_GPTQ", {"group_size": 64, "has_zero_point": True}),
    "awq, groups of 128": (models.awq(128), "W4A16_GPTQ", {"group_size": 128}),
    "gptq": (models.gptq_of(), "W4A16_AWQ", {"group_size": 128, "pre_quant_scale": False, "has_zero_point": False}),
    "gptq, groups of 64": (models.gptq_of(64), "W4A16_AWQ", {"group_size": 64}),
    "gptq, groups of 256": (models.gptq_of(256), "W4A16_AWQ", {"group_size": 128}),
    "gptq, whole rows": (models.gptq_of(None, packing="gptq_v2"), "W4A16_AWQ", {"group_size": 128}),
    "gptq, zero points": (models.gptq_of(sym=False), "W4A16_GPTQ", {"group_size": 128}),
    "gptq, zero points of rows": (models.gptq_of(None, sym=False, packing="gptq_v2"), "W4A16_GPTQ", {}),
    "packed": (models.packed(), "W4A16_AWQ", {"group_size": 128, "pre_quant_scale": False}),
    "packed, whole rows": (models.packed(None), "W4A16_AWQ", {"group_size": 128}),
    "packed, zero points": (models.packed(64, symmetric=False), "W4A16_GPTQ", {"group_size": 64}),
    "int8, dynamic": (models.int8(), "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", {}),
    "int8, static": (models.int8(static=True), "W8A8_SQ_PER_CHANNEL", {}),
    "int8, static, one scale": (models.int8(static=True, per_tensor=True), "W8A8_SQ_PER_CHANNEL", {}),
    "float8, static": (models.float8(), "FP8", {"kv_cache_quant_algo": None}),
    "float8, cache": (models.float8(kv=True), "FP8", {"kv_cache_quant_algo": "FP8"}),
    "float8, dynamic": (models.float8(dynamic=True), "FP8_PER_CHANNEL_PER_TOKEN", {}),
    "modelopt int4": (models.modelopt_int4(), "W4A16_AWQ", {"group_size": 128, "pre_quant_scale": True}),
    "modelopt int4, no factors": (models.modelopt_int4(folded=False), "W4A16_AWQ", {"pre_quant_scale": False}),
    "modelopt w4a8": (models.modelopt_int4(inputs_too=True), "W4A8_AWQ", {"pre_quant_scale": True}),
    "modelopt int8": (models.modelopt_int8(), "W8A8_SQ_PER_CHANNEL", {}),
    "modelopt float8": (models.modelopt_float8(kv=True), "FP8", {"kv_cache_quant_algo": "FP8"}),
    "modelopt float8 rows": (models.modelopt_float8(rows=True), "FP8_PER_CHANNEL_PER_TOKEN", {}),
}


def planned(folder: Path, *, gpu: str | None = "sm80", requantize: bool = False, **layout: Any) -> Import:
    return import_plan(hf.open_source(folder), Layout(**layout), gpu=gpu, requantize=requantize)


def converted(folder: Path, out: Path, **given: Any) -> tuple[dict[str, Array], Account]:
    """Source tensors read back from the checkpoint, and what the conversion says of its exactness."""
    found = planned(folder, **given)
    accounts: list[Account] = []
    options = Options(sync=False, quantization=identity(found))
    result = convert(found.plan, hf.open_source(folder), out, write=importing(found, on_account=accounts.append), options=options)
    assert result.non_finite == []
    return dict(read_tensors(open_checkpoint(out))), accounts[0]


def differing(found: Mapping[str, Array], expected: Mapping[str, Array]) -> list[str]:
    return [name for name, values in expected.items() if not same_bits(found[name], np.ascontiguousarray(values))]


def plain(folder: Path) -> dict[str, Array]:
    """The tensors of a source that are no part of its quantisation."""
    from safetensors.torch import load_file

    return {
        name: value.float().numpy()
        for name, value in load_file(folder / "model.safetensors").items()
        if value.dtype.is_floating_point and value.element_size() == 2 and not name.endswith(("scales", "_scale"))
    }


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_every_value_is_the_sources(name: str, tp: int, tmp_path: Path) -> None:
    quantised, algo, keys = FORMATS[name]
    expected = make(tmp_path / "source", quantised)
    found, account = converted(tmp_path / "source", tmp_path / "out", tp=tp)
    assert len(expected) == 14
    assert differing(found, expected) == []
    assert account.exact and account.linears == 10
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert said["quant_algo"] == algo
    assert {key: said[key] for key in keys} == keys
    others = plain(tmp_path / "source")
    assert {"model.norm.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"} <= others.keys()
    for tensor, values in others.items():
        assert np.array_equal(found[tensor].astype(np.float32), values), tensor


@pytest.mark.parametrize("name", ["awq", "gptq", "int8, static", "float8, static", "modelopt int4"])
def test_it_loads_into_transformers(name: str, tmp_path: Path) -> None:
    import torch

    expected = make(tmp_path / "source", FORMATS[name][0])
    converted(tmp_path / "source", tmp_path / "out", tp=2)
    model = load_transformers_model(tmp_path / "out")
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    assert differing(state, expected) == []
    with torch.inference_mode():
        logits = model(torch.arange(12)[None]).logits
    assert torch.isfinite(logits).all() and logits.std() > 0


def test_scales_of_inputs_and_cache_are_the_sources(tmp_path: Path) -> None:
    make(tmp_path / "source", models.modelopt_float8(kv=True))
    converted(tmp_path / "source", tmp_path / "out", tp=2)
    with CheckpointReader(open_checkpoint(tmp_path / "out")) as reader:
        assert [reader.cache_scale(layer) for layer in range(2)] == [1.5, 1.5]  # the larger of 1.5 and 1.25
        roundings = reader.roundings(1)
    assert {(each.kind, each.scale) for each in roundings.values()} == {("fp8", 0.5)}
    assert len(roundings) == 7


def test_each_token_has_its_own_scale(tmp_path: Path) -> None:
    make(tmp_path / "source", models.int8())
    converted(tmp_path / "source", tmp_path / "out")
    with CheckpointReader(open_checkpoint(tmp_path / "out")) as reader:
        assert {(each.kind, each.scale) for each in reader.roundings(0).values()} == {("int8", None)}


GEMMA = {**LLAMA, "head_dim": 64}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 256}
FALCON = {
    "vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 512,
    "max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", LLAMA),
    "mixtral": ("mixtral", {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-moe": ("qwen2_moe", {**LLAMA, **EXPERTS, "shared_expert_intermediate_size": 256}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 64}),
    "qwen3-moe": ("qwen3_moe", {**LLAMA, **EXPERTS, "head_dim": 64}),
    "bloom": ("bloom", {"vocab_size": 64, "hidden_size": 256, "n_layer": 2, "n_head": 4}),
    "falcon-7b": ("falcon", {**FALCON, "num_attention_heads": 2}),
    "falcon-40b": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt2": ("gpt2", {"vocab_size": 64, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "gpt-neox": (
        "gpt_neox",
        {
            "vocab_size": 64, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 32,
        },
    ),
    "opt": (
        "opt",
        {
            "vocab_size": 64, "hidden_size": 256, "ffn_dim": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 32,
        },
    ),
    "starcoder2": ("starcoder2", LLAMA),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", {**GEMMA, "query_pre_attn_scalar": 24}),
    "gemma3": ("gemma3_text", {**GEMMA, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2}),
    "phi": ("phi", {**LLAMA, "num_key_value_heads": 4}),
    "phi3": ("phi3", {**LLAMA, "pad_token_id": 0}),
}  # fmt: skip
BIASED = ("llama", "bloom", "gpt2", "gpt-neox", "opt", "starcoder2", "phi")
MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tp: int, tmp_path: Path) -> None:
    expected = make(tmp_path / "source", models.gptq_of(64), *FAMILIES[name])
    found, account = converted(tmp_path / "source", tmp_path / "out", tp=tp)
    assert expected and differing(found, expected) == []
    assert account.exact


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in MIXTURES])
def test_every_family_with_zero_points(name: str, tmp_path: Path) -> None:
    """Which are laid out for each rank, so the ranks are put together by another way than elsewhere."""
    expected = make(tmp_path / "source", models.gptq_of(64, sym=False), *FAMILIES[name])
    if name in BIASED:
        with pytest.raises(InputError, match="would add the bias of transformer.layers.0.* once per rank") as refused:
            planned(tmp_path / "source", tp=2)
        assert "--tp 1" in refused.value.fix
    found, account = converted(tmp_path / "source", tmp_path / "out", tp=1 if name in BIASED else 2, gpu="H100")
    assert expected and differing(found, expected) == []
    assert account.exact


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("quantised", ["float8, static", "packed", "modelopt int4, no factors"])
def test_experts(name: str, quantised: str, tmp_path: Path) -> None:
    expected = make(tmp_path / "source", FORMATS[quantised][0], *FAMILIES[name])
    found, _ = converted(tmp_path / "source", tmp_path / "out", tp=2, ep=2)
    assert differing(found, expected) == []


def test_pipeline_stages(tmp_path: Path) -> None:
    for name in ("awq", "float8, cache"):
        expected = make(tmp_path / name, FORMATS[name][0])
        found, _ = converted(tmp_path / name, tmp_path / f"{name}-out", tp=2, pp=2)
        assert differing(found, expected) == []


def test_key_value_heads_that_several_ranks_have(tmp_path: Path) -> None:
    settings = {**LLAMA, "num_attention_heads": 4, "head_dim": 128}
    for name in ("awq", "gptq, groups of 64"):
        expected = make(tmp_path / name, FORMATS[name][0], settings=settings)
        found, _ = converted(tmp_path / name, tmp_path / f"{name}-out", tp=4)
        assert differing(found, expected) == []
