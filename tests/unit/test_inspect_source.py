"""Sources, described whether or not trtkit converts them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inspect_samples import mixtral, rewrite, to_checkpoint

from trtkit import safetensors_io
from trtkit.checkpoint import open_checkpoint
from trtkit.errors import InputError
from trtkit.inspect import (
    SourceReport,
    inspect_folder,
)
from trtkit.inspect.headers import stored_tensors
from trtkit.inspect.model import Quantization, quantization_of_checkpoint, quantization_of_source
from trtkit.inspect.source import inspect_source

ROOT = Path(__file__).parents[2]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def test_source_llama(make_source: Any) -> None:
    folder = make_source(rope_parameters=LLAMA3, tie_word_embeddings=True)
    report = inspect_folder(folder)
    assert isinstance(report, SourceReport)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.active_parameters is None
    assert (report.convertible, report.supported, report.files, report.problems) == (True, True, 1, [])
    assert report.bytes == 2 * report.parameters
    assert [(each.dtype, each.share) for each in report.dtypes] == [("BF16", 1.0)]
    facts = report.model
    assert (facts.layers, facts.heads, facts.kv_heads, facts.head_size) == (5, 8, 2, 8)
    assert (facts.vocabulary, facts.context, facts.tied_embeddings) == (131, 128, True)
    assert (facts.rope_scaling, facts.rope_factor) == ("llama3", 8.0)
    layouts = report.layouts
    assert layouts is not None
    assert (layouts.tp, layouts.pp_max, layouts.ep) == ((1, 2, 4, 8), 5, {})
    assert (layouts.dtype, layouts.converts_dtype) == ("bfloat16", False)


def test_example_ranks_have_the_size_that_conversion_gives(make_source: Any, tmp_path: Path) -> None:
    folder = make_source()
    layouts = inspect_source(folder).layouts
    assert layouts is not None and layouts.rank_bytes.keys() == {1, 2, 4, 8}
    for tp, size in layouts.rank_bytes.items():
        ranks = open_checkpoint(to_checkpoint(folder, tmp_path / str(tp), tp=tp)).ranks
        assert size == max(sum(entry.nbytes for entry in rank.values()) for rank in ranks)


def test_source_with_experts(tmp_path: Path) -> None:
    folder, total, active = mixtral(tmp_path / "mixtral")
    report = inspect_source(folder)
    assert (report.parameters, report.active_parameters) == (total, active)
    assert (report.model.experts, report.model.experts_per_token) == (4, 2)
    assert report.layouts is not None
    assert (report.layouts.tp, report.layouts.ep) == ((1, 2, 4), {2: (2, 4), 4: (4,)})
    assert report.convertible


def test_unsupported_mixture_counts_by_its_headers(tmp_path: Path, edit_config: Any) -> None:
    folder, total, active = mixtral(tmp_path / "mixtral")
    edit_config(folder, architectures=["NewMixtureForCausalLM"])
    report = inspect_source(folder)
    assert (report.parameters, report.active_parameters) == (total, active)


def test_sharded_source_and_a_missing_shard(make_source: Any) -> None:
    folder = make_source(max_shard_size="100KB")
    whole = inspect_source(make_source())
    report = inspect_source(folder)
    assert report.files == len(list(folder.glob("*.safetensors"))) > 1
    assert (report.parameters, report.bytes, report.tensors) == (whole.parameters, whole.bytes, whole.tensors)
    victim = min(folder.glob("*.safetensors"))
    victim.unlink()
    broken = inspect_source(folder)
    assert not broken.convertible and broken.files == report.files - 1
    assert victim.name in broken.problems[0].cause and "is missing" in broken.problems[0].cause


def test_mixed_dtypes(make_source: Any) -> None:
    folder = make_source()
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder / "model.safetensors", lambda state: state.update({name: state[name].half()}))
    report = inspect_source(folder)
    assert {each.dtype: each.tensors for each in report.dtypes} == {"BF16": report.tensors - 1, "F16": 1}
    assert sum(each.share for each in report.dtypes) == pytest.approx(1, abs=1e-5)
    assert report.warnings == ["weights of several dtypes: BF16, F16"]
    assert report.layouts is not None and report.layouts.converts_dtype
    assert report.convertible


def test_float32_is_converted_and_a_wrong_dtype_is_told(make_source: Any, edit_config: Any) -> None:
    folder = make_source(dtype="float32")
    layouts = inspect_source(folder).layouts
    assert layouts is not None and (layouts.dtype, layouts.converts_dtype) == ("float16", True)
    edit_config(folder, dtype="bfloat16")
    assert inspect_source(folder).warnings == ["config.json says bfloat16, the weights are F32"]


def test_warnings_about_code_and_surplus_files(make_source: Any, edit_config: Any) -> None:
    folder = make_source()
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    shutil.copy(folder / "model.safetensors", folder / "extra.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    code, surplus = inspect_source(folder).warnings
    assert "auto_map" in code and surplus == "extra.safetensors is no part of the model"


def test_stored_copy_of_tied_embeddings_counts_once(make_source: Any, edit_config: Any) -> None:
    folder = make_source(tie_word_embeddings=True)
    plain = inspect_source(folder)
    rewrite(
        folder / "model.safetensors",
        lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}),
    )
    assert inspect_source(folder).parameters == plain.parameters
    edit_config(folder, architectures=["StrangerForCausalLM"])
    assert inspect_source(folder).parameters == plain.parameters


@pytest.mark.parametrize("name", ["Llama4ForCausalLM", "LlamaForSequenceClassification", "ZzzModel"])
def test_unsupported_architecture_is_described(name: str, make_source: Any, edit_config: Any) -> None:
    folder = make_source()
    known = inspect_source(folder)
    edit_config(folder, architectures=[name])
    report = inspect_source(folder)
    assert (report.architecture, report.supported, report.convertible, report.layouts) == (name, False, False, None)
    assert (report.parameters, report.bytes, report.dtypes) == (known.parameters, known.bytes, known.dtypes)
    assert report.model == known.model
    assert ("LlamaForCausalLM" in report.near) == name.startswith("Llama")
    assert "is not supported" in report.problems[0].cause and report.problems[0].fix


def test_what_trtllm_cannot_express_is_said(make_source: Any, edit_config: Any) -> None:
    folder = make_source()
    edit_config(folder, hidden_act="gelu")
    report = inspect_source(folder)
    assert (report.supported, report.convertible, report.layouts) == (True, False, None)
    assert "does not run hidden_act 'gelu'" in report.problems[0].cause
    assert report.parameters and report.model.layers == 5


@pytest.mark.parametrize("key", ["num_local_experts", "num_hidden_layers"])
def test_absurd_sizes_are_a_problem_not_a_wait(key: str, tmp_path: Path, edit_config: Any) -> None:
    folder, total, _ = mixtral(tmp_path / "mixtral")
    edit_config(folder, **{key: 10**9})
    report = inspect_source(folder)
    assert not report.convertible and report.layouts is None and len(report.problems) == 1
    assert report.parameters == total


def test_pickled_weights_are_described_without_being_opened(make_source: Any) -> None:
    folder = make_source()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    report = inspect_source(folder)
    assert (report.files, report.parameters, report.convertible) == (0, None, False)
    assert "pickled weights" in report.problems[0].cause


def gptq(folder: Path) -> None:
    """The linears of a Llama as AutoGPTQ stores them: eight 4-bit values per int32, scales, zeros and an order."""

    def pack(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if name.endswith("_proj.weight")]:
            rows, columns = state.pop(name).shape
            base = name.removesuffix("weight")
            state[f"{base}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
            state[f"{base}qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
            state[f"{base}scales"] = torch.ones(1, rows, dtype=torch.float16)
            state[f"{base}g_idx"] = torch.zeros(columns, dtype=torch.int32)

    rewrite(folder / "model.safetensors", pack)


def test_quantised_source_is_described(make_source: Any, edit_config: Any) -> None:
    folder = make_source()
    plain = inspect_source(folder)
    gptq(folder)
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True})
    report = inspect_source(folder)
    assert report.quantization == Quantization("gptq", 4, 128, None)
    assert report.parameters == plain.parameters and report.bytes < plain.bytes
    assert not report.convertible and "1 groups, which of 128 do not make up 64 inputs" in report.problems[0].cause
    assert report.layouts is not None and plain.layouts is not None
    assert report.layouts.rank_bytes == plain.layouts.rank_bytes, "what the unquantised model would take"
    edit_config(folder, architectures=["StrangerForCausalLM"])
    assert inspect_source(folder).parameters == plain.parameters, "by the headers: packed values are unpacked"


QUANTIZATIONS: list[tuple[dict[str, Any], Quantization]] = [
    ({"quant_method": "awq", "bits": 4, "group_size": 64}, Quantization("awq", 4, 64, None)),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, Quantization("bitsandbytes", 4, None, None)),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, Quantization("bitsandbytes", 8, None, None)),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Quantization("fp8", 8, 128, None)),
    ({"quant_method": "mxfp4"}, Quantization("mxfp4", 4, None, None)),
    (
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4, "group_size": 32}}}},
        Quantization("compressed-tensors", 4, 32, None),
    ),
    (
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        Quantization("modelopt FP8", 8, None, "FP8"),
    ),
    ({"quant_method": ["no", "text"], "bits": "four", "group_size": -1}, Quantization(None, None, None, None)),
    ({}, Quantization(None, None, None, None)),
]  # fmt: skip


@pytest.mark.parametrize(("said", "wanted"), QUANTIZATIONS)
def test_quantisation_methods(said: dict[str, Any], wanted: Quantization, tmp_path: Path) -> None:
    assert quantization_of_source(tmp_path, {"quantization_config": said}) == wanted


def test_quantisation_in_a_file_of_its_own(tmp_path: Path) -> None:
    assert quantization_of_source(tmp_path, {}) is None
    said = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, **said}))
    assert quantization_of_source(tmp_path, {}) == Quantization("NVFP4", 4, 16, "FP8")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({}, None),
        ({"quant_algo": None, "kv_cache_quant_algo": None}, None),
        ({"quant_algo": "W4A16_AWQ", "group_size": 128}, Quantization("W4A16_AWQ", 4, 128, None)),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "group_size": 128}, Quantization("FP8", 8, None, "FP8")),
        ({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, Quantization("W8A8_SQ_PER_CHANNEL", 8, None, None)),
        ({"quant_algo": None, "kv_cache_quant_algo": "INT8"}, Quantization(None, None, None, "INT8")),
    ],
)
def test_quantisation_of_a_checkpoint(said: dict[str, Any], wanted: Quantization | None) -> None:
    assert quantization_of_checkpoint({"quantization": said}) == wanted


def test_dtypes_that_trtkit_does_not_read_are_counted(tmp_path: Path, make_source: Any, edit_config: Any) -> None:
    folder = make_source()
    header = {"a.weight": {"dtype": "F4", "shape": [2, 32], "data_offsets": [0, 32]}}
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(32))
    report = inspect_source(folder)
    assert [(each.dtype, each.elements, each.bytes) for each in report.dtypes] == [("F4", 64, 32)]
    assert not report.convertible and "dtype F4" in report.problems[0].cause


BAD_RECORDS = [
    {"dtype": 5, "shape": [1], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1] * 40, "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1]},
    [],
]


@pytest.mark.parametrize("record", BAD_RECORDS)
def test_corrupt_headers_are_one_error(record: Any, tmp_path: Path) -> None:
    raw = json.dumps({"good": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "bad": record}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(InputError, match=r"model\.safetensors: the safetensors header is corrupt \(tensor 'bad'"):
        stored_tensors(file)


def test_weights_are_never_read(make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_source()
    checkpoint = to_checkpoint(folder, tmp_path / "out")

    def refuse(self: Any) -> None:
        raise AssertionError("somebody reads weights")

    monkeypatch.setattr(safetensors_io.Reader, "__init__", refuse)
    assert inspect_folder(folder).problems == inspect_folder(checkpoint).problems == []


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys; from pathlib import Path; from trtkit.inspect import inspect_folder\n"
        f"assert inspect_folder(Path({str(ROOT / 'examples' / 'tiny-llama')!r})).convertible\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
