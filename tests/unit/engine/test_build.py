"""Builds through the artifact store, with stand-ins for trtllm-build and docker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from trtkit import build
from trtkit.config import BuildConfig
from trtkit.config_file import parse_config
from trtkit.engine_files import read_engine
from trtkit.errors import InputError, TrtkitError
from trtkit.store import ArtifactStore


def make_config(source: Path, **sections: Any) -> BuildConfig:
    data = {"name": "test", "model": {"source": str(source)}, "checkpoint": {"tp": 2}, **sections}
    return parse_config(yaml.safe_dump(data))


def steps_of(config: BuildConfig, store: ArtifactStore) -> tuple[list[str], build.Built]:
    steps: list[str] = []
    built = build.run(build.plan(config, store), store, on_step=lambda step: steps.append(step.split(" ")[0]))
    return steps, built


@pytest.mark.parametrize("builder", ["local", "docker"])
def test_builds_once(builder: str, make_source: Any, standins: Any, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    config = make_config(make_source(), engine={"builder": builder})
    with pytest.raises(InputError, match="no finished checkpoint"):
        build.find(config, store)
    steps, built = steps_of(config, store)
    assert steps == ["converting", "reading", "compiling"]
    assert (built.checkpoint_reused, built.engine_reused) == (False, False)
    assert built.engine_dir is not None
    engine = read_engine(built.engine_dir)
    assert (engine.tp, engine.version) == (2, "1.2.1")
    steps, again = steps_of(config, store)
    assert steps == []
    assert again == build.Built(built.checkpoint_dir, True, built.engine_dir, True)
    assert build.find(config, store) == again


def test_reference_runtime_has_no_engine(make_source: Any, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    steps, built = steps_of(make_config(make_source(), serving={"runtime": "reference"}), store)
    assert steps == ["converting", "reading"]
    assert built.engine_dir is None


def test_each_input_makes_another_artifact(make_source: Any, edit_config: Any, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    source = make_source()

    def folders(config: BuildConfig) -> tuple[Path, Path | None]:
        planned = build.plan(config, store)
        return planned.checkpoint_dir, planned.engine_dir

    first = folders(make_config(source))
    assert folders(make_config(source, deploy={"http_port": 8000})) == first
    other_engine = folders(make_config(source, engine={"max_input_len": 99}))
    assert other_engine[0] == first[0] and other_engine[1] != first[1]
    assert folders(make_config(source, deploy={"release": "25.12"}))[1] != first[1]
    assert folders(make_config(source, checkpoint={"tp": 4}))[0] != first[0]
    edit_config(source, rope_theta=3.0)
    assert folders(make_config(source))[0] != first[0]


def test_failed_engine_keeps_the_checkpoint(make_source: Any, standins: Any, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    config = make_config(make_source(), engine={"builder": "local"})
    standins.fail("oom")
    with pytest.raises(TrtkitError):
        steps_of(config, store)
    standins.fail("")
    steps, built = steps_of(config, store)
    assert steps == ["compiling"]
    assert built.checkpoint_reused and not built.engine_reused
    assert not list((tmp_path / "store").glob("*/.*.tmp-*"))


def test_uneven_stages_need_a_release_that_keeps_all_layers(make_source: Any, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    source = make_source(num_hidden_layers=5)
    build.plan(make_config(source, checkpoint={"pp": 2}), store)
    with pytest.raises(InputError, match="drops layers"):
        build.plan(make_config(source, checkpoint={"pp": 2}, deploy={"release": "25.01"}), store)


def test_command_line(make_source: Any, standins: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_config(make_source(), engine={"builder": "local"}).model_dump(mode="json")))
    words = [sys.executable, "-m", "trtkit", "build", str(config), "--store", str(tmp_path / "store")]
    dry = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, check=False, timeout=60)
    assert dry.returncode == 0, dry.stderr
    assert "trtllm-build --checkpoint_dir" in dry.stdout
    assert not (tmp_path / "store").exists()
    done = subprocess.run([*words, "--json"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert read_engine(result["engine"]).tp == 2 and not result["engine_reused"]


def test_interrupted_build_leaves_no_process_and_no_half_engine(
    make_source: Any, standins: Any, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(make_config(make_source(), engine={"builder": "local"}).model_dump(mode="json")))
    standins.fail("hang")
    words = [sys.executable, "-m", "trtkit", "build", str(config), "--store", str(tmp_path / "store")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 60
    while not (standins.folder / "pids").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert standins.living(wait_s=10) == []
    assert len(list((tmp_path / "store" / "checkpoint").glob("[!.]*"))) == 1
    assert not list((tmp_path / "store" / "engine").glob("[!.]*/"))
