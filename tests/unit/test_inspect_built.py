"""Checkpoints, engines, model repositories and stores, described whole or not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from inspect_samples import engine_of, to_checkpoint

from trtkit import hf
from trtkit.checkpoint import open_checkpoint
from trtkit.config_file import parse_config
from trtkit.errors import InputError
from trtkit.inspect import (
    CheckpointReport,
    EngineReport,
    RepositoryReport,
    StoreReport,
    detect,
    inspect_folder,
)
from trtkit.inspect.model import Quantization
from trtkit.inspect.source import inspect_source
from trtkit.repository.generate import render_repository, write_repository
from trtkit.store import ArtifactStore

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama"

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


def test_engine(tmp_path: Path) -> None:
    folder = engine_of(tmp_path / "engine", tp=2, ranks=2)
    (folder / "rank0_managed_weights.safetensors").touch()  # of trtllm-build --fast_build
    report = inspect_folder(folder)
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


def test_repository() -> None:
    report = inspect_folder(ROOT / "model_repository")
    assert isinstance(report, RepositoryReport)
    models = {model.name: model for model in report.models}
    assert {"ensemble", "postprocessing", "preprocessing", "tensorrt_llm"} <= set(models)
    assert (report.topology, report.runtimes) == ("ensemble", ("reference",))
    assert {name: model.runtime for name, model in models.items() if model.runtime} == {"tensorrt_llm": "reference"}
    assert {name: model.drives for name, model in models.items() if model.drives} == {"llm": "tensorrt_llm"}
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
    assert (model.runtime, report.runtimes, report.topology) == ("onnxruntime", ("onnxruntime",), None)


@pytest.mark.parametrize("runtime", ["tensorrtllm", "reference", "llmapi", "vllm"])
def test_a_fused_repository(runtime: str, tmp_path: Path) -> None:
    text = f"name: t\nmodel: {{source: {TINY}}}\nserving: {{runtime: {runtime}, topology: fused}}\n"
    write_repository(render_repository(parse_config(text), model_path_in_container="/model"), tmp_path / "models")
    report = inspect_folder(tmp_path / "models")
    assert isinstance(report, RepositoryReport)
    ((model,),) = (report.models,)
    assert (model.name, model.runtime, model.drives) == ("llm", runtime, None)
    assert (report.topology, report.runtimes) == ("fused", (runtime,))


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
