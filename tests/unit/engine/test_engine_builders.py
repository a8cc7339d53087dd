from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit.config import BuildConfig, CheckpointConfig, DeployConfig, EngineConfig, ModelConfig
from trtkit.docker_cli import Mount
from trtkit.engine.builders import MANIFEST, BuildCommand, compile_into, plan_build, run_build
from trtkit.engine_files import read_engine
from trtkit.errors import InputError, LacksError, TrtkitError

MakeCheckpoint = Callable[..., Path]
BUILDERS = ["local", "docker"]
IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"


def config(
    builder: Any = "local", *, tp: int = 1, pp: int = 1, engine: dict[str, Any] | None = None, **deploy: Any
) -> BuildConfig:
    return BuildConfig(
        name="small",
        model=ModelConfig(source="small"),
        checkpoint=CheckpointConfig(tp=tp, pp=pp),
        engine=EngineConfig(builder=builder, **(engine or {})),
        deploy=DeployConfig(**deploy),
    )


class Case(NamedTuple):
    command: BuildCommand
    out: Path
    standins: Any


@pytest.fixture(params=BUILDERS)
def case(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint, standins: Any, tmp_path: Path) -> Case:
    """A build of two ranks, by each builder."""
    out = tmp_path / "out" / "engine"
    command = plan_build(config(request.param, tp=2), make_checkpoint(tp=2), out, user="1000:1000")
    return Case(command, out, standins)


def leftovers(case: Case) -> list[str]:
    """What a failed build left, besides the log."""
    names = {entry.name for entry in case.out.parent.iterdir()} - {"engine.log"}
    return sorted(names | {entry.name for entry in case.standins.containers.iterdir()})


# Planning


def test_local_plan_is_one_command_that_a_shell_would_understand(tmp_path: Path) -> None:
    command = plan_build(config(), "relative", tmp_path / "e n")
    assert command.argv[:5] == [
        "trtllm-build", "--checkpoint_dir", str(Path("relative").absolute()), "--output_dir", f"{tmp_path}/e n",
    ]  # fmt: skip
    assert shlex.split(command.line) == ["PYTHONUNBUFFERED=1", *command.argv]
    assert command.image is None


def test_docker_plan_spells_out_everything() -> None:
    plan = plan_build(config("docker", gpus="0,1", shm_size="4g", engine={"workers": 2}), "/c", "/e", user="7:8")
    assert plan.line.startswith(
        "docker run --rm --init --name trtkit-build-small --gpus '\"device=0,1\"' --shm-size 4g --ulimit memlock=-1 "
        "--ulimit stack=67108864 --user 7:8 --env PYTHONUNBUFFERED=1 --env HOME=/tmp --env USER=trtkit "
        "--mount type=bind,source=/c,target=/checkpoint,readonly --mount type=bind,source=/e,target=/engine "
        f"--workdir /tmp {IMAGE} trtllm-build --checkpoint_dir /checkpoint --output_dir /engine "
        "--output_timing_cache /engine/model.cache --workers 2 "
    )


def test_planning_changes_nothing_and_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for builder in BUILDERS:
        plan_build(config(builder), tmp_path / "no checkpoint yet", tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_an_image_of_ones_own_replaces_the_releases() -> None:
    assert (
        "registry.local/triton:mine" in plan_build(config("docker", image="registry.local/triton:mine"), "c", "e").argv
    )


def test_root_stays_root() -> None:
    assert "--user" not in plan_build(config("docker"), "/c", "/e", user="").argv
    mine = plan_build(config("docker"), "/c", "/e").user
    assert mine == ("" if os.getuid() == 0 else f"{os.getuid()}:{os.getgid()}")


@settings(deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1))
def test_mount_paths_survive_any_character(name: str) -> None:
    """Docker reads the value with Go's encoding/csv; Python's reader follows the same rules on one line."""
    mount = Mount(Path("/data") / name.replace("/", "_"), "/checkpoint", True)
    fields = next(csv.reader([mount.option()], strict=True))
    assert fields == ["type=bind", f"source={mount.source}", "target=/checkpoint", "readonly"]


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (config("docker", gpus="0", engine={"workers": 2}), "engine.workers (2)"),
        (config(release="24.12"), "too old"),
        (config(engine={"reduce_fusion": True}), "checkpoint.tp is 1"),
        (config(engine={"kv_cache_type": "continuous"}), "kv_cache_type is continuous"),
    ],
)
def test_wrong_settings_fail_when_planning(wrong: BuildConfig, cause: str) -> None:
    with pytest.raises(InputError) as caught:
        plan_build(wrong, "/c", "/e")
    assert cause in caught.value.cause
    assert caught.value.fix


# Running


def test_a_build_publishes_a_whole_engine(case: Case) -> None:
    lines: list[str] = []
    engine = run_build(case.command, on_line=lines.append, checkpoint_digest="abc")
    assert lines[0] == "[TensorRT-LLM] TensorRT-LLM version: 1.2.1"
    assert lines == (case.out.parent / "engine.log").read_text().splitlines()
    assert (engine.version, engine.tp, engine.pp, engine.path) == ("1.2.1", 2, 1, case.out)
    assert engine.build["max_batch_size"] == case.command.settings.max_batch_size
    files = {entry.name for entry in case.out.iterdir()}
    assert files == {"config.json", "rank0.engine", "rank1.engine", "model.cache", MANIFEST}
    manifest = json.loads((case.out / MANIFEST).read_text())
    assert (manifest["checkpoint"], manifest["release"], manifest["tensorrt_llm"]) == ("abc", "26.07", "1.2.1")
    assert manifest["builder"] == case.command.builder
    assert leftovers(case) == ["engine"]
    assert case.standins.seen[:2] == ["--checkpoint_dir", str(case.command.checkpoint_dir)]


def test_what_runs_differs_from_the_plan_in_two_words_only(case: Case) -> None:
    run_build(case.command)
    ran = json.loads((case.out / MANIFEST).read_text())["argv"]
    planned = case.command.argv
    assert len(ran) == len(planned)
    changed = [(old, new) for old, new in zip(planned, ran, strict=True) if old != new]
    if case.command.builder == "docker":
        (old_name, new_name), (old_mount, new_mount) = changed
        assert new_name.startswith(f"{old_name}-")
        assert old_mount.replace(str(case.out), "X") == "type=bind,source=X,target=/engine"
        assert new_mount.startswith(f"type=bind,source={case.out.parent}/.engine.tmp-")
    else:
        assert [old for old, _ in changed] == [str(case.out), f"{case.out}/model.cache"]


def test_an_existing_engine_is_kept_unless_told(case: Case) -> None:
    run_build(case.command)
    before = (case.out / MANIFEST).stat().st_ino
    with pytest.raises(InputError, match="exists already"):
        run_build(case.command)
    assert (case.out / MANIFEST).stat().st_ino == before
    case.standins.fail("unknown")
    with pytest.raises(TrtkitError):
        run_build(case.command, replace=True)
    assert (case.out / MANIFEST).stat().st_ino == before  # a failed rebuild costs no finished work
    case.standins.fail("")
    run_build(case.command, replace=True)
    assert (case.out / MANIFEST).stat().st_ino != before
    assert leftovers(case) == ["engine"]


def test_a_caller_can_publish_by_itself(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    assert compile_into(case.command, folder, log=tmp_path / "build.log").tp == 2
    assert (tmp_path / "build.log").is_file()
    assert not case.out.exists()


@pytest.mark.parametrize(
    ("failure", "kind", "cause", "fix"),
    [
        ("oom", TrtkitError, "Requested amount of GPU memory", "engine.max_batch_size"),
        ("tensors", InputError, "Required but not provided tensors", "trtkit verify"),
        ("unknown", TrtkitError, "exit status 7", "engine.log"),
        ("killed", LacksError, "killed by SIGKILL", "host memory"),
        ("version", InputError, "trtllm-build is TensorRT-LLM 9.9.9, the release has 1.2.1", "deploy.release"),
        ("rank", TrtkitError, "rank1.engine is missing", "log"),
        ("mapping", TrtkitError, "tensor-parallel size is 1, the checkpoint's is 2", "log"),
    ],
)
def test_failures_say_why_and_leave_only_the_log(
    case: Case, failure: str, kind: type[TrtkitError], cause: str, fix: str
) -> None:
    case.standins.fail(failure)
    with pytest.raises(TrtkitError) as caught:
        run_build(case.command)
    assert type(caught.value) is kind
    assert cause in caught.value.cause
    assert fix in caught.value.fix
    assert leftovers(case) == []
    assert (case.out.parent / "engine.log").read_text()


def test_an_error_quotes_the_last_lines(case: Case) -> None:
    case.standins.fail("unknown")
    with pytest.raises(TrtkitError) as caught:
        run_build(case.command)
    quoted = caught.value.cause.splitlines()[1:]
    assert quoted == [f"| [TRT-LLM] [I] line {number}" for number in range(994, 1000)]


def test_trtllm_build_of_another_version_line(make_checkpoint: MakeCheckpoint, standins: Any, tmp_path: Path) -> None:
    command = plan_build(config(release="25.02"), make_checkpoint(), tmp_path / "engine")
    standins.set(STANDIN_VERSION="0.17.0")  # 0.17.0.post1 of the release, give or take its suffix
    assert run_build(command).version == "0.17.0"


@pytest.mark.parametrize(
    ("failure", "image", "kind", "fix"),
    [
        ("daemon", None, LacksError, "start Docker"),
        ("", "nvcr.io/nvidia/tritonserver:99.99-trtllm-python-py3", InputError, "deploy.image"),
    ],
)
def test_docker_failures(
    make_checkpoint: MakeCheckpoint, standins: Any, tmp_path: Path, failure: str, image: str, kind: type, fix: str
) -> None:
    standins.fail(failure)
    command = plan_build(config("docker", image=image), make_checkpoint(), tmp_path / "engine")
    with pytest.raises(kind) as caught:
        run_build(command)
    assert fix in caught.value.fix


@pytest.mark.parametrize(("builder", "program"), [("local", "trtllm-build"), ("docker", "docker")])
def test_a_missing_program_is_named(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builder: str, program: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command = plan_build(config(builder), make_checkpoint(), tmp_path / "engine")
    with pytest.raises(LacksError, match=f"{program} is not on PATH"):
        run_build(command)


def test_the_checkpoint_is_checked_before_anything_runs(
    make_checkpoint: MakeCheckpoint, standins: Any, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tp=2, architecture="Qwen2ForCausalLM")
    with pytest.raises(InputError, match="TP 2 and PP 1, the build config says TP 1 and PP 1"):
        run_build(plan_build(config(), checkpoint, tmp_path / "engine"))
    fused = config(tp=2, engine={"reduce_fusion": True})
    with pytest.raises(InputError, match="does nothing for Qwen2ForCausalLM"):
        run_build(plan_build(fused, checkpoint, tmp_path / "engine"))
    (checkpoint / "rank1.safetensors").unlink()
    with pytest.raises(InputError, match=r"rank1\.safetensors is missing"):
        run_build(plan_build(config(tp=2), checkpoint, tmp_path / "engine"))
    assert not (standins.folder / "seen").exists()


def test_a_full_disk_is_noticed_before_the_build(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(case.out.parents[1])._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(LacksError, match="GB free"):
        run_build(case.command)


# Stopping


def test_whatever_stops_us_stops_the_build(case: Case) -> None:
    """Also the container, which outlives the docker command line, and the workers."""
    case.standins.fail("hang")

    def stop(line: str) -> None:
        if "compiling" in line:
            assert len(case.standins.living()) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_build(case.command, on_line=stop)
    assert case.standins.living(10) == []
    assert leftovers(case) == []


DRIVER = """
import signal, sys
from pathlib import Path
from trtkit.config_file import load_config
from trtkit.docker_cli import Mount
from trtkit.engine.builders import plan_build, run_build
signal.signal(signal.SIGTERM, signal.default_int_handler)
config, checkpoint, out = sys.argv[1:]
try:
    run_build(plan_build(load_config(config), checkpoint, out), on_line=lambda line: print(line, flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def driver(tmp_path: Path, make_checkpoint: MakeCheckpoint, standins: Any) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that builds, up to the point where trtllm-build hangs."""
    standins.fail("hang")
    file = tmp_path / "small.yaml"
    file.write_text("name: small\nmodel: {source: small}\nengine: {builder: docker}\n")
    argv = [sys.executable, "-c", DRIVER, str(file), str(make_checkpoint()), str(tmp_path / "out" / "engine")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(60, process.kill)  # never hang the test run
        timer.start()
        assert process.stdout is not None
        assert any("compiling" in line for line in process.stdout)
        yield process
        process.kill()
        timer.cancel()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(driver: subprocess.Popen[str], standins: Any, tmp_path: Path, number: signal.Signals) -> None:
    assert len(standins.living()) == 2
    driver.send_signal(number)
    assert driver.wait(60) == 130
    assert standins.living(10) == []
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["engine.log"]


# Reading


def test_read_engine_names_what_is_wrong(tmp_path: Path) -> None:
    def expect(cause: str) -> None:
        with pytest.raises(InputError, match=cause):
            read_engine(tmp_path)

    expect("holds no engine: no config.json in it")
    for text, cause in (("[]", "something else"), ("3", "something else"), ("{}", "something else")):
        (tmp_path / "config.json").write_text(text)
        expect(f"holds {cause} and no engine")
    (tmp_path / "config.json").write_text('{"architecture": "x"}')
    expect("holds a checkpoint and no engine")
    for text in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        expect("cannot read .*config.json")
    for version, pretrained in ((3, {"mapping": {}}), ("1", []), ("1", {"mapping": []}), ("1", {})):
        whole = {"version": version, "pretrained_config": pretrained, "build_config": {}}
        (tmp_path / "config.json").write_text(json.dumps(whole))
        expect("is no engine's")
    for size in ([2], 0, -1, "2", None, True, 1.5):
        whole = {"version": "1", "pretrained_config": {"mapping": {"tp_size": size}}, "build_config": {}}
        (tmp_path / "config.json").write_text(json.dumps(whole))
        expect("mapping.tp_size is .*, no positive integer")
    mapping = {"tp_size": 2, "pp_size": 1, "world_size": 2}
    config = {"version": "1.2.1", "pretrained_config": {"mapping": mapping}, "build_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expect("rank0.engine is missing or empty")
    (tmp_path / "rank0.engine").write_bytes(b"1")
    (tmp_path / "rank1.engine").write_bytes(b"")
    expect("rank1.engine is missing or empty")
    (tmp_path / "rank1.engine").write_bytes(b"22")
    assert read_engine(tmp_path).nbytes == 3
