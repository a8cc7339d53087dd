"""`trtkit deploy` as a user calls it, with stand-ins for tritonserver and docker."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

STANDINS = Path(__file__).parents[1] / "deploy"


class Machine:
    """A temporary state folder, a config, a repository, and `trtkit deploy` run among them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models = root / "models"
        (self.models / "one").mkdir(parents=True)
        self.config = root / "config.yaml"
        self.config.write_text("name: tiny\nmodel: {source: none/none}\nserving: {runtime: reference}\n")
        self.server = self._program("tritonserver", "standin_tritonserver.py")
        self.docker_home = root / "docker"
        (self.docker_home / "containers").mkdir(parents=True)
        (self.docker_home / "images").write_text("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3")
        docker = self._program("docker", "standin_docker_deploy.py")
        self.environment = {
            **os.environ,
            "TRTKIT_STATE_DIR": str(root / "state"),
            "TRITONSERVER": self.server,
            "STANDIN_DOCKER": str(self.docker_home),
            "PATH": f"{Path(docker).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def _program(self, name: str, module: str) -> str:
        path = self.root / f"{name}-bin" / name
        path.parent.mkdir()
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STANDINS / module}" "$@"\n')
        path.chmod(0o755)
        return str(path)

    def deploy(self, *args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trtkit", "deploy", *map(str, args)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=self.environment, cwd=self.root
        )

    def up(self, *args: object) -> subprocess.CompletedProcess[str]:
        return self.deploy("up", self.config, "--repository", "models", *args)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    assert machine.deploy("down", "--all").returncode == 0


def test_up_status_logs_down(machine: Machine) -> None:
    done = machine.up("--json")
    assert done.returncode == 0, done.stderr
    deployment = json.loads(done.stdout)
    assert (deployment["name"], deployment["ready"], deployment["models"]) == ("tiny", True, ["one"])
    assert any(word in done.stderr for word in ("opening", "loading", "starting"))  # where it is when it is looked at

    again = machine.up()
    assert (again.returncode, again.stdout) == (2, "")
    assert f"already running: HTTP {deployment['http_url']}" in again.stderr

    other = machine.up("--name", "other")
    assert other.returncode == 0
    assert "other: ready" in other.stdout
    assert "trtkit deploy down other" in other.stderr

    assert json.loads(machine.deploy("status", "tiny", "--json").stdout)["http_url"] == deployment["http_url"]
    assert [one["name"] for one in json.loads(machine.deploy("status", "--json").stdout)] == ["other", "tiny"]
    assert machine.deploy("status").stdout.count("ready") == 2
    assert machine.deploy("logs", "tiny", "-n", 1).stdout.endswith("\"successfully loaded 'one'\"\n")

    assert machine.deploy("down", "tiny").stdout == "tiny: stopped\n"
    assert machine.deploy("down", "tiny").stdout == "tiny: was not running (stopped)\n"
    unknown = machine.deploy("down", "tinny")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "did you mean 'tiny'?" in unknown.stderr
    assert machine.deploy("down", "--all").stdout == "other: stopped\n"
    assert machine.deploy("down", "--all").stdout == "nothing is running\n"
    assert machine.deploy("down").returncode == 2
    assert machine.deploy("down", "tiny", "--all").returncode == 2


def test_dry_run_and_render_say_the_same_and_change_nothing(machine: Machine) -> None:
    dry = machine.up("--dry-run")
    assert dry.returncode == 0, dry.stderr
    rendered = machine.deploy("render", machine.config, "--repository", "models")
    assert dry.stdout == rendered.stdout
    words = shlex.split(dry.stdout)
    assert words[:2] == [machine.server, f"--model-repository={machine.models}"]
    as_json = machine.deploy("render", machine.config, "--repository", "models", "--json")
    assert json.loads(as_json.stdout)["argv"] == words
    assert not (machine.root / "state").exists()


def test_failures_have_their_exit_codes(machine: Machine) -> None:
    assert machine.deploy("up", machine.config, "--repository", "none").returncode == 2
    (machine.models / "one" / "refuse").touch()
    failed = machine.up()
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "ValueError: refused on demand" in failed.stderr
    assert "fix: " in failed.stderr
    assert machine.up("--tritonserver", "/no/such").returncode == 2


def test_other_addresses_are_warned_about(machine: Machine) -> None:
    machine.config.write_text(machine.config.read_text() + "deploy: {host: 0.0.0.0}\n")
    done = machine.up()  # the stand-in refuses the address
    assert "warning: listening on 0.0.0.0 lets other machines in" in done.stderr
    assert done.returncode == 1


def test_docker_through_the_same_verbs(machine: Machine) -> None:
    machine.config.write_text("name: boxed\nmodel: {source: none/none}\ndeploy: {target: docker}\n")
    line = machine.deploy("render", machine.config, "--repository", "models")
    assert line.stdout.startswith("docker run --rm --init --name trtkit-boxed ")
    done = machine.up("--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["container"] == "trtkit-boxed"
    assert "docker" in machine.deploy("status").stdout
    assert machine.deploy("logs", "boxed").stdout == "server says hello\n"
    (machine.docker_home / "dead").touch()
    listed = machine.deploy("status")
    assert listed.returncode == 0
    assert "boxed: docker: Cannot connect to the Docker daemon" in listed.stderr
    assert machine.deploy("status", "boxed").returncode == 3
    (machine.docker_home / "dead").unlink()
    refused = machine.up("--target", "local")
    assert refused.returncode == 2
    assert "already running" in refused.stderr
    assert machine.deploy("down", "--all").stdout == "boxed: stopped\n"
    assert list((machine.docker_home / "containers").iterdir()) == []


def test_several_ranks_are_not_for_the_local_target(machine: Machine) -> None:
    machine.config.write_text("name: big\nmodel: {source: none/none}\ncheckpoint: {tp: 2}\n")
    done = machine.up()
    assert done.returncode == 2
    assert "needs 2 MPI ranks" in done.stderr


def test_a_host_that_is_none_is_refused_before_the_warning(machine: Machine) -> None:
    machine.config.write_text(machine.config.read_text() + "deploy: {host: no.such.host.invalid}\n")
    done = machine.up()
    assert done.returncode == 2
    assert "'no.such.host.invalid' is not an address" in done.stderr
    assert "warning" not in done.stderr


def test_down_dry_run_and_forget(machine: Machine) -> None:
    pid = json.loads(machine.up("--json").stdout)["pid"]
    assert machine.deploy("down", "tiny", "--dry-run").stdout == f"tiny: would stop process {pid}\n"
    assert machine.deploy("down", "--all", "--dry-run").stdout == f"tiny: would stop process {pid}\n"
    assert [one["pid"] for one in json.loads(machine.deploy("down", "--all", "--dry-run", "--json").stdout)] == [pid]
    assert machine.deploy("down", "none", "--dry-run").returncode == 2
    assert json.loads(machine.deploy("status", "tiny", "--json").stdout)["ready"]
    assert machine.deploy("down", "tiny").stdout == "tiny: stopped\n"
    assert machine.deploy("down", "tiny", "--dry-run").stdout == "tiny: is not running (stopped)\n"
    assert machine.deploy("down", "--all", "--dry-run").stdout == "nothing is running\n"
    forgotten = machine.deploy("down", "tiny", "--forget")
    assert (forgotten.returncode, forgotten.stderr) == (0, "tiny: forgotten\n")
    assert "nothing was deployed" in machine.deploy("status").stderr


def test_a_damaged_record_breaks_nothing(machine: Machine) -> None:
    folder = machine.root / "state" / "deployments" / "l3"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    assert machine.up().returncode == 0
    listed = machine.deploy("status")
    assert listed.returncode == 0
    assert "unknown" in listed.stdout
    assert f"its record {folder / 'state.json'} is damaged" in listed.stderr
    assert json.loads(machine.deploy("status", "l3", "--json").stdout)["phase"] == "unknown"
    assert machine.deploy("down", "--all").stdout == "tiny: stopped\n"
    assert machine.deploy("down", "l3", "--dry-run").stdout == "l3: would clear away its damaged record\n"
    assert machine.deploy("down", "l3").stdout == "l3: its damaged record was cleared away\n"
    gone = machine.deploy("down", "l3")
    assert gone.returncode == 2
    assert "did you mean" not in gone.stderr


def test_render_warns_of_an_engine_that_is_not_there(machine: Machine) -> None:
    machine.config.write_text("name: boxed\nmodel: {source: none/none}\ndeploy: {target: docker}\n")
    arguments = [machine.config, "--repository", "models", "--engine", "nosuch"]
    rendered = machine.deploy("render", *arguments)
    assert rendered.returncode == 0
    assert "warning: no engine at" in rendered.stderr
    assert rendered.stdout.startswith("docker run ")
    assert machine.deploy("up", *arguments).returncode == 2


def test_a_checkpoint_of_vllm_is_mounted_where_its_repository_looks(machine: Machine) -> None:
    machine.config.write_text("name: v\nmodel: {source: a/b}\nserving: {runtime: vllm}\ndeploy: {target: docker}\n")
    (machine.models / "vllm_model" / "1").mkdir(parents=True)
    (machine.models / "vllm_model" / "config.pbtxt").write_text('name: "vllm_model" backend: "vllm"')
    (machine.models / "vllm_model" / "1" / "model.json").write_text('{"model": "/models/checkpoint"}')
    arguments = [machine.config, "--repository", "models"]
    refused = machine.deploy("render", *arguments)
    assert refused.returncode == 2
    assert "looks for the checkpoint at '/models/checkpoint' (model), and none is given" in refused.stderr
    assert "fix: give --checkpoint DIR" in refused.stderr
    checkpoint = machine.root / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    more = ["--checkpoint", checkpoint, "--model-path-in-container", "/models/checkpoint", "--json"]
    rendered = machine.deploy("render", *arguments, *more)
    assert rendered.returncode == 0, rendered.stderr
    described = json.loads(rendered.stdout)
    assert described["image"] == "nvcr.io/nvidia/tritonserver:26.07-vllm-python-py3"
    assert f"type=bind,source={checkpoint},target=/models/checkpoint,readonly" in described["argv"]
    local = machine.deploy("render", *arguments, "--target", "local")
    assert local.returncode == 0, local.stderr  # the stand-in has no folder of backends that could lack one
