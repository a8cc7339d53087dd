"""The docker target, against a strict stand-in, and where it is installed the real command's own parser."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from trtkit.config import BuildConfig
from trtkit.deploy import docker as target
from trtkit.deploy import state
from trtkit.errors import CheckFailedError, InputError, LacksError

REAL_DOCKER = shutil.which("docker")


def config(**deploy: Any) -> BuildConfig:
    parts = {"checkpoint": deploy.pop("checkpoint", {}), "serving": deploy.pop("serving", {})}
    return BuildConfig.model_validate({"name": "m", "model": {"source": "a/b"}, "deploy": deploy, **parts})


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    folder = tmp_path / "an engine, with: marks"
    folder.mkdir()
    (folder / "config.json").write_text('{"pretrained_config": {}, "build_config": {}}')
    return folder


def calls(home: Path) -> list[list[str]]:
    return [json.loads(line) for line in (home / "calls").read_text().splitlines()]


def test_the_line(models: Path, engine: Path) -> None:
    run = target.render(
        config(http_port=9000, exit_timeout_s=30, shm_size="8g", gpus="0,1"),
        models,
        engine,
        model_path_in_container="/engine",
        pass_environment=["HF_TOKEN"],
        user="1000:1000",
    )
    argv = run.argv()
    image = argv.index("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3")
    assert argv[:3] == ["docker", "run", "--rm"]
    assert argv[argv.index("--gpus") + 1] == '"device=0,1"'
    assert [argv[i + 1] for i, word in enumerate(argv) if word == "--publish"] == [
        "127.0.0.1:9000:8000",
        "127.0.0.1:8001:8001",
        "127.0.0.1:8002:8002",
    ]
    assert [argv[i + 1] for i, word in enumerate(argv) if word == "--mount"] == [
        f"type=bind,source={models},target={models},readonly",
        f'type=bind,"source={engine}",target=/engine,readonly',
    ]
    assert argv[argv.index("--stop-timeout") + 1] == "35"
    assert argv[argv.index("--env") + 1] == "HF_TOKEN"
    assert argv[argv.index("--user") + 1] == "1000:1000"
    assert argv[image + 1 : image + 3] == ["tritonserver", f"--model-repository={models}"]
    assert "--rm" not in run.argv(detach=True)
    assert shlex.split(run.shell_line()) == argv


def test_a_rank_per_gpu(models: Path) -> None:
    argv = target.render(config(checkpoint={"tp": 2, "pp": 2}), models).argv()
    assert argv.count(":") == 3
    assert argv.count("--load-model=tensorrt_llm") == 3
    with pytest.raises(InputError, match="names 2 GPUs, and tp times pp needs 4"):
        target.render(config(checkpoint={"tp": 2, "pp": 2}, gpus="0,1"), models)


@pytest.mark.parametrize(
    ("options", "deploy", "said"),
    [
        ({}, {"serving": {"runtime": "reference"}}, "the reference runtime needs trtkit"),
        ({}, {"release": "99.01"}, "no release '99.01'"),
        ({"name": "../x"}, {}, "not a deployment name"),
        ({"pass_environment": ["HF_TOKEN=abc"]}, {}, "not the name of a variable"),
        ({"engine": "e", "model_path_in_container": "engine"}, {}, "not an absolute path"),
    ],
)
def test_what_cannot_be_rendered(models: Path, options: dict[str, Any], deploy: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        target.render(config(**deploy), models, **options)


@pytest.mark.skipif(REAL_DOCKER is None, reason="no docker command")
@pytest.mark.parametrize("gpus", ["all", "0", "0,1"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_real_command_understands_every_option(models: Path, engine: Path, gpus: str, host: str) -> None:
    """No engine is asked: at this address there can be none. The parser comes first and refuses what is wrong."""
    argv = target.render(config(gpus=gpus, host=host), models, engine, user="1:1").argv(detach=True)
    environment = {"PATH": os.environ["PATH"], "DOCKER_HOST": "tcp://127.0.0.1:1"}

    def said(arguments: list[str]) -> str:
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done.stderr

    assert "Cannot connect to the Docker daemon" in said(argv)
    assert 'invalid argument "type=bind' in said([word.replace(",readonly", ",readnever") for word in argv])


def test_up_status_logs_down(docker: Path, models: Path, engine: Path) -> None:
    told: list[str] = []
    deployment = target.up(config(), models, engine, on_progress=told.append)
    assert (deployment.ready, deployment.container, deployment.models) == (True, "trtkit-m", ("one", "two"))
    assert deployment.http_port not in (0, 8000)
    assert target.status("m").ready
    assert list(target.logs("m", 5)) == ["server says hello"]
    with pytest.raises(InputError, match=f"already has a container, trtkit-m at {deployment.http_url}"):
        target.up(config(), models, engine)
    assert target.down("m").phase == "stopped"
    assert target.down("m").phase == "stopped"
    assert list((docker / "containers").iterdir()) == []
    assert list(target.logs("m", 5)) == ["server says hello"]  # kept
    stops = [words for words in calls(docker) if words[0] == "stop"]
    assert stops == [["stop", "-t", "15", "trtkit-m"]]
    assert target.up(config(), models, engine).ready


def test_a_container_that_ends_is_quoted_and_removed(
    docker: Path, models: Path, monkeypatch: pytest.MonkeyPatch, state_folder: Path
) -> None:
    monkeypatch.setenv("STANDIN_FATE", "exit")
    with pytest.raises(CheckFailedError) as failed:
        target.up(config(), models)
    assert failed.value.cause.splitlines() == [
        "deployment 'm': the container exited with code 1",
        "  server: m: Internal: the engine is of another version",
    ]
    log = state_folder / "deployments" / "m" / "server.log"
    assert str(log) in failed.value.fix
    assert "another version" in log.read_text()
    assert list((docker / "containers").iterdir()) == []
    assert target.status("m").phase == "failed"


def test_a_container_that_never_answers_is_removed(docker: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FATE", "mute")
    with pytest.raises(CheckFailedError, match=r"not ready after 0.5 s, still waiting for server"):
        target.up(config(ready_timeout_s=0.5), models)
    assert list((docker / "containers").iterdir()) == []


def test_a_container_that_somebody_removed(docker: Path, models: Path) -> None:
    target.up(config(), models)
    subprocess.run(["docker", "rm", "--force", "trtkit-m"], check=True)
    after = target.status("m")
    assert (after.phase, after.reason) == ("crashed", "its container is gone")
    assert target.down("m").phase == "crashed"


def test_images_are_pulled_and_a_missing_one_is_named(docker: Path, models: Path) -> None:
    (docker / "registry").write_text("registry.example/triton:1")
    told: list[str] = []
    assert target.up(config(image="registry.example/triton:1"), models, on_progress=told.append).ready
    assert told[0].startswith("pulling registry.example/triton:1")
    with pytest.raises(LacksError, match=r"could not pull registry\.example/none:1"):
        target.up(config(image="registry.example/none:1"), models, name="other")


def test_what_docker_refuses_is_passed_on(docker: Path, models: Path) -> None:
    (docker / "containers" / "trtkit-m.json").write_text('{"pid": 0, "running": false, "code": 0, "log": ""}')
    with pytest.raises(LacksError, match=r'could not start trtkit-m: Conflict\. The container name "/trtkit-m"'):
        target.up(config(), models)


def test_no_docker_and_no_engine(docker: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (docker / "dead").touch()
    with pytest.raises(LacksError, match="Is the docker daemon running"):
        target.up(config(), models)
    monkeypatch.setattr(target.shutil, "which", lambda name: None)
    with pytest.raises(LacksError, match="no `docker` on PATH"):
        target.up(config(), models)


def test_a_taken_port_and_missing_folders(docker: Path, models: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LacksError, match=f"port {port} on 127.0.0.1: already in use"):
            target.up(config(http_port=port), models)
    with pytest.raises(InputError, match="no engine at"):
        target.up(config(), models, tmp_path / "none")
    assert state.names() == []


def test_render_warns_of_what_up_refuses(docker: Path, models: Path, tmp_path: Path) -> None:
    assert [one.cause for one in target.render(config(), models, tmp_path / "none").findings] == [
        f"no engine at {tmp_path / 'none'}"
    ]
    (models / "tensorrt_llm").mkdir()
    path = 'parameters { key: "gpt_model_path" value { string_value: "/engine" } }'
    (models / "tensorrt_llm" / "config.pbtxt").write_text(path)
    for act in (target.render, target.up):
        with pytest.raises(InputError, match="looks for an engine at '/engine'"):
            act(config(), models)
    assert state.names() == []
