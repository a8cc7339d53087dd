"""NVIDIA ModelOpt quantises saved models and exports them in the Hugging Face layout, on the CPU. With its scales we
write the same files: every tensor (name, shape, dtype, bits), hf_quant_config.json and config.json, but for the rows of
`ALLOWED`. A row says when its difference must be there, so one that has become stale fails as a new one does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from given_scales import ABSENT, ANY, Allowed, Case, differing, make_layers, mean, read, run_modelopt, settings

from trtkit import hf
from trtkit.convert.conversion import Options
from trtkit.convert.quantization import Quantization
from trtkit.convert.source import Layout, plan_conversion
from trtkit.quantize.huggingface import write_huggingface
from trtkit.quantize.huggingface_layout import PRODUCER, HuggingFaceLayout, quantization_files

pytestmark = [pytest.mark.peer, pytest.mark.xdist_group("peer")]

CASES = [
    Case("LlamaForCausalLM", "int4_awq", 128, "FP8"),
    Case("LlamaForCausalLM", "int4_awq", 64),
    Case("LlamaForCausalLM", "w4a8_awq", 128),
    Case("LlamaForCausalLM", "fp8", None, "FP8"),
    Case("LlamaForCausalLM", "fp8_rowwise"),
    Case("Qwen2ForCausalLM", "int4_awq", 128),
    Case("Qwen2ForCausalLM", "fp8"),
    Case("GemmaForCausalLM", "int4_awq", 128),
    Case("GemmaForCausalLM", "fp8"),
    Case("LlamaForCausalLM", "fp8_rowwise", None, None, "bfloat16"),
]
TWICE_ROUNDED = [
    Case("LlamaForCausalLM", "int4_awq", 128, "FP8", "bfloat16"),
    Case("LlamaForCausalLM", "w4a8_awq", 128, None, "bfloat16"),
    Case("LlamaForCausalLM", "fp8", None, "FP8", "bfloat16"),
]
"""Here ModelOpt multiplies or divides weights in bfloat16 before it rounds them to fewer bits, and we in float32."""
FUSED = {
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.dense": ["self_attn.o_proj"],
    "mlp.fc": ["mlp.gate_proj"],
    "mlp.gate": ["mlp.up_proj"],
    "mlp.proj": ["mlp.down_proj"],
}
"""TRT-LLM linear -> the modules of its rows."""
SHARED = {"mlp.fc": ["mlp.gate_proj", "mlp.up_proj"], "mlp.gate": ["mlp.gate_proj", "mlp.up_proj"]}
"""TRT-LLM linear -> the modules whose factors per input are averaged, beyond its own."""


ALLOWED = (
    *(
        Allowed(
            key, ["lm_head"], ["lm_head", "model.embed_tokens"],
            "ModelOpt has a quantizer for embeddings, which it turns off; no reader has anything to quantise there",
            lambda case: case.architecture != "GemmaForCausalLM",  # whose embedding is of a class of its own
        )
        for key in ("hf_quant_config.json exclude_modules", "config.json quantization_config")
    ),
    *(
        Allowed(
            f"model.layers.{{layer}}.self_attn.{which}_proj.{which}_scale", "torch.float32 [], sum 1", ANY,
            "as in TRT-LLM checkpoints keys and values share a scale that is never below 1: small numbers lose nothing "
            "in float8, and TensorRT-LLM's own default is 1",
            lambda case: case.kv_cache is not None,
        )
        for which in "kv"
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unified")
    run_modelopt(folder, CASES + TWICE_ROUNDED, layouts={}, huggingface=True, one_scale=True)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoint_equals_that_of_model_optimizer(case: Case, exports: Path, tmp_path: Path) -> None:
    write(case, exports, tmp_path)
    found = differences(tmp_path / "ours", exports / f"{case}-hf")
    expected = {row.key.format(layer=layer): row for row in ALLOWED if row.when(case) for layer in range(2)}
    assert not {key: values for key, values in found.items() if key not in expected}
    assert not sorted(expected.keys() - found.keys())
    for key, row in expected.items():
        for value, allowed in zip(found[key], (row.ours, row.theirs), strict=True):
            assert value == allowed or (allowed == ANY and value != ABSENT), (key, row.reason)


@pytest.mark.parametrize("case", TWICE_ROUNDED, ids=str)
def test_tensors_have_the_names_shapes_and_dtypes_of_model_optimizer(case: Case, exports: Path, tmp_path: Path) -> None:
    write(case, exports, tmp_path)
    found = [
        {name: (values.dtype, values.shape) for name, values in read(folder / "model.safetensors").items()}
        for folder in (tmp_path / "ours", exports / f"{case}-hf")
    ]
    assert found[0] == found[1]


def test_mixed_precision_is_described_as_model_optimizer_does(tmp_path: Path) -> None:
    """It exports none on a CPU in a test's time, so its own functions are asked what they would write."""
    quant_utils = pytest.importorskip("modelopt.torch.export.quant_utils")
    convert = pytest.importorskip("modelopt.torch.export.convert_hf_config").convert_hf_quant_config_format
    save_pretrained(tmp_path / "source")
    source = hf.open_source(tmp_path / "source")
    overrides = {
        "transformer.layers.0.mlp.proj": "fp8", "transformer.layers.1.attention.qkv": "w4a8_awq",
        "transformer.layers.1.mlp.proj": "int8_wo",
    }  # fmt: skip
    asked = Quantization("int4_awq", overrides=overrides, kv_cache="fp8")
    layout = HuggingFaceLayout(plan_conversion(source, Layout(quantization=asked)).config)
    ours = quantization_files(layout)

    layers: dict[str, Any] = {f"{name}.quantization": module.form.name for name, module in layout.modules.items()}
    layers |= {f"{name}.awq_block_size": 128 for name in layout.modules}
    theirs = {**quant_utils.process_layer_quant_config(layers), "kv_cache_quant_algo": "FP8"}
    described = dict(ours["hf_quant_config.json"]["quantization"])
    # TensorRT-LLM reads it of mixed precision too; ModelOpt does not write it there.
    assert described.pop("exclude_modules") == ["lm_head"]
    assert described == theirs
    inline = convert({"quantization": theirs, "producer": PRODUCER})
    assert inline.pop("ignore") == []
    assert {key: value for key, value in ours["quantization_config"].items() if key != "ignore"} == inline
    assert ours["quant_cfg.json"] == theirs


def save_pretrained(folder: Path) -> None:
    wanted = settings("LlamaForCausalLM")
    model_class = getattr(transformers, wanted.pop("architecture"))
    model_class(model_class.config_class(**wanted)).save_pretrained(folder)


def test_no_row_is_for_nothing() -> None:
    assert all(any(row.when(case) for case in CASES) for row in ALLOWED)


def write(case: Case, exports: Path, folder: Path) -> None:
    source = hf.open_source(exports / case.source)
    kv_cache: Any = case.kv_cache.lower() if case.kv_cache else None
    asked = Quantization(case.form, group_size=case.group, kv_cache=kv_cache)
    plan = plan_conversion(source, Layout(dtype=case.dtype, quantization=asked))
    layers = make_layers(plan.config, source, given_scales(case, exports), folder / "layers")
    (folder / "ours").mkdir()
    write_huggingface(plan.config, source, layers, folder / "ours", options=Options(sync=False))


def given_scales(case: Case, exports: Path) -> dict[str, Any]:
    """ModelOpt's scales under the names of a TP 1 checkpoint: from its export, but the factors per input, which norms
    took there, from its model."""
    theirs = read(exports / f"{case}-hf" / "model.safetensors")
    vectors = read(exports / f"{case}.vectors")
    scales: dict[str, Any] = {}
    for layer in range(2):
        for kind, modules in FUSED.items():
            names = [f"model.layers.{layer}.{module}" for module in modules]
            own = f"transformer.layers.{layer}.{kind}"
            weight_scales = [theirs[f"{name}.weight_scale"] for name in names]
            if case.form == "fp8":
                assert len({float(scale) for scale in weight_scales}) == 1
                scales[f"{own}.weights_scaling_factor"] = weight_scales[0].reshape(1).numpy()
            else:
                suffix = "per_channel_scale" if case.form == "fp8_rowwise" else "weights_scaling_factor"
                scales[f"{own}.{suffix}"] = torch.cat(weight_scales).numpy()
            for suffix, given in (
                ("activation_scaling_factor", "input_scale"), ("weights_scaling_factor_2", "weight_scale_2"),
            ):  # fmt: skip
                if f"{names[0]}.{given}" in theirs:
                    scales[f"{own}.{suffix}"] = theirs[f"{names[0]}.{given}"].reshape(1).numpy()
            if case.form.endswith("_awq"):
                averaged = [f"model.layers.{layer}.{module}" for module in SHARED.get(kind, modules)]
                scales[f"{own}.prequant_scaling_factor"] = mean(vectors, averaged)
        if case.kv_cache:
            names = [f"model.layers.{layer}.self_attn.{which}_proj.{which}_scale" for which in "kv"]
            largest = max(1.0, *(float(theirs[name]) for name in names))
            scales[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"] = np.array([largest], np.float32)
    return scales


def differences(ours: Path, theirs: Path) -> dict[str, tuple[Any, Any]]:
    found = differing(*(read(folder / "model.safetensors") for folder in (ours, theirs)))
    for file in sorted({path.name for folder in (ours, theirs) for path in folder.iterdir()}):
        if not all((folder / file).is_file() for folder in (ours, theirs)):
            found[f"file {file}"] = tuple("there" if (folder / file).is_file() else ABSENT for folder in (ours, theirs))  # type: ignore[assignment]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    for key in configs[0].keys() | configs[1].keys():
        values = [config.get(key, ABSENT) for config in configs]
        if key == "quantization_config" and ABSENT not in values:
            ignored = [value.pop("ignore") for value in values]
            if values[0] == values[1]:
                values = ignored
        if values[0] != values[1]:
            found[f"config.json {key}"] = (values[0], values[1])
    described = [json.loads((folder / "hf_quant_config.json").read_text()) for folder in (ours, theirs)]
    if described[0]["producer"] != described[1]["producer"]:
        found["hf_quant_config.json producer"] = (described[0]["producer"], described[1]["producer"])
    mine, other = (each["quantization"] for each in described)
    for key in mine.keys() | other.keys():
        if mine.get(key, ABSENT) != other.get(key, ABSENT):
            found[f"hf_quant_config.json {key}"] = (mine.get(key, ABSENT), other.get(key, ABSENT))
    return found
