"""`trtkit demo`, for real: what it makes, what it prints, and that nothing survives it however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from trtkit import hf
from trtkit.checkpoint import open_checkpoint
from trtkit.config_file import load_config, ready_made_configs
from trtkit.convert.verify import verify
from trtkit.repository.lint import lint_repository

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.xdist_group("demo")]
SOURCE = load_config(ready_made_configs()["tiny-llama"]).model.source


def demo(folder: Path, state: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trtkit", "demo", "--output", str(folder), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRTKIT_STATE_DIR": str(state)},
        start_new_session=True,  # Ctrl-C in the terminal that runs the tests is not meant for it
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines of all processes that have to do with a demo: its server and all that belongs to it."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.cwd()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(str(folder) in word for word in words):
            found.append(shlex.join(process.cmdline()))
    return found


def wait_until_none(folder: Path, seconds: float = 40) -> list[str]:
    deadline = time.monotonic() + seconds
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def assert_whole_or_absent(folder: Path) -> None:
    """Every artifact under its final name is complete."""
    if (folder / "checkpoint").exists():
        assert verify(hf.open_source(SOURCE), open_checkpoint(folder / "checkpoint")).passed
    if (folder / "model_repository").exists():
        assert [f for f in lint_repository(folder / "model_repository") if f.severity == "error"] == []
    if (folder / "report.html").exists():
        assert (folder / "report.html").read_text().rstrip().endswith("</html>")
    if (folder / "report.json").exists():
        json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One whole demo."""
    folder = tmp_path_factory.mktemp("demo")
    started = time.monotonic()
    process = demo(folder / "out", folder / "state", "--json")
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == 0, stderr
    assert processes_of(folder) == []
    yield {
        "folder": folder / "out",
        "result": json.loads(stdout),
        "stderr": stderr,
        "seconds": time.monotonic() - started,
    }


def test_demo_does_the_whole_chain(finished: dict[str, Any]) -> None:
    result = finished["result"]
    assert [check["outcome"] for check in result["checks"]] == ["passed"] * len(result["checks"])
    assert {check["name"] for check in result["checks"]} >= {"contract", "parity", "text", "streaming", "bad_requests"}
    assert [load["scenario"]["name"] for load in result["loadtests"]] == ["closed", "open"]
    for load in result["loadtests"]:
        assert load["errors"] == []
        assert load["counts"]["ok"] > 0
        assert load["throughput"]["output_unit"] == "tokens"
        assert load["latency"]["ttft"]["p50"] > 0
    assert len(result["steps"]) == 11


def test_demo_leaves_what_it_promised(finished: dict[str, Any]) -> None:
    folder = finished["folder"]
    assert_whole_or_absent(folder)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"checkpoint", "model_repository", "report.html", "report.json", "server.log"}
    checkpoint = open_checkpoint(folder / "checkpoint")
    assert (checkpoint.config["dtype"], checkpoint.tp) == ("float16", 2)
    assert json.loads((folder / "report.json").read_text())["checks"] == finished["result"]["checks"]


def test_demo_shows_its_progress(finished: dict[str, Any]) -> None:
    for words in ("convert it to a TRT-LLM checkpoint", "start Triton", "validate", "load test 'closed'", "no process"):
        assert words in finished["stderr"]


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "precious").write_text("mine")
    process = demo(tmp_path, tmp_path / "state")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "is not an earlier demo's" in stderr
    assert (tmp_path / "checkpoint" / "precious").read_text() == "mine"


@pytest.mark.parametrize("round_number", range(5))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_killed_at_a_random_moment(
    number: signal.Signals,
    round_number: int,
    finished: dict[str, Any],
    tmp_path: Path,
    record_property: Any,
    request: pytest.FixtureRequest,
) -> None:
    """The moment follows from the seed of the whole run, which pytest-randomly prints at its beginning, and from the
    name of the test: `--randomly-seed=N` kills at the same share of the demo's length again."""
    seed = f"{request.config.getoption('randomly_seed', 0)} {request.node.name}"
    share = random.Random(seed).uniform(0.05, 0.95)
    moment = share * finished["seconds"]
    told = f"{number.name} after {moment:.2f} s of about {finished['seconds']:.1f} s ({share:.1%}, seed '{seed}')"
    record_property("moment", told)
    print(told)  # noqa: T201 - shown where the test fails
    process = demo(tmp_path / "out", tmp_path / "state")
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    left = wait_until_none(tmp_path)
    assert left == []
    assert_whole_or_absent(tmp_path / "out")
    if process.returncode not in (0, -signal.SIGKILL):
        assert process.returncode == (130 if "interrupted" in stderr else -number), stderr
        assert "Traceback" not in stderr
        assert not list(tmp_path.glob("out/.*tmp-*"))


def test_kept_server_answers_as_printed_until_it_is_stopped(tmp_path: Path) -> None:
    state = tmp_path / "state"
    process = demo(tmp_path / "out", state, "--keep")
    stdout, stderr = process.communicate(timeout=280)
    environment = {**os.environ, "TRTKIT_STATE_DIR": str(state)}
    try:
        assert process.returncode == 0, stderr
        assert processes_of(tmp_path)
        for line in (line.strip() for line in stdout.splitlines()):
            if line.startswith("curl "):
                words = shlex.split(line)
                answer = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
                assert '"text_output":' in answer.stdout, answer
        snippet = stdout[stdout.index("  import numpy") : stdout.index("Or with trtkit:")]
        code = "\n".join(line[2:] for line in snippet.splitlines())
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 and done.stdout.startswith("[[b'"), done.stderr
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
        for options in ((), ("--keep",)):
            second = demo(tmp_path / "out", state, *options)
            assert "an earlier demo's server still runs" in second.communicate(timeout=60)[1]
            assert second.returncode == 2
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    finally:
        down = subprocess.run(
            [sys.executable, "-m", "trtkit", "deploy", "down", "trtkit-demo"], env=environment, timeout=60, check=False
        )
    assert down.returncode == 0
    assert wait_until_none(tmp_path) == []


def test_dry_run_touches_nothing(tmp_path: Path) -> None:
    process = demo(tmp_path / "out", tmp_path / "state", "--dry-run", "--json")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert any("model_repository" in step for step in json.loads(stdout))
    assert list(tmp_path.iterdir()) == []


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "out"
    out.mkdir()
    (out / ".trtkit-demo").touch()
    with (out / ".trtkit-demo").open("w") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        process = demo(out, state)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "another demo runs in" in stderr
    assert [path.name for path in out.iterdir()] == [".trtkit-demo"]
