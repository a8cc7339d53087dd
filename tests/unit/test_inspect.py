"""`trtkit inspect`: everything that can be described is, whole or not; what cannot be is one clear error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from trtkit import hf, safetensors_io
from trtkit.checkpoint import open_checkpoint
from trtkit.convert.conversion import Options, convert
from trtkit.convert.source import Layout, plan_conversion
from trtkit.errors import InputError
from trtkit.inspect import (
    CheckpointReport,
    EngineReport,
    RepositoryReport,
    SourceReport,
    StoreReport,
    detect,
    inspect_folder,
    inspect_path,
)
from trtkit.inspect.headers import stored_tensors
from trtkit.inspect.model import Quantization, quantization_of_checkpoint, quantization_of_source
from trtkit.inspect.source import inspect_source
from trtkit.store import ArtifactStore

ROOT = Path(__file__).parents[2]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def to_checkpoint(source: Path, out: Path, *, checksum: bool = True, **layout: Any) -> Path:
    opened = hf.open_source(source)
    convert(plan_conversion(opened, Layout(**layout)), opened, out, options=Options(checksum=checksum, sync=False))
    return out


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = safetensors.torch.load_file(file)
    change(state)
    safetensors.torch.save_file(state, file)


def mixtral(folder: Path) -> tuple[Path, int, int]:
    """A tiny Mixtral, its parameters, and those of a token that goes through 2 of its 4 experts."""
    config = transformers.MixtralConfig(
        vocab_size=131, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).to(torch.float16)
    model.save_pretrained(folder)
    total = sum(parameter.numel() for parameter in model.parameters())
    return folder, total, total - 3 * 2 * (3 * 32 * 48)


def engine_of(folder: Path, *, tp: int = 1, ranks: int = 1, **build: Any) -> Path:
    """An engine as trtllm-build's config.json describes it, with stand-ins for the engines themselves."""
    folder.mkdir()
    config = {
        "version": "1.2.1",
        "pretrained_config": {
            "architecture": "LlamaForCausalLM", "dtype": "float16", "vocab_size": 2048, "hidden_size": 192,
            "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_size": 24,
            "max_position_embeddings": 512, "rotary_scaling": {"type": "linear", "factor": 2.0},
            "mapping": {"world_size": tp, "tp_size": tp, "pp_size": 1, "rank": 0},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "group_size": 128},
        },
        "build_config": {
            "max_batch_size": 8, "max_input_len": 256, "max_seq_len": 512, "max_num_tokens": 2048,
            "max_beam_width": 1, "kv_cache_type": "PAGED",
            "plugin_config": {"dtype": "float16", "gemm_plugin": "auto", "nccl_plugin": None, "moe_plugin": "float16"},
            **build,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(ranks):
        (folder / f"rank{rank}.engine").write_bytes(b"engine" * (rank + 1))
    return folder


# Sources


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
    assert (layouts.tp, layouts.pp_max, layouts.ep) == ((1, 2, 4, 8), 5, (1,))
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
    assert report.layouts is not None and report.layouts.ep == (1, 2, 4)
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
    assert not report.convertible and "quantised already (gptq)" in report.problems[0].cause
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


@pytest.mark.parametrize(("given", "wanted"), QUANTIZATIONS)
def test_quantisation_methods(given: dict[str, Any], wanted: Quantization, tmp_path: Path) -> None:
    assert quantization_of_source(tmp_path, {"quantization_config": given}) == wanted


def test_quantisation_in_a_file_of_its_own(tmp_path: Path) -> None:
    assert quantization_of_source(tmp_path, {}) is None
    given = {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, **given}))
    assert quantization_of_source(tmp_path, {}) == Quantization("NVFP4", 4, 16, "FP8")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, None),
        ({"quant_algo": None, "kv_cache_quant_algo": None}, None),
        ({"quant_algo": "W4A16_AWQ", "group_size": 128}, Quantization("W4A16_AWQ", 4, 128, None)),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "group_size": 128}, Quantization("FP8", 8, None, "FP8")),
        ({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, Quantization("W8A8_SQ_PER_CHANNEL", 8, None, None)),
        ({"quant_algo": None, "kv_cache_quant_algo": "INT8"}, Quantization(None, None, None, "INT8")),
    ],
)
def test_quantisation_of_a_checkpoint(given: dict[str, Any], wanted: Quantization | None) -> None:
    assert quantization_of_checkpoint({"quantization": given}) == wanted


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


# Checkpoints


def test_checkpoint(make_source: Any, tmp_path: Path) -> None:
    source = make_source(tie_word_embeddings=True)
    report = inspect_folder(to_checkpoint(source, tmp_path / "out", tp=2, pp=2, dtype="float16"))
    assert isinstance(report, CheckpointReport)
    assert (report.architecture, report.dtype, report.tp, report.pp, report.ep) == (
        "LlamaForCausalLM",
        "float16",
        2,
        2,
        1,
    )
    assert report.complete and report.quantization is None and report.problems == []
    assert report.parameters == inspect_source(source).parameters
    assert [rank.file for rank in report.ranks] == [f"rank{rank}.safetensors" for rank in range(4)]
    assert [rank.bytes for rank in report.ranks] == [
        (tmp_path / "out" / rank.file).stat().st_size for rank in report.ranks
    ]
    assert report.bytes == open_checkpoint(tmp_path / "out").nbytes
    made = report.conversion
    assert made is not None and (made.files, made.checksums) == (5, 5)
    assert made.made_by is not None and made.made_by.startswith("trtkit ")
    identity = hf.open_source(source).identity()
    assert made.source_digest == identity["config_sha256"]


def test_checkpoint_of_others_and_without_checksums(make_source: Any, tmp_path: Path, edit_config: Any) -> None:
    out = to_checkpoint(make_source(), tmp_path / "out", checksum=False)
    report = inspect_folder(out)
    assert isinstance(report, CheckpointReport) and report.conversion is not None
    assert (report.conversion.files, report.conversion.checksums) == (2, 0)
    (out / "conversion.json").unlink()
    edit_config(out, producer={"name": "modelopt", "version": "0.40"}, quantization={"quant_algo": "W8A16"})
    report = inspect_folder(out)
    assert isinstance(report, CheckpointReport) and report.conversion is None
    assert report.producer == "modelopt 0.40"
    assert report.quantization == Quantization("W8A16", 8, None, None)
    edit_config(out, architecture="ArcticForCausalLM")
    report = inspect_folder(out)
    assert isinstance(report, CheckpointReport)
    assert (report.supported, report.parameters, report.complete) == (False, None, True)


def drop(folder: Path) -> None:
    (folder / "rank1.safetensors").unlink()


def truncate(folder: Path) -> None:
    file = folder / "rank1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garble(folder: Path) -> None:
    (folder / "rank1.safetensors").write_bytes(b"<html>not found</html>" * 10)


def surplus(folder: Path) -> None:
    shutil.copy(folder / "rank1.safetensors", folder / "rank2.safetensors")


def replace_rank(folder: Path) -> None:
    safetensors.torch.save_file({f"t{n}": torch.zeros(n + 1) for n in range(9)}, folder / "rank1.safetensors")


DAMAGE = {
    drop: r"rank1\.safetensors is missing",
    truncate: r"rank1\.safetensors: truncated",
    garble: r"rank1\.safetensors: not a safetensors file",
    surplus: r"rank2\.safetensors does not belong here",
    replace_rank: r"rank1\.safetensors: [\d,]+ bytes, conversion\.json says",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_damaged_checkpoint_is_described(damage: Any, message: str, make_source: Any, tmp_path: Path) -> None:
    out = to_checkpoint(make_source(), tmp_path / "out", tp=2)
    good = inspect_folder(out)
    damage(out)
    report = inspect_folder(out)
    assert isinstance(report, CheckpointReport) and isinstance(good, CheckpointReport)
    assert good.complete and not report.complete
    assert report.parameters == good.parameters and report.ranks[0] == good.ranks[0]
    assert len(report.problems) == 1
    assert re.search(message, report.problems[0].cause)
    if damage in (drop, truncate, garble, replace_rank):
        assert report.ranks[1].problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": None}, "no 'num_hidden_layers'"),
        ({"mapping": {"tp_size": 2, "pp_size": 1, "world_size": 5}}, "world_size 5 is not tp_size 2 x pp_size 1"),
        ({"mapping": {"tp_size": 10**6, "pp_size": 10**5}}, "no checkpoint has so many"),
        ({"dtype": 7}, "dtype is 7"),
    ],
)
def test_damaged_checkpoint_config(
    changes: dict[str, Any], message: str, make_source: Any, tmp_path: Path, edit_config: Any
) -> None:
    out = to_checkpoint(make_source(), tmp_path / "out")
    edit_config(out, **changes)
    with pytest.raises(InputError, match=message):
        inspect_folder(out)


# Engines


def test_engine(tmp_path: Path) -> None:
    report = inspect_folder(engine_of(tmp_path / "engine", tp=2, ranks=2))
    assert isinstance(report, EngineReport)
    assert (report.tensorrt_llm, report.dtype, report.tp, report.pp, report.ep) == ("1.2.1", "float16", 2, 1, 1)
    assert "26.07" in report.releases
    assert report.limits == {
        "max_batch_size": 8, "max_input_len": 256, "max_seq_len": 512, "max_num_tokens": 2048, "max_beam_width": 1,
    }  # fmt: skip
    assert report.kv_cache_type == "PAGED"
    assert report.plugins == {"gemm_plugin": "auto", "moe_plugin": "float16"}
    assert report.quantization == Quantization("FP8", 8, None, "FP8")
    assert (report.model.rope_scaling, report.model.rope_factor) == ("linear", 2.0)
    assert report.complete and [rank.bytes for rank in report.ranks] == [6, 12] and report.bytes == 18


def test_incomplete_engine(tmp_path: Path) -> None:
    report = inspect_folder(engine_of(tmp_path / "engine", tp=3, ranks=2, max_batch_size="many", plugin_config=[]))
    assert isinstance(report, EngineReport)
    assert not report.complete and [rank.problem for rank in report.ranks] == [None, None, "missing"]
    assert "rank2.engine is missing" in report.problems[0].cause
    assert report.limits["max_batch_size"] is None and report.plugins == {}


# Repositories and stores


def test_repository() -> None:
    report = inspect_folder(ROOT / "model_repository")
    assert isinstance(report, RepositoryReport)
    models = {model.name: model for model in report.models}
    assert list(models) == ["ensemble", "postprocessing", "preprocessing", "tensorrt_llm"]
    ensemble, runtime = models["ensemble"], models["tensorrt_llm"]
    assert ensemble.steps == ("preprocessing", "tensorrt_llm", "postprocessing") and ensemble.backend == "ensemble"
    assert (runtime.backend, runtime.versions, runtime.decoupled) == ("python", (1,), True)
    assert runtime.max_batch_size and runtime.instances == ("1 x CPU",)
    assert "input_ids" in runtime.inputs and "output_ids" in runtime.outputs
    assert report.errors == 0 and report.problems == []


def test_repository_with_models_that_cannot_be_read(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "model_repository", tmp_path / "repository")
    (tmp_path / "repository" / "ensemble" / "config.pbtxt").write_text('nmae: "ensemble"\n')
    (tmp_path / "repository" / "preprocessing" / "config.pbtxt").unlink()
    report = inspect_folder(tmp_path / "repository")
    assert isinstance(report, RepositoryReport)
    assert [model.name for model in report.models if model.max_batch_size is None] == ["ensemble", "preprocessing"]
    first, second = report.problems
    assert "ensemble/config.pbtxt:1" in first.cause and "preprocessing/config.pbtxt" in second.cause
    assert report.errors >= 2


def test_instance_groups_and_platforms(tmp_path: Path) -> None:
    (tmp_path / "onnx" / "3").mkdir(parents=True)
    text = (
        'name: "onnx"\nplatform: "onnxruntime_onnx"\nmax_batch_size: 4\n'
        "instance_group { count: 2 kind: KIND_GPU gpus: 0 gpus: 1 }\ninstance_group { kind: KIND_CPU }\n"
    )
    (tmp_path / "onnx" / "config.pbtxt").write_text(text)
    report = inspect_folder(tmp_path)
    assert isinstance(report, RepositoryReport)
    (model,) = report.models
    assert (model.backend, model.versions, model.instances) == ("onnxruntime_onnx", (3,), ("2 x GPU 0,1", "1 x CPU"))


def test_store_and_artifacts(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    store = ArtifactStore(tmp_path / "store")

    def fill(folder: Path) -> None:
        shutil.copytree(to_checkpoint(source, tmp_path / "made"), folder, dirs_exist_ok=True)

    checkpoint, _ = store.build("checkpoint", {"of": "test"}, fill)
    engine, _ = store.build(
        "engine",
        {"of": "test"},
        lambda folder: shutil.copytree(engine_of(tmp_path / "e", tp=2), folder, dirs_exist_ok=True) and None,
    )
    report = inspect_folder(store.root)
    assert isinstance(report, StoreReport)
    found = {each.path: each.report.kind for each in report.artifacts}
    assert found == {f"checkpoint/{checkpoint.name}": "checkpoint", f"engine/{engine.name}": "engine"}
    assert all(each.created for each in report.artifacts)
    assert "rank1.engine is missing" in report.problems[0].cause
    assert detect(store.root / "engine") == "store"
    assert inspect_folder(checkpoint).kind == "checkpoint" and inspect_folder(engine).kind == "engine"
    (checkpoint / "config.json").write_text("{")
    report = inspect_folder(store.root)
    assert isinstance(report, StoreReport) and len(report.artifacts) == 1 and len(report.problems) == 2


# What a path is


def nothing(folder: Path) -> str:
    return "is empty"


def strangers(folder: Path) -> str:
    for name in "abcd":
        (folder / f"{name}.txt").touch()
    return r"holds nothing that trtkit knows \(a\.txt, b\.txt, c\.txt and 1 more\)"


def other_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"debug": true}')
    return r"config\.json is neither a model's nor"


def broken_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return r"config\.json: not valid JSON"


def dangling(folder: Path) -> str:
    (folder / "config.json").symlink_to("nowhere")
    return "a link to a file that does not exist"


def ranks_without_config(folder: Path) -> str:
    (folder / "rank0.safetensors").touch()
    return r"cannot read .*config\.json"


def weights_without_config(folder: Path) -> str:
    (folder / "model.safetensors").touch()
    return r"cannot read .*config\.json"


def source_and_engine(folder: Path) -> str:
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "rank0.engine").touch()
    return r"ambiguous \(source: config\.json has architectures; engine: rank0\.engine is there\)"


def source_and_repository(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "a").mkdir()
    (folder / "a" / "config.pbtxt").touch()
    return r"ambiguous \(source: .*; repository: a/config\.pbtxt is there\)"


def both_keys(folder: Path) -> str:
    (folder / "config.json").write_text('{"architectures": ["A"], "architecture": "A"}')
    return r"ambiguous \(checkpoint: .*; source: "


def one_model(folder: Path) -> str:
    (folder / "config.pbtxt").touch()
    return "is one model of a repository"


FOLDERS = [
    nothing, strangers, other_config, broken_config, dangling, ranks_without_config, weights_without_config,
    source_and_engine, source_and_repository, both_keys, one_model,
]  # fmt: skip


@pytest.mark.parametrize("make", FOLDERS)
def test_folders_that_are_nothing_or_several_things(make: Callable[[Path], str], tmp_path: Path) -> None:
    message = make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        inspect_folder(tmp_path)
    assert caught.value.fix and "\n" not in caught.value.cause
    if "ambiguous" in message:
        assert "--kind" in caught.value.fix


def test_kind_settles_what_is_ambiguous(make_source: Any) -> None:
    folder = make_source()
    (folder / "rank0.engine").touch()
    with pytest.raises(InputError, match="ambiguous"):
        inspect_folder(folder)
    assert inspect_folder(folder, kind="source").kind == "source"
    with pytest.raises(InputError, match="holds something else and no engine"):
        inspect_folder(folder, kind="engine")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("model.safetensors", "give the folder"),
        ("rank0.engine", "give the folder"),
        ("config.pbtxt", "model repository"),
        ("llama.yaml", "trtkit config check"),
        ("notes", "give a folder, or a hub id"),
    ],
)
def test_a_file_is_told_from_a_folder(name: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="is a file, not a folder") as caught:
        inspect_path(str(tmp_path / name))
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("/no/such/folder", {}, "does not exist"),
        ("a\0b", {}, "does not exist|is no path"),
        ("x" * 5000, {}, "cannot read|does not exist"),
        ("~no-such-user-here/x", {}, "is no path"),
        (".", {"revision": "main"}, "is a local folder, which has no revision 'main'"),
        ("owner/name", {"kind": "engine"}, "does not exist"),
        ("s3://bucket/model", {"revision": "main"}, "has no revisions"),
        ("s3://key:secret@bucket", {}, "holds credentials"),
    ],
)
def test_paths_that_cannot_be(path: str, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        inspect_path(path, **options)
    assert "secret" not in caught.value.cause and len(caught.value.cause) < 500


# The command


def trtkit(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trtkit", "inspect", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


MODEL = {
    "layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_size", "vocabulary", "context",
    "rope_scaling", "rope_factor", "tied_embeddings", "experts", "experts_per_token",
}  # fmt: skip
RANK = {"file", "present", "tensors", "bytes", "problem"}
BUILT = {
    "kind", "path", "architecture", "dtype", "tp", "pp", "ep", "complete", "bytes", "quantization", "model", "ranks",
    "problems",
}  # fmt: skip
KEYS = {
    "source": {
        "kind", "path", "origin", "architecture", "supported", "near", "convertible", "files", "tensors", "bytes",
        "parameters", "active_parameters", "dtypes", "quantization", "model", "layouts", "warnings", "problems",
    },
    "checkpoint": BUILT | {"supported", "parameters", "dtypes", "producer", "conversion"},
    "engine": BUILT | {"tensorrt_llm", "releases", "limits", "kv_cache_type", "plugins"},
    "repository": {"kind", "path", "models", "files", "bytes", "errors", "warnings", "problems"},
    "store": {"kind", "path", "artifacts", "problems"},
}  # fmt: skip


@pytest.fixture
def one_of_each(make_source: Any, tmp_path: Path) -> dict[str, Path]:
    source = make_source()
    made = to_checkpoint(source, tmp_path / "checkpoint")
    store = ArtifactStore(tmp_path / "store")
    store.build("checkpoint", {}, lambda folder: shutil.copytree(made, folder, dirs_exist_ok=True) and None)
    return {
        "source": source,
        "checkpoint": made,
        "engine": engine_of(tmp_path / "engine"),
        "repository": ROOT / "model_repository",
        "store": store.root,
    }


def test_json_schema(one_of_each: dict[str, Path]) -> None:
    for kind, path in one_of_each.items():
        done = trtkit(path, "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["kind"] == kind and next(iter(report)) == "kind"
        assert report.keys() == KEYS[kind]
        assert report == {"kind": kind, **json.loads(json.dumps(asdict(inspect_folder(path))))}
        if "model" in report:
            assert report["model"].keys() == MODEL
        if "ranks" in report:
            assert report["ranks"][0].keys() == RANK
        if kind == "source":
            assert report["layouts"].keys() == {"tp", "pp_max", "ep", "dtype", "converts_dtype", "rank_bytes"}
            assert report["dtypes"][0].keys() == {"dtype", "tensors", "elements", "bytes", "share"}
        if kind == "checkpoint":
            assert report["conversion"].keys() == {"made_by", "origin", "source_digest", "files", "checksums"}
        if kind == "repository":
            assert report["models"][0].keys() == {
                "name", "backend", "versions", "max_batch_size", "decoupled", "instances", "inputs", "outputs", "steps",
            }  # fmt: skip
        if kind == "store":
            assert report["artifacts"][0].keys() == {"path", "created", "report"}


def test_tables(one_of_each: dict[str, Path], edit_config: Any) -> None:
    wanted = {
        "source": ["LlamaForCausalLM", "BF16 100%", "1, 2, 4, 8", "bfloat16, as stored", "TP 8: "],
        "checkpoint": ["TP 1 x PP 1", "made by", "2 of 2 files"],
        "engine": ["1.2.1 (containers", "max_num_tokens", "2048", "FP8, 8 bits, key/value cache FP8"],
        "repository": ["preprocessing > tensorrt_llm > postprocessing", "1 x CPU", "`trtkit repo lint`: 0 errors"],
        "store": ["checkpoint/", "LlamaForCausalLM"],
    }
    for kind, path in one_of_each.items():
        done = trtkit(path)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        for text in wanted[kind]:
            assert text in done.stdout, (kind, text)
    edit_config(one_of_each["source"], architectures=["Llama9ForCausalLM"])
    (one_of_each["engine"] / "rank0.engine").unlink()
    done = trtkit(one_of_each["source"])
    assert done.returncode == 0
    assert "Llama9ForCausalLM (not supported; closest: LlamaForCausalLM" in done.stdout
    assert "problem: " in done.stdout and "fix: " in done.stdout
    assert "INCOMPLETE: 0 of 1" in trtkit(one_of_each["engine"]).stdout


def test_errors_are_a_cause_and_a_fix(tmp_path: Path) -> None:
    done = trtkit(tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "  fix"]
    done = trtkit(ROOT / "pyproject.toml", "--json")
    assert json.loads(done.stdout)["error"]["exit_code"] == done.returncode == 2


def test_help_has_an_example() -> None:
    done = trtkit("--help")
    assert done.returncode == 0
    assert "Example:\n    trtkit inspect examples/tiny-llama\n" in done.stdout
