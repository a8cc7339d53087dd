"""`trtkit deploy` on the real server, for what it executes without a GPU; its response cache and its rate limiter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc
from tritonclient.utils import np_to_triton_dtype

from trtkit import build
from trtkit.config import BuildConfig
from trtkit.config_file import load_config, parse_config
from trtkit.deploy import local, state
from trtkit.deploy.deployment import Deployment
from trtkit.repository.generate import render_repository, write_repository
from trtkit.store import ArtifactStore

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("deploy_runtimes_server")]

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "build_configs"
TOGETHER = """
import os
import time
from pathlib import Path

import numpy as np

PLACE = "{place}"


def infer(number: np.int64) -> int:
    \"\"\"How many calls run at this moment, over all instances, which are processes.\"\"\"
    own = Path(PLACE) / f"{{os.getpid()}}"
    own.touch()
    time.sleep(0.15)
    running = len(list(own.parent.iterdir()))
    time.sleep(0.15)
    own.unlink()
    return running
"""


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRTKIT_STATE_DIR", str(tmp_path / "state"))
    yield
    for name in state.names():
        local.down(name)


def deployed(config: BuildConfig, models: Path, **given: Any) -> Deployment:
    write_repository(render_repository(config, **given), models)
    return local.up(local.spec_from_config(config, models))


def infer(deployment: Deployment, model: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    inputs = []
    for name, array in arrays.items():
        inputs.append(grpc.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        inputs[-1].set_data_from_numpy(array)
    with grpc.InferenceServerClient(deployment.grpc_url) as client:
        answer = client.infer(model, inputs, client_timeout=60)
        return {one.name: answer.as_numpy(one.name) for one in answer.get_response().outputs}


def metric(deployment: Deployment, name: str, model: str) -> float:
    with urllib.request.urlopen(deployment.metrics_url, timeout=10) as answer:  # noqa: S310
        text = answer.read().decode()
    found = re.search(rf'^{name}{{[^}}]*model="{model}"[^}}]*}} (\S+)$', text, re.MULTILINE)
    assert found is not None, f"no {name} of {model} in the metrics"
    return float(found[1])


def await_metrics(deployment: Deployment, model: str, wanted: dict[str, float]) -> None:
    """The server counts a request after it has answered it."""
    deadline = time.monotonic() + 30
    while True:
        found = {name: metric(deployment, name, model) for name in wanted}
        if found == wanted or time.monotonic() > deadline:
            assert found == wanted
            return
        time.sleep(0.05)


def with_features(name: str, serving: dict[str, Any], deploy: dict[str, Any]) -> BuildConfig:
    """A ready-made build config with more keys."""
    config = load_config(CONFIGS / f"{name}.yaml")
    data = config.model_dump()
    data["serving"].update(serving)
    data["deploy"].update(deploy)
    return BuildConfig.model_validate(data)


@pytest.mark.parametrize("on", [True, False])
def test_the_cache_answers_an_onnx_model_a_second_time(on: bool, tmp_path: Path) -> None:
    config = with_features("onnx-classifier", {"response_cache": on, "warmup": []}, {"response_cache_bytes": 2**20})
    deployment = deployed(config, tmp_path / "models")
    with grpc.InferenceServerClient(deployment.grpc_url) as client:
        given = client.get_model_metadata(config.name, as_json=True)["inputs"]
    arrays = {}
    for one in given:
        shape = [int(size) if int(size) > 0 else 1 for size in one["shape"]]
        arrays[one["name"]] = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    first, *others = [infer(deployment, config.name, **arrays) for _ in range(3)]
    for other in others:
        assert other.keys() == first.keys() and all(np.array_equal(other[name], first[name]) for name in first)
    counted = {"nv_inference_request_success": 3.0, "nv_inference_exec_count": 1.0 if on else 3.0}
    if on:
        counted |= {"nv_cache_num_hits_per_model": 2.0, "nv_cache_num_misses_per_model": 1.0}
    await_metrics(deployment, config.name, counted)


@pytest.mark.parametrize(("resources", "at_once"), [({}, 1), ({"slots": 4}, 2), (None, 4)])
def test_the_limiter_limits_what_runs_at_once(resources: dict[str, int] | None, at_once: int, tmp_path: Path) -> None:
    """Four instances of which each takes two slots; without a count the server has as many as one takes."""
    (tmp_path / "running").mkdir()
    (tmp_path / "code.py").write_text(TOGETHER.format(place=tmp_path / "running"))
    serving: dict[str, Any] = {"runtime": "python", "instances": 4, "max_batch_size": 1, "python": {"batch": False}}
    if resources is not None:
        serving["rate_limiter"] = {"resources": {"slots": 2}}
    text = {
        "name": "together",
        "model": {"source": str(tmp_path / "code.py")},
        "serving": serving,
        "deploy": {"rate_limit_resources": resources or {}},
    }
    deployment = deployed(parse_config(json.dumps(text)), tmp_path / "models")

    def ask(number: int) -> int:
        (answer,) = infer(deployment, "together", number=np.array([number], np.int64)).values()
        return int(answer.reshape(-1)[0])

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(ask, range(8)))
    assert max(seen) <= at_once
    if resources is None:
        assert max(seen) > 2  # the others measure something


def trtkit(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trtkit", *map(str, words)],
        capture_output=True, text=True, check=False, timeout=240, cwd=cwd,
    )  # fmt: skip


CHAINS = [("text-statistics", ()), ("onnx-classifier", ()), ("tiny-llama", ("--topology", "fused"))]


@pytest.mark.parametrize(("name", "layout"), CHAINS)
def test_the_whole_chain(name: str, layout: tuple[str, ...], tmp_path: Path) -> None:
    """build, repo generate and deploy as a user types them; every model of it is ready."""
    config, store = CONFIGS / f"{name}.yaml", tmp_path / "store"
    for words in (
        ("config", "check", config),
        ("build", config, "--store", store),
        ("repo", "generate", config, "models", "--store", store, *layout),
    ):
        done = trtkit(*words, cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr)
    described = json.loads(trtkit("inspect", "models", "--json", cwd=tmp_path).stdout)
    runtime = load_config(config).serving.runtime
    assert (described["runtimes"], described["topology"]) == ([runtime], "fused" if layout else None)
    up = trtkit("deploy", "up", config, "--repository", "models", "--json", cwd=tmp_path)
    assert up.returncode == 0, up.stderr
    deployment = json.loads(up.stdout)
    assert deployment["ready"] and deployment["models"] == ["llm" if layout else name]
    assert trtkit("deploy", "down", name, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("runtime", ["llmapi", "vllm", "tensorrtllm"])
@pytest.mark.parametrize("topology", ["fused", None])
def test_what_needs_a_gpu_is_refused_before_a_server_starts(runtime: str, topology: str | None, tmp_path: Path) -> None:
    text = f"name: t\nmodel: {{source: {ROOT}/examples/tiny-llama}}\n"
    text += f"serving: {{runtime: {runtime}, topology: {topology or 'null'}}}\n"
    (tmp_path / "config.yaml").write_text(text)
    files = render_repository(parse_config(text), model_path_in_container="/model")
    write_repository(files, tmp_path / "models")
    done = trtkit("deploy", "up", "config.yaml", "--repository", "models", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "which is not on this machine" in done.stderr
    assert "--target docker" in done.stderr
    assert not (tmp_path / "state").exists()


def test_nothing_is_built_for_what_is_served_itself(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    for name in ("text-statistics", "onnx-classifier", "llama-3.1-8b-llmapi", "llama-3.1-8b-vllm-tp2"):
        assert build.nothing_to_build(load_config(CONFIGS / f"{name}.yaml"))
    assert not store.root.exists()
