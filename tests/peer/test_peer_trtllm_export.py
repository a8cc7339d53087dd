"""NVIDIA ModelOpt quantises saved models and exports them for TensorRT-LLM, on the CPU. With its scales we write the
same files: every tensor (name, shape, dtype, bits) and the `quantization` of config.json, but for the rows of
`ALLOWED`. A row says when its difference must be there, so one that has become stale fails as a new one does.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from given_scales import ABSENT, ANY, Allowed, Case, differing, make_layers, mean, read, run_modelopt, scales_of

from trtkit import hf
from trtkit.convert import conversion
from trtkit.convert.quantization import Quantization
from trtkit.convert.source import Layout, plan_conversion

pytestmark = [pytest.mark.peer, pytest.mark.xdist_group("peer")]

CASES = [
    Case("LlamaForCausalLM", "int4_awq", 128, "FP8"),
    Case("LlamaForCausalLM", "int4_awq", 64, "INT8"),
    Case("LlamaForCausalLM", "int4_awq", 64),
    Case("LlamaForCausalLM", "w4a8_awq", 128, "INT8"),
    Case("LlamaForCausalLM", "w4a8_awq", 128, "FP8"),
    Case("LlamaForCausalLM", "fp8", None, "FP8"),
    Case("LlamaForCausalLM", "fp8", None, "INT8"),
    Case("LlamaForCausalLM", "int8_sq"),
    Case("LlamaForCausalLM", "int8_sq", None, "INT8"),
    Case("Qwen2ForCausalLM", "int4_awq", 128),
    Case("Qwen2ForCausalLM", "fp8"),
    Case("GemmaForCausalLM", "int4_awq", 128),
    Case("GemmaForCausalLM", "w4a8_awq", 128, "FP8"),
    Case("GemmaForCausalLM", "fp8"),
]
LAYOUTS = {1: "float16", 2: "bfloat16"}
"""TP -> dtype."""


ALLOWED = (
    Allowed(
        "quantization exclude_modules", ABSENT, ["lm_head"],
        "without the key TensorRT-LLM leaves the head alone by itself, and routers, which a list would have to name",
    ),
    *(
        Allowed(
            f"rank{{rank}} transformer.layers.{{layer}}.attention.{which}_cache_scaling_factor", ABSENT, ANY,
            "newer releases merge the two by their maximum (which is kv_cache_scaling_factor), older ones know neither",
            lambda case: case.kv_cache is not None,
        )
        for which in "kv"
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    run_modelopt(folder, CASES, layouts=LAYOUTS, huggingface=False)
    return folder


@pytest.mark.parametrize("tp", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoint_equals_that_of_model_optimizer(case: Case, tp: int, exports: Path, tmp_path: Path) -> None:
    write(case, tp, exports, tmp_path)
    found = differences(tmp_path / "checkpoint", exports / f"{case}-tp{tp}", tp)
    expected = {
        row.key.format(rank=rank, layer=layer): row
        for row in ALLOWED
        if row.when(case)
        for rank in range(tp)
        for layer in range(2)
    }
    assert not {key: values for key, values in found.items() if key not in expected}
    assert not sorted(expected.keys() - found.keys())
    for key, row in expected.items():
        for value, allowed in zip(found[key], (row.ours, row.theirs), strict=True):
            assert value == allowed or (allowed == ANY and value != ABSENT), (key, row.reason)


def test_no_row_is_for_nothing() -> None:
    assert all(any(row.when(case) for case in CASES) for row in ALLOWED)


def write(case: Case, tp: int, exports: Path, folder: Path) -> None:
    """Our checkpoint with ModelOpt's scales, by the way of every quantised conversion."""
    source = hf.open_source(exports / case.source)
    kv_cache: Any = case.kv_cache.lower() if case.kv_cache else None
    asked = Quantization(case.form, group_size=case.group, kv_cache=kv_cache)
    layout = Layout(tp=tp, dtype=LAYOUTS[tp], parallel_embedding="vocab", quantization=asked)
    plan = plan_conversion(source, layout)
    layers = make_layers(plan.config, source, given_scales(case, exports), folder / "layers")
    convert = partial(conversion.write_here, made=layers)
    conversion.convert(plan, source, folder / "checkpoint", write=convert, options=conversion.Options(sync=False))


def given_scales(case: Case, exports: Path) -> dict[str, Any]:
    """What ModelOpt's TP 1 export holds beside weights, but for the factors per input: these are the model's own, since
    the export rounds them to its dtype."""
    scales = scales_of(read(exports / f"{case}-tp1" / "rank0.safetensors"))
    if not case.factors:
        return scales
    vectors = read(exports / f"{case}.vectors")
    for layer in range(2):
        ours, theirs = f"transformer.layers.{layer}", f"model.layers.{layer}"
        modules = {
            "attention.qkv": [f"{theirs}.self_attn.{which}_proj" for which in "qkv"],
            "attention.dense": [f"{theirs}.self_attn.o_proj"],
            "mlp.fc": [f"{theirs}.mlp.gate_proj"],
            "mlp.gate": [f"{theirs}.mlp.up_proj"],
            "mlp.proj": [f"{theirs}.mlp.down_proj"],
        }
        for kind, sources in modules.items():
            scales[f"{ours}.{kind}.prequant_scaling_factor"] = mean(vectors, sources)
    return scales


def differences(ours: Path, theirs: Path, tp: int) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    for key in ("dtype", "vocab_size", "mapping"):
        if key == "mapping":
            mine, other = ({name: config[key][name] for name in configs[0][key]} for config in configs)
        else:
            mine, other = (config[key] for config in configs)
        if mine != other:
            found[f"config {key}"] = (mine, other)
    described = [config["quantization"] for config in configs]
    for key in described[0].keys() | described[1].keys():
        values = [each.get(key, ABSENT) for each in described]
        if values[0] != values[1]:
            found[f"quantization {key}"] = (values[0], values[1])
    for rank in range(tp):
        tensors = (read(folder / f"rank{rank}.safetensors") for folder in (ours, theirs))
        found |= {f"rank{rank} {name}": values for name, values in differing(*tensors).items()}
    return found
