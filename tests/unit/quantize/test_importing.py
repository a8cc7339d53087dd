"""Sources that somebody else quantised become checkpoints that stand for the same numbers, or are refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import quantized_models as models
from hypothesis import given
from hypothesis import strategies as st
from quantized_files import Array, same_bits
from quantized_models import FLOAT8, LLAMA, Format, make

from trtkit import hf
from trtkit.checkpoint import open_checkpoint
from trtkit.convert.conversion import Options, convert
from trtkit.convert.number_formats import Float8Weight, IntegerWeight
from trtkit.convert.quantization import Quantization
from trtkit.convert.readback import CheckpointReader, load_transformers_model, read_tensors
from trtkit.convert.source import Layout, plan_conversion
from trtkit.errors import InputError
from trtkit.inspect.source import inspect_source
from trtkit.quantize import imports
from trtkit.quantize.import_linears import Account, Part, join, shared_scale
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
    result = convert(
        found.plan, hf.open_source(folder), out, write=importing(found, on_account=accounts.append), options=options
    )
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


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_is_the_sources(name: str, tmp_path: Path) -> None:
    quantised, algo, keys = FORMATS[name]
    expected = make(tmp_path / "source", quantised)
    others = plain(tmp_path / "source")
    assert {"model.norm.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"} <= others.keys()
    for tp in (1, 2):
        out = tmp_path / f"out{tp}"
        found, account = converted(tmp_path / "source", out, tp=tp)
        assert len(expected) == 14
        assert differing(found, expected) == []
        assert account.exact and account.linears == 10
        said = json.loads((out / "config.json").read_text())["quantization"]
        assert said["quant_algo"] == algo
        assert {key: said[key] for key in keys} == keys
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


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    expected = make(tmp_path / "source", models.gptq_of(64), *FAMILIES[name])
    for tp in (1, 2):
        found, account = converted(tmp_path / "source", tmp_path / f"out{tp}", tp=tp)
        assert expected and differing(found, expected) == []
        assert account.exact


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in MIXTURES])
def test_every_family_with_zero_points(name: str, tmp_path: Path) -> None:
    """Which are laid out for each rank, so the ranks are put together by another way than elsewhere."""
    expected = make(tmp_path / "source", models.gptq_of(64, sym=False), *FAMILIES[name])
    if name in BIASED:
        with pytest.raises(InputError, match=r"would add the bias of transformer.layers.0.* once per rank") as refused:
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


def test_groups_are_halved_where_tp_asks_for_it(tmp_path: Path) -> None:
    expected = make(tmp_path / "source", models.gptq_of(128))
    assert [planned(tmp_path / "source", tp=tp).quantization.group_size for tp in (2, 4)] == [128, 64]
    found, account = converted(tmp_path / "source", tmp_path / "out", tp=4)
    assert account.exact and differing(found, expected) == []


def test_key_value_heads_that_several_ranks_have(tmp_path: Path) -> None:
    settings = {**LLAMA, "num_attention_heads": 4, "head_dim": 128}
    for name in ("awq", "gptq, groups of 64"):
        expected = make(tmp_path / name, FORMATS[name][0], settings=settings)
        found, _ = converted(tmp_path / name, tmp_path / f"{name}-out", tp=4)
        assert differing(found, expected) == []


def coarse(random: np.random.Generator, *shape: int) -> Array:
    """Scales of which float16 has a bit less, and bfloat16 many."""
    return random.uniform(1e-4, 0.2, shape).astype(np.float32)


def test_scales_that_the_dtype_rounds_are_counted(tmp_path: Path) -> None:
    """A kernel for int4 has its scales in the model's dtype, so a float16 scale in a bfloat16 model changes."""
    expected = make(tmp_path / "source", models.gptq_of(128, scales=coarse))
    found, account = converted(tmp_path / "source", tmp_path / "out", tp=2)
    assert not account.exact
    assert 0 < account.scales <= sum(values.size // 128 for values in expected.values())
    for name, values in expected.items():
        assert np.allclose(found[name], values, rtol=2**-8, atol=0) and (found[name] != values).any()
    found, account = converted(tmp_path / "source", tmp_path / "out16", tp=2, dtype="float16")
    assert account.exact and differing(found, expected) == []


def test_zeros_that_the_dtype_rounds_are_counted(tmp_path: Path) -> None:
    """Of W4A16_GPTQ the products of zero points and scales are in the model's dtype."""
    expected = make(tmp_path / "source", models.awq(128, scales=coarse), dtype="float16")
    found, account = converted(tmp_path / "source", tmp_path / "out")
    groups = sum(values.size // 128 for values in expected.values())
    assert account.scales == 0 and not account.exact
    assert 0 < account.zeros < groups
    changed = sum(int((found[name] != values).any(axis=1).sum()) for name, values in expected.items())
    assert 0 < changed <= account.zeros
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() <= 2**-10 * np.abs(values).max()


def power_of_two(name: str) -> np.float32:
    """Query, key and value of a layer have scales that differ by powers of two."""
    step = {"q_proj": 1.0, "k_proj": 0.5, "v_proj": 2.0}.get(name.split(".")[-2], 1.0)
    return np.float32(models.scale_of(name) * step)


def small(random: np.random.Generator, outputs: int, inputs: int, name: str) -> tuple[dict[str, Array], Array]:
    """Float8 values that can be multiplied with 1/4 and 4 without loss."""
    stored = (random.integers(-15, 16, (outputs, inputs)) / 4).astype(np.float32).astype(FLOAT8)
    scale = power_of_two(name)
    files = {"weight": stored, "weight_scale": np.array([scale]), "input_scale": np.array([0.5], np.float32)}
    return files, stored.astype(np.float32) * scale


def test_scales_that_differ_by_powers_of_two_are_brought_together(tmp_path: Path) -> None:
    quantised = Format(models.float8().config, small)
    expected = make(tmp_path / "source", quantised)
    found, account = converted(tmp_path / "source", tmp_path / "out")
    assert [name for name, values in expected.items() if not np.array_equal(found[name], values)] == []
    assert account.exact and account.requantized == 2 * (256 + 2 * 128) * 256 - 2 * 128 * 256


@pytest.mark.parametrize("scale", [power_of_two, lambda name: np.float32(0.01 + 0.001 * ("k_proj" in name))])
def test_float8_that_cannot_share_a_scale_is_refused_or_counted(
    scale: Callable[[str], np.float32], tmp_path: Path
) -> None:
    """Normal values use all of float8's range, so also a power of two costs the smallest some bits."""
    expected = make(tmp_path / "source", models.float8(scale=scale))
    with pytest.raises(
        InputError, match=r"'model.layers.0.self_attn.q_proj' and .*k_proj' have different sc"
    ) as refused:
        planned(tmp_path / "source")
    assert "--requantize" in refused.value.fix and "--quantization fp8" in refused.value.fix
    found, account = converted(tmp_path / "source", tmp_path / "out", requantize=True)
    assert not account.exact and 0 < account.changed <= account.requantized
    changed = {name: int((found[name] != values).sum()) for name, values in expected.items()}
    assert sum(changed.values()) == account.changed
    assert not any(count for name, count in changed.items() if "self_attn" not in name or "o_proj" in name)
    for name, values in expected.items():
        step = np.maximum(np.abs(values) * 2**-4, 2**-10 * 0.06)
        assert (np.abs(found[name] - values) <= step).all()


def test_scales_of_gated_mlps_may_differ(tmp_path: Path) -> None:
    def scale(name: str) -> np.float32:
        return np.float32(0.02 if "up_proj" in name else 0.01)

    expected = make(tmp_path / "source", models.float8(scale=scale))
    found = planned(tmp_path / "source")
    assert len(found.notes) == 1 and "use_fused_mlp" in found.notes[0]
    read, account = converted(tmp_path / "source", tmp_path / "out")
    assert account.exact and differing(read, expected) == []


def test_the_largest_of_several_static_scales_is_counted(tmp_path: Path) -> None:
    def change(tensors: dict[str, Array]) -> None:
        tensors["model.layers.1.self_attn.k_proj.input_scale"] = np.array([0.75], np.float32)

    make(tmp_path / "source", models.float8(), change=change)
    _, account = converted(tmp_path / "source", tmp_path / "out")
    assert account.inputs == 1
    with CheckpointReader(open_checkpoint(tmp_path / "out")) as reader:
        assert reader.roundings(1)["model.layers.1.self_attn.q_proj.weight"].scale == 0.75


def test_what_the_source_leaves_alone_is_left_alone(tmp_path: Path) -> None:
    def skip(name: str) -> bool:
        return "o_proj" in name or name == "model.layers.1.mlp.down_proj.weight"

    for name in ("packed", "awq", "modelopt float8"):
        expected = make(tmp_path / name, FORMATS[name][0], skip=skip)
        assert len(expected) == 11
        others = plain(tmp_path / name)
        found, _ = converted(tmp_path / name, tmp_path / f"{name}-out", tp=2)
        assert differing(found, expected) == []
        for tensor in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"):
            assert np.array_equal(found[tensor].astype(np.float32), others[tensor])
        excluded = json.loads((tmp_path / f"{name}-out" / "config.json").read_text())["quantization"]["exclude_modules"]
        assert {"*lm_head", "*.attention.dense", "transformer.layers.1.mlp.proj"} <= set(excluded)


def test_linears_of_different_formats(tmp_path: Path) -> None:
    """Attention in float8, MLPs in int4: compressed-tensors with two groups."""
    eight, four = models.float8(), models.packed()
    groups = {
        "a": {**eight.config["config_groups"]["group_0"], "targets": ["re:.*self_attn.*"]},
        "b": {**four.config["config_groups"]["group_0"], "targets": ["re:.*mlp.*"]},
    }

    def linear(random: np.random.Generator, outputs: int, inputs: int, name: str) -> tuple[dict[str, Array], Array]:
        return (eight if "self_attn" in name else four).linear(random, outputs, inputs, name)

    config = {**eight.config, "format": "mixed-precision", "config_groups": groups}
    expected = make(tmp_path / "source", Format(config, linear))
    found = planned(tmp_path / "source", tp=2)
    assert found.plan.config["quantization"]["quant_algo"] == "MIXED_PRECISION"
    assert {each.form.name for each in found.members} == {"fp8", "int4_awq"}
    read, account = converted(tmp_path / "source", tmp_path / "out", tp=2)
    assert account.exact and differing(read, expected) == []


def test_names_without_the_models_prefix(tmp_path: Path) -> None:
    """What config.json excludes goes by the source's own names, whatever the family's table calls them."""

    def change(tensors: dict[str, Array]) -> None:
        for name in [name for name in tensors if name.startswith("transformer.")]:
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    quantised = models.awq()
    config = {**quantised.config, "modules_to_not_convert": ["h.1.mlp.c_proj"]}
    expected = make(
        tmp_path / "source", Format(config, quantised.linear), *FAMILIES["gpt2"],
        change=change, skip=lambda name: name == "transformer.h.1.mlp.c_proj.weight",
    )  # fmt: skip
    found, _ = converted(tmp_path / "source", tmp_path / "out")
    assert len(expected) == 7 and differing(found, expected) == []


def test_biases_of_zero_that_no_model_has(tmp_path: Path) -> None:
    """Early AutoGPTQ gave every linear one."""
    bias = np.zeros(256, np.float16)

    def change(tensors: dict[str, Array]) -> None:
        tensors["model.layers.1.self_attn.q_proj.bias"] = bias

    make(tmp_path / "source", models.gptq_of(), change=change)
    converted(tmp_path / "source", tmp_path / "out")
    bias = np.full(256, 2.0, np.float16)
    make(tmp_path / "other", models.gptq_of(), change=change)
    with pytest.raises(InputError, match=r"tensor 'model.layers.1.self_attn.q_proj.bias' has no place"):
        planned(tmp_path / "other")


def test_a_gpus_layout_changes_the_bytes_and_not_the_values(tmp_path: Path) -> None:
    expected = make(tmp_path / "source", models.awq())
    files = []
    for gpu, sm in (("A100", 80), ("H100", 90)):
        found, _ = converted(tmp_path / "source", tmp_path / gpu, gpu=gpu)
        assert differing(found, expected) == []
        assert json.loads((tmp_path / gpu / "config.json").read_text())["producer"]["weights_for_sm"] == sm
        files.append((tmp_path / gpu / "rank0.safetensors").read_bytes())
    assert files[0] != files[1]
    config = tmp_path / "H100" / "config.json"
    config.write_text(config.read_text().replace('"weights_for_sm": 90', '"weights_for_sm": null'))
    with pytest.raises(InputError, match="does not say which GPU its weights are laid out for"):
        load_transformers_model(tmp_path / "H100")


def test_a_killed_run_goes_on_with_the_first_layer_that_has_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "source", models.gptq_of(scales=coarse), settings={**LLAMA, "num_hidden_layers": 3})
    source = hf.open_source(tmp_path / "source")
    read: list[str] = []
    original = imports.read

    def reading(module: str, *rest: Any) -> Any:
        read.append(module)
        return original(module, *rest)

    monkeypatch.setattr(imports, "read", reading)

    def run(out: Path, on_layer: Callable[[int, int], None]) -> Account:
        found = planned(tmp_path / "source", tp=2)
        accounts: list[Account] = []
        write = importing(found, on_layer=on_layer, on_account=accounts.append)
        convert(found.plan, source, out, write=write, options=Options(sync=False, quantization=identity(found)))
        return accounts[0]

    def killed(done: int, total: int) -> None:
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole", lambda done, total: None)
    assert len(read) == 21 and whole.scales > 0
    read.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", killed)
    assert not (tmp_path / "out").exists() and len(read) == 14
    read.clear()
    assert run(tmp_path / "out", lambda done, total: None) == whole
    assert len(read) == 7 and all(".layers.2." in module for module in read)
    for file in ("rank0.safetensors", "rank1.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def without(*names: str) -> Callable[[dict[str, Array]], None]:
    def change(tensors: dict[str, Array]) -> None:
        for name in names:
            del tensors[name]

    return change


def with_tensors(**found: Array) -> Callable[[dict[str, Array]], None]:
    def change(tensors: dict[str, Array]) -> None:
        tensors.update({name.replace("__", "."): value for name, value in found.items()})

    return change


Q = "model.layers.0.self_attn.q_proj"
LM_HEAD = {
    f"lm_head__{name}": value
    for name, value in models.gptq_of().linear(np.random.default_rng(0), 64, 256, "")[0].items()
}
REFUSED: dict[str, tuple[Format, dict[str, Any], dict[str, Any], str, str]] = {
    "groups of 32": (
        models.gptq_of(32), {}, {}, r"has groups of 32 inputs, and TensorRT-LLM's kernels groups of 128 or 64 only",
        r"group size 128.*--quantization"),
    "int8 weights alone": (
        models.gptq_of(bits=8), {}, {}, r"int8 weights with zero points or groups", r"--quantization int8_wo"),
    "int8 weights alone, by channel": (
        models.gptq_of(None, bits=8), {}, {}, rf"'{Q}': int8 weights with 16-bit inputs", r"--quantization int8_wo"),
    "int8 weights alone, packed": (
        models.packed(None, bits=8), {}, {}, r"int8 weights with 16-bit inputs", r"--quantization int8_wo"),
    "int8 weights alone, by ModelOpt": (
        models.modelopt_int8(smooth=False), {}, {}, r"int8 weights with 16-bit inputs", r"--quantization int8_wo"),
    "zero points without a GPU": (
        models.awq(), {}, {"gpu": None}, r"int4 with zero points becomes W4A16_GPTQ", r"--gpu H100"),
    "zero points for an unknown GPU": (models.awq(), {}, {"gpu": "sm70"}, r"sm 70", r"75 to 90"),
    "zero points in float32": (models.awq(), {}, {"dtype": "float32"}, r"float16 and bfloat16 only", r"float16"),
    "quantised once more": (
        models.awq(), {}, {"quantization": "int4_awq"}, r"cannot be quantised once more", r"leave out the options"),
    "a TP that splits groups": (
        models.modelopt_int4(inputs_too=True), {}, {"tp": 4},
        r"w4a8_awq: TP 4 splits a group of transformer.layers.0.attention.dense", r"smaller --tp, or convert the orig"),
    "quantised output projection": (
        models.gptq_of(), {"change": with_tensors(**LM_HEAD)}, {}, r"'lm_head' is quantised", r"original model"),
    "a part of a fused linear alone": (
        models.packed(), {"skip": lambda name: name == f"{Q}.weight"}, {},
        rf"'{Q}' and 'model.layers.0.self_attn.k_proj' are quantised differently", r"original model"),
    "a scale is missing": (
        models.packed(), {"change": without(f"{Q}.weight_scale")}, {}, rf"tensor '{Q}.weight_scale' is missing",
        r"is the download complete"),
    "a linear is missing": (
        models.packed(), {"change": without(*(f"{Q.replace('q_proj', 'o_proj')}.{end}" for end in (
            "weight_scale", "weight_packed", "weight_shape")))}, {},
        r"tensor 'model.layers.0.self_attn.o_proj.weight' is missing", r"do not belong together"),
    "another model's shapes": (
        models.awq(), {"hidden_act": "silu", "intermediate_size": 768}, {},
        r"'model.layers.0.mlp.gate_proj' has 512 outputs and 256 inputs, config.json implies 768 and 256", r"together"),
    "nothing is quantised": (
        models.awq(), {"skip": lambda name: True}, {}, r"says that the weights are quantised \(awq\), but no",
        r"same checkpoint"),
    "a tensor that nobody knows": (
        models.awq(), {"change": with_tensors(model__layers__0__other__qweight=np.zeros((1, 1), np.int32))}, {},
        r"tensor 'model.layers.0.other.qweight' belongs to no linear", r"same checkpoint"),
    "a method that nobody imports": (
        Format({"quant_method": "bitsandbytes"}, models.awq().linear), {}, {}, r"'bitsandbytes' are not imported",
        r"original model"),
    "inputs by token of some linears": (
        models.int8(), {"skip": lambda name: "down_proj" in name}, {}, r"int8_sq_plugin is for whole layers",
        r"--quantization int8_sq$"),
    "factors of query and key that differ": (
        models.modelopt_int8(), {"change": with_tensors(
            model__layers__0__self_attn__k_proj__pre_quant_scale=np.ones(256, ml_dtypes.bfloat16))}, {},
        r"k_proj' have different pre_quant_scale", r"original model"),
    "second scales that differ": (
        models.modelopt_int4(inputs_too=True), {"change": with_tensors(
            model__layers__1__self_attn__v_proj__weight_scale_2=np.array(0.5, np.float32))}, {},
        r"have different weight_scale_2", r"original model"),
    "a cache of which layers lack scales": (
        models.float8(kv=True),
        {"change": without("model.layers.1.self_attn.k_scale", "model.layers.1.self_attn.v_scale")}, {},
        r"'model.layers.1.self_attn' has no scales of keys and values", r"--kv-cache"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised, making, layout, cause, fix = REFUSED[name]
    make(tmp_path / "source", quantised, **making)
    monkeypatch.setattr(imports, "read", lambda *_: pytest.fail("a weight was read"))
    if "quantization" in layout:
        layout = {"quantization": Quantization(layout["quantization"])}
    with pytest.raises(InputError, match=cause) as refused:
        planned(tmp_path / "source", **layout)
    assert "\n" not in refused.value.cause
    assert re.search(fix, refused.value.fix), refused.value.fix


def test_experts_with_zero_points_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "source", models.awq(), *FAMILIES["mixtral"])
    with pytest.raises(InputError, match="no int4 with zero points for experts"):
        planned(tmp_path / "source")


def test_cache_without_scales(tmp_path: Path) -> None:
    """Model-Optimizer leaves them out where they are 1."""
    quantised = models.modelopt_float8(kv=True)
    make(tmp_path / "source", Format(quantised.config, quantised.linear))
    found = planned(tmp_path / "source")
    assert len(found.notes) == 1 and "taken as 1" in found.notes[0]
    converted(tmp_path / "source", tmp_path / "out")
    with CheckpointReader(open_checkpoint(tmp_path / "out")) as reader:
        assert reader.cache_scale(1) == 1


def test_who_does_not_import_refuses(tmp_path: Path) -> None:
    make(tmp_path / "source", models.awq())
    with pytest.raises(InputError, match=r"config.json: the weights are quantised already \(awq\)"):
        plan_conversion(hf.open_source(tmp_path / "source"), Layout())


def test_a_plain_source_is_none_of_its(tmp_path: Path, make_source: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="its weights are not quantised"):
        planned(make_source())


@pytest.mark.parametrize("name", ["awq", "gptq", "float8, dynamic", "modelopt int4"])
def test_inspect_says_what_it_is_and_that_it_converts(name: str, tmp_path: Path) -> None:
    make(tmp_path / "source", FORMATS[name][0])
    report = inspect_source(tmp_path / "source")
    assert report.convertible and report.problems == []
    assert report.quantization is not None
    method = name.split(maxsplit=1)[0].strip(",").replace("float8", "compressed-tensors")
    assert method in str(report.quantization.method)
    embeddings, layer = 2 * 64 * 256, 256 * (512 + 256) + 3 * 256 * 512 + 2 * 256
    assert report.parameters == embeddings + 2 * layer + 256


def test_inspect_says_why_it_does_not_convert(tmp_path: Path) -> None:
    make(tmp_path / "source", models.gptq_of(32))
    report = inspect_source(tmp_path / "source")
    assert not report.convertible and "groups of 32" in report.problems[0].cause
    assert report.quantization is not None and report.quantization.group_size == 32


def test_scales_in_another_16_bit_dtype_are_told_before(tmp_path: Path) -> None:
    make(tmp_path / "source", models.gptq_of())
    assert "--dtype float16 keeps them" in planned(tmp_path / "source").notes[0]
    assert planned(tmp_path / "source", dtype="float16").notes == []


@given(
    st.lists(st.tuples(st.floats(2**-20, 2**10, width=32), st.integers(-8, 8)), min_size=1, max_size=3), st.booleans()
)
def test_a_shared_scale_is_exact_or_the_largest(drawn: list[tuple[float, int]], alike: bool) -> None:
    random = np.random.default_rng(len(drawn))
    first = np.float32(drawn[0][0])
    weights = []
    for scale, power in drawn:
        stored = np.concatenate([random.normal(0, 100, 64), random.normal(0, 1, 64)]).clip(-448, 448).astype(FLOAT8)
        own = np.float32(first * 2.0**power) if alike else np.float32(scale)
        weights.append(Float8Weight(stored[None], np.array([own])))
    scale, exact = shared_scale(weights)
    assert scale in [weight.scales[0] for weight in weights]
    for weight in weights:
        wide = weight.values.astype(np.float32) * weight.scales[0]
        brought = (wide / scale).clip(-448, 448).astype(FLOAT8).astype(np.float32) * scale
        if exact:
            assert np.array_equal(brought, wide)
        else:
            assert scale == max(other.scales[0] for other in weights)
            half_step = np.maximum(np.abs(wide) / 16, scale * 2.0**-10)  # of float8, the latter where it is subnormal
            assert (np.abs(brought - wide) <= half_step * (1 + 1e-6)).all()


@given(st.integers(1, 3), st.sampled_from([64, 128]), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 2**32 - 1))
def test_joined_parts_keep_their_values(count: int, group: int, times: int, with_zeros: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    columns = 2 * group * times
    low, high = (0, columns) if seed % 2 else (group, columns)
    weights, parts = [], []
    for index in range(count):
        codes = random.integers(-8, 8, (8, columns), np.int8)
        scales = random.uniform(0.001, 0.1, (8, 2)).astype(np.float32)
        zeros = random.integers(-8, 8, (8, 2), np.int8) if with_zeros and index else None
        weights.append(IntegerWeight(codes, scales, zeros))
        rows = slice(2, 7) if index % 2 else np.array([5, 0, 3])
        parts.append(Part(str(index), rows, (low, high)))
    joined = join(weights, parts, group)
    expected = [weight.dequantize()[part.rows, low:high] for weight, part in zip(weights, parts, strict=True)]
    assert joined.group_size == group
    assert same_bits(joined.dequantize(), np.concatenate(expected))


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, trtkit.quantize.importing; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
