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
    config = {"version": "1.2.1", "pretrained_config": {"mapping": {}}, "build_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "rank0.engine").write_bytes(b"1")
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
    assert not any("trtkit.start" in word for word in argv)
    detached = run.argv(start="abc")
    assert "--rm" not in detached and "--detach" in detached
    assert detached[detached.index("trtkit.start=abc") - 1] == "--label"
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
        ({}, {"host": "gpu-box.example"}, r"deploy.host 'gpu-box.example' is not an IP address"),
    ],
)
def test_what_cannot_be_rendered(models: Path, options: dict[str, Any], deploy: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        target.render(config(**deploy), models, **options)


@pytest.mark.skipif(REAL_DOCKER is None, reason="no docker command")
@pytest.mark.parametrize("gpus", ["all", "0", "0,1"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0"])  # noqa: S104 - no engine listens
def test_the_real_command_understands_every_option(models: Path, engine: Path, gpus: str, host: str) -> None:
    """No engine is asked: at this address there can be none. The parser comes first and refuses what is wrong."""
    argv = target.render(config(gpus=gpus, host=host), models, engine, user="1:1").argv(start="abc")
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
    (stop,) = [words for words in calls(docker) if words[0] == "stop"]
    assert stop[:3] == ["stop", "-t", "15"]
    assert len(stop[3]) == 64  # its id: the name may be somebody else's by now
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


def foreign(docker: Path) -> Path:
    """A container of somebody else under the name that a deployment 'm' wants: of another user's trtkit, even."""
    file = docker / "containers" / "trtkit-m.json"
    container = {"id": "f" * 64, "labels": {"trtkit.start": "theirs"}, "pid": 0, "running": True, "code": 0, "log": "x"}
    file.write_text(json.dumps(container))
    return file


def test_a_taken_name_costs_nobody_their_server(docker: Path, models: Path) -> None:
    file = foreign(docker)
    before = file.read_text()
    with pytest.raises(InputError, match=r"another container.* is called trtkit-m") as refused:
        target.up(config(), models)
    assert "another --name" in refused.value.fix
    assert file.read_text() == before
    assert target.status("m").phase == "failed"
    assert not [words for words in calls(docker) if words[0] in ("rm", "stop", "logs")]


def test_a_name_that_somebody_took_over_is_theirs(docker: Path, models: Path) -> None:
    target.up(config(), models)
    subprocess.run(["docker", "rm", "--force", "trtkit-m"], check=True)
    file = foreign(docker)
    before = file.read_text()
    assert target.down("m").reason == "its container is gone"
    assert target.status("m").phase == "crashed"
    assert list(target.logs("m", 5)) == []
    assert file.read_text() == before


def test_what_docker_refuses_is_passed_on(docker: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FATE", "broken")
    with pytest.raises(LacksError, match=r"could not start trtkit-m: .*could not select device driver") as lacking:
        target.up(config(), models)
    assert "NVIDIA Container Toolkit" in lacking.value.fix
    assert list((docker / "containers").iterdir()) == []


@pytest.mark.parametrize("fate", ["exit", "mute", "broken"])
def test_a_log_that_cannot_be_kept_keeps_no_container_alive(
    docker: Path, models: Path, monkeypatch: pytest.MonkeyPatch, state_folder: Path, fate: str
) -> None:
    monkeypatch.setenv("STANDIN_FATE", fate)
    (state_folder / "deployments" / "m" / "server.log").mkdir(parents=True)  # a folder is no file to write to
    with pytest.raises((CheckFailedError, LacksError), match=r"exited|not ready|could not start"):
        target.up(config(ready_timeout_s=0.5), models)
    assert list((docker / "containers").iterdir()) == []
    assert target.status("m").phase == "failed"


def test_down_without_a_log(docker: Path, models: Path, state_folder: Path) -> None:
    target.up(config(), models)
    (state_folder / "deployments" / "m" / "server.log").mkdir()
    stopped = target.down("m")
    assert stopped.phase == "stopped" and "log could not be kept" in stopped.reason
    assert list((docker / "containers").iterdir()) == []


def test_a_docker_that_dies_meanwhile_leaves_a_container_that_down_removes(
    docker: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> list[str]:
        (docker / "dead").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target.readiness, "not_ready", die)
        with pytest.raises(KeyboardInterrupt):
            target.up(config(), models)
    (docker / "dead").unlink()
    record = state.read(state.folder_of("m"))
    assert record is not None and "did not remove its container" in record["reason"]
    assert target.down("m").phase == "stopped"
    assert list((docker / "containers").iterdir()) == []


def test_localhost_is_published_on_its_address(docker: Path, models: Path) -> None:
    deployment = target.up(config(host="localhost"), models)
    assert (deployment.host, deployment.ready) == ("127.0.0.1", True)
    (run,) = [words for words in calls(docker) if words[0] == "run"]
    assert f"127.0.0.1:{deployment.http_port}:8000" in run


def test_every_address(docker: Path, models: Path) -> None:
    deployment = target.up(config(host="0.0.0.0"), models)  # noqa: S104 - the stand-in listens on loopback
    assert deployment.ready and deployment.http_url == f"http://127.0.0.1:{deployment.http_port}"
    (run,) = [words for words in calls(docker) if words[0] == "run"]
    assert f"0.0.0.0:{deployment.http_port}:8000" in run


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
        with pytest.raises(InputError, match="looks for the engine at '/engine'"):
            act(config(), models)
    assert state.names() == []
