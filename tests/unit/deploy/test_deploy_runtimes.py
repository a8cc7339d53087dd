"""Generated repositories of every runtime and topology: what executes them, and which servers can."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trtkit import pbtxt
from trtkit.config import BuildConfig
from trtkit.config_file import parse_config
from trtkit.config_serving import LLM_RUNTIMES, RUNTIMES, TOPOLOGIES
from trtkit.deploy import docker as docker_target
from trtkit.deploy import local, runtimes
from trtkit.deploy.command import features_of
from trtkit.deploy.server import Server
from trtkit.errors import InputError, LacksError
from trtkit.repository.generate import render_repository, write_repository

ROOT = Path(__file__).parents[3]
TINY = ROOT / "examples" / "tiny-llama"
ONNX = ROOT / "examples" / "onnx-classifier" / "classifier.onnx"
FUNCTION = ROOT / "examples" / "text-statistics" / "statistics.py"


@dataclass(frozen=True)
class Row:
    """A layout, and what is expected of it.

    Attributes:
        models: model -> the runtime that executes it.
        needs: of a server, in words.
        image: end of the container's name; None where no container has it.
        target: deploy.target when the repository is made.
    """

    runtime: str
    topology: str | None
    models: dict[str, str | None]
    needs: list[str]
    image: str | None
    target: str = "docker"


_TRTLLM = "-trtllm-python-py3"
_ENSEMBLE: dict[str, str | None] = dict.fromkeys(("ensemble", "llm", "postprocessing", "preprocessing"))
ROWS = [
    Row("tensorrtllm", "ensemble", {**_ENSEMBLE, "tensorrt_llm": "tensorrtllm"}, ["backend tensorrtllm"], _TRTLLM),
    Row("tensorrtllm", "fused", {"llm": "tensorrtllm"}, ["Python package tensorrt_llm"], _TRTLLM),
    Row("reference", "ensemble", {**_ENSEMBLE, "tensorrt_llm": "reference"}, ["Python package trtkit"], None, "local"),
    Row("reference", "fused", {"llm": "reference"}, ["Python package trtkit"], None, "local"),
    Row("llmapi", None, {"tensorrt_llm": "llmapi"}, ["Python package tensorrt_llm"], _TRTLLM),
    Row("llmapi", "fused", {"llm": "llmapi"}, ["Python package tensorrt_llm"], _TRTLLM),
    Row("vllm", None, {"vllm_model": "vllm"}, ["backend vllm"], "-vllm-python-py3"),
    Row("vllm", "fused", {"llm": "vllm"}, ["Python package vllm"], "-vllm-python-py3"),
    Row("onnxruntime", None, {"m": "onnxruntime"}, ["backend onnxruntime"], "-py3"),
    Row("onnxruntime", None, {"m": "onnxruntime"}, ["Python package onnxruntime"], None, "local"),
    Row("python", None, {"m": "python"}, [], "-py3"),
]  # fmt: skip
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.runtime}-{row.topology}-{row.target}")


def test_every_layout_is_in_the_table() -> None:
    assert {(row.runtime, row.topology) for row in ROWS} == {
        (runtime, topology) for runtime in RUNTIMES for topology in TOPOLOGIES[runtime]
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """As much of a Hugging Face checkpoint and of an engine as generating and deploying read."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    shutil.copyfile(TINY / "tokenizer.json", folder / "tokenizer.json")
    engine = tmp_path / "engine"
    engine.mkdir()
    built = {"version": "1.2.1", "pretrained_config": {"mapping": {}}, "build_config": {}}
    (engine / "config.json").write_text(json.dumps(built))
    (engine / "rank0.engine").write_bytes(b"1")
    return folder


def config_of(row: Row, source: Path, serving: str = "", more: str = "", deploy: str = "") -> BuildConfig:
    model = {"onnxruntime": ONNX, "python": FUNCTION}.get(row.runtime, source)
    options = f"serving: {{runtime: {row.runtime}, topology: {row.topology or 'null'}, {serving}}}"
    return parse_config(
        f"name: m\nmodel: {{source: '{model}'}}\n{options}\ndeploy: {{target: {row.target}, {deploy}}}\n{more}"
    )


def generated(config: BuildConfig, source: Path) -> Path:
    given: dict[str, Any] = {}
    if config.serving.runtime == "tensorrtllm":
        given["engine_dir"] = source.parent / "engine"
    if config.serving.runtime == "reference":
        given["checkpoint_dir"] = source.parent / "checkpoint"  # not here: nothing in it matters
    write_repository(render_repository(config, tokenizer_dir=source, **given), source.parent / "models")
    return source.parent / "models"


@by_row
def test_what_executes_it(row: Row, source: Path) -> None:
    models = generated(config_of(row, source), source)
    found = {
        file.parent.name: runtimes.runtime_of(file.parent, pbtxt.load(file)) for file in models.glob("*/config.pbtxt")
    }
    assert found == row.models
    assert [str(need).split(" needs the ")[1] for need in runtimes.needs_of(models)] == row.needs


@by_row
def test_the_container(row: Row, source: Path) -> None:
    config = config_of(row, source)
    models = generated(config, source)
    if row.image is None:
        with pytest.raises(InputError, match=r"trtkit beside the server|Python package onnxruntime.* has none"):
            docker_target.render(config, models)
        return
    argv = docker_target.render(config, models).argv()
    (image,) = [word for word in argv if word.startswith("nvcr.io")]
    assert image == f"nvcr.io/nvidia/tritonserver:26.07{row.image}"
    served = {"tensorrtllm": source.parent / "engine"}.get(row.runtime, source)
    mounted = [argv[index + 1] for index, word in enumerate(argv) if word == "--mount"]
    expected = [models, served] if row.runtime in LLM_RUNTIMES else [models]
    assert mounted == [f"type=bind,source={folder},target={folder},readonly" for folder in expected]
    assert argv[argv.index("--shm-size") + 1] == "2g"
    assert "mpirun" not in argv


@by_row
def test_only_engines_run_under_mpi(row: Row, source: Path) -> None:
    config = config_of(row, source, more="checkpoint: {tp: 2, pp: 2}\n", deploy="gpus: '0,1,2,3'")
    if row.image is None:
        return
    argv = docker_target.render(config, generated(config, source)).argv()
    assert argv.count(":") == (3 if row.runtime == "tensorrtllm" else 0)
    holder = "llm" if row.topology == "fused" else "tensorrt_llm"
    assert argv.count(f"--load-model={holder}") == (3 if row.runtime == "tensorrtllm" else 0)
    few = config_of(row, source, more="checkpoint: {tp: 2, pp: 2}\n", deploy="gpus: '0,1'")
    if row.runtime in LLM_RUNTIMES:
        with pytest.raises(InputError, match="names 2 GPUs, and tp times pp needs 4"):
            docker_target.render(few, source.parent / "models")
    else:
        assert '"device=0,1"' in docker_target.render(few, source.parent / "models").argv()


def test_a_container_without_gpus(source: Path) -> None:
    row = ROWS[-1]
    config = config_of(row, source, deploy="gpus: none")
    assert "--gpus" not in docker_target.render(config, generated(config, source)).argv()
    with pytest.raises(InputError, match=r"deploy.gpus is 'none', and runtime 'vllm' needs GPUs"):
        config_of(ROWS[6], source, deploy="gpus: none")


@by_row
def test_a_repository_for_another_container(row: Row, source: Path) -> None:
    models = generated(config_of(row, source), source)
    for other in ROWS:
        if other.image is None or not row.needs:
            continue
        config = config_of(other, source)
        if other.image == row.image:
            runtimes.check_container(models, other.runtime)
            continue
        with pytest.raises(InputError, match=rf"needs the {row.needs[0]}, and the container for runtime"):
            runtimes.check_container(models, other.runtime)
        own = config.model_copy(update={"deploy": config.deploy.model_copy(update={"image": "r.example/a:1"})})
        assert docker_target.render(own, models).image == "r.example/a:1"  # whose owner knows


@by_row
def test_the_local_server(row: Row, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = generated(config_of(row, source), source)
    (tmp_path / "backends" / "python").mkdir(parents=True)
    server = Server(tmp_path / "tritonserver", tmp_path / "backends")
    here = {"trtkit", "onnxruntime"}
    monkeypatch.setattr(runtimes, "find_spec", lambda name: name if name in here else None)
    if not row.needs or (row.needs[0].split()[-1] in here and "package" in row.needs[0]):
        runtimes.check_local(models, server)
        here.clear()
    if not row.needs:
        runtimes.check_local(models, server)
        return
    with pytest.raises(LacksError, match=f"needs the {row.needs[0]}, which is not on this machine") as refused:
        runtimes.check_local(models, server)
    assert "--target docker" in refused.value.fix or "trtkit[local]" in refused.value.fix
    name = row.needs[0].split()[-1]
    here.add(name)
    (tmp_path / "backends" / name).mkdir()
    runtimes.check_local(models, server)


def test_up_and_plan_refuse_what_the_local_server_cannot(source: Path, tritonserver: str) -> None:
    config = config_of(ROWS[5], source)
    spec = local.spec_from_config(config, generated(config, source))
    spec = local.ServerSpec(spec.name, spec.repository, tritonserver=tritonserver)
    for act in (local.plan, local.up):
        with pytest.raises(LacksError, match="model 'llm' needs the Python package tensorrt_llm"):
            act(spec)


def test_what_cannot_be_read_is_left_to_the_server(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.pbtxt").write_text("nonsense: {")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "config.pbtxt").write_text('platform: "onnxruntime_onnx"')
    assert [str(need) for need in runtimes.needs_of(tmp_path)] == ["model 'two' needs the backend onnxruntime"]


# Response cache and rate limiter

FEATURES = [
    ("", "", []),
    ("response_cache: true", "", ["--cache-config=local,size=67108864"]),
    ("response_cache: true", "response_cache_bytes: 1048576", ["--cache-config=local,size=1048576"]),
    ("rate_limiter: {priority: 2}", "", ["--rate-limit=execution_count"]),
    (
        "rate_limiter: {resources: {slots: 2, memory: 1}}",
        "rate_limit_resources: {slots: 4}",
        ["--rate-limit=execution_count", "--rate-limit-resource=slots:4"],
    ),
]


@pytest.mark.parametrize(("serving", "deploy", "arguments"), FEATURES)
def test_features_reach_the_server_of_both_targets(
    serving: str, deploy: str, arguments: list[str], source: Path, tritonserver: str
) -> None:
    config = config_of(ROWS[-1], source, serving, deploy=deploy)
    models = generated(config, source)
    spec = local.spec_from_config(config, models)
    local_argv = local.plan(local.ServerSpec("m", models, tritonserver=tritonserver, features=spec.features))
    assert list(features_of(config)) == arguments
    for argv in (local_argv, docker_target.render(config, models).argv()):
        assert [word for word in argv if word.startswith(("--cache-config", "--rate-limit"))] == arguments


@pytest.mark.parametrize(
    ("serving", "deploy", "said"),
    [
        ("", "rate_limit_resources: {slots: 1}", "deploy.rate_limit_resources needs serving.rate_limiter"),
        (
            "rate_limiter: {resources: {slots: 2}}", "rate_limit_resources: {slots: 1}",
            r"rate_limit_resources.slots \(1\) is less than one execution takes",
        ),
        ("", "response_cache_bytes: 3", "response_cache_bytes.*1048576"),
    ],
)  # fmt: skip
def test_features_that_cannot_be(serving: str, deploy: str, said: str, source: Path) -> None:
    with pytest.raises(InputError, match=said):
        config_of(ROWS[-1], source, serving, deploy=deploy)


def test_a_hub_model_that_was_never_downloaded_is_refused_by_up(
    docker: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with (docker / "images").open("a") as images:
        images.write("\nnvcr.io/nvidia/tritonserver:26.07-vllm-python-py3")
    text = "name: m\nmodel: {source: some/model}\nserving: {runtime: vllm}\ndeploy: {target: docker}\n"
    config = parse_config(text)
    models = generated(config, source)
    assert [one.id for one in docker_target.render(config, models).findings] == ["TK763"]
    with pytest.raises(InputError, match=r"'some/model' .* is not in the hub's cache") as refused:
        docker_target.up(config, models)
    assert refused.value.fix == "download it: hf download some/model"
    (tmp_path / "cache" / "models--some--model" / "refs" / "main").mkdir(parents=True)
    assert docker_target.up(config, models).ready
    (run,) = [words for line in (docker / "calls").read_text().splitlines() if (words := json.loads(line))[0] == "run"]
    assert [run[index + 1] for index, word in enumerate(run) if word == "--env"] == [
        "HF_HUB_CACHE=/hub",
        "HF_HUB_OFFLINE=1",
    ]
    docker_target.down("m")
