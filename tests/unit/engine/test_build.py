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
from trtkit.accuracy import read as read_accuracy
from trtkit.config import BuildConfig
from trtkit.config_file import parse_config
from trtkit.engine_files import read_engine
from trtkit.errors import InputError, TrtkitError
from trtkit.hf import open_source
from trtkit.inspect import SourceReport
from trtkit.inspect.store import inspect_store
from trtkit.store import ArtifactStore

EXAMPLES = Path(__file__).parents[3] / "examples"
TINY = EXAMPLES / "tiny-llama"


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


QUANTIZED = {"tp": 2, "quantization": {"format": "fp8", "calibration": {"samples": 2, "length": 16}}}


@pytest.mark.parametrize("runtime", ["llmapi", "vllm"])
def test_a_quantised_checkpoint_for_runtimes_that_load_hugging_face(runtime: str, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    config = make_config(TINY, checkpoint=QUANTIZED, serving={"runtime": runtime})
    with pytest.raises(InputError, match="no finished checkpoint"):
        build.find(config, store)
    steps, built = steps_of(config, store)
    assert steps[0] == "exporting" and built.engine_dir is None
    source = open_source(built.checkpoint_dir)  # whole, although tp is 2
    assert source.architecture == "LlamaForCausalLM"
    assert source.tensors["model.layers.0.mlp.down_proj.weight"].dtype.name == "float8_e4m3fn"
    assert (
        json.loads((built.checkpoint_dir / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "FP8"
    )
    assert read_accuracy(built.checkpoint_dir)
    assert steps_of(config, store)[0] == []
    assert build.find(config, store) == build.Built(built.checkpoint_dir, True, None, False)
    wider = make_config(TINY, checkpoint={**QUANTIZED, "tp": 1}, serving={"runtime": runtime})
    assert build.find(wider, store).checkpoint_dir == built.checkpoint_dir  # the runtime splits, not the checkpoint
    (artifact,) = inspect_store(store.root).artifacts
    assert isinstance(artifact.report, SourceReport) and artifact.report.quantization is not None

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    words = [sys.executable, "-m", "trtkit", "repo", "generate", str(file), str(tmp_path / "models")]
    done = subprocess.run([*words, "--store", str(store.root)], capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    name = {"llmapi": "tensorrt_llm/1/model.yaml", "vllm": "vllm_model/1/model.json"}[runtime]
    arguments = yaml.safe_load((tmp_path / "models" / name).read_text())
    assert (arguments["model"], arguments["tensor_parallel_size"]) == (str(built.checkpoint_dir), 2)


@pytest.mark.parametrize(
    ("runtime", "quantization", "said"),
    [
        ("vllm", {"format": "int4_awq"}, "runtime vllm has no int4_awq"),
        ("vllm", {"format": "fp8", "overrides": {"lm_head": "int8_wo"}}, "runtime vllm has no int8_wo"),
        ("llmapi", {"format": "int8_sq"}, "runtime llmapi has no int8_sq"),
        ("llmapi", {"format": "int8_wo", "max_perplexity_increase": "2%"}, "accuracy cannot be measured before"),
    ],
)
def test_what_these_runtimes_cannot_load(runtime: str, quantization: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = make_config(TINY, checkpoint={"quantization": quantization}, serving={"runtime": runtime})
    with pytest.raises(InputError, match=said):
        build.plan(config, ArtifactStore(tmp_path))


NOTHING = [
    ("llmapi", str(TINY)),
    ("llmapi", "some/model"),
    ("vllm", "some/model"),
    ("onnxruntime", str(EXAMPLES / "onnx-classifier" / "classifier.onnx")),
    ("python", str(EXAMPLES / "text-statistics" / "statistics.py")),
]


@pytest.mark.parametrize(("runtime", "source"), NOTHING)
def test_nothing_to_build(runtime: str, source: str, tmp_path: Path) -> None:
    config = make_config(Path(source), serving={"runtime": runtime}, checkpoint={})
    reason = build.nothing_to_build(config)
    assert reason == f"nothing to build: runtime '{runtime}' serves {source} itself"
    for act in (build.plan, build.find):
        with pytest.raises(InputError, match="nothing to build"):
            act(config, ArtifactStore(tmp_path / "store"))
    missing = make_config(Path("/no/such"), serving={"runtime": runtime}, checkpoint={})
    with pytest.raises(InputError, match="/no/such"):
        build.nothing_to_build(missing)


def test_the_command_line_says_what_there_is_nothing_to_do_for(make_source: Any, tmp_path: Path) -> None:
    files = []
    for index, (runtime, source) in enumerate([*NOTHING, ("reference", str(make_source()))]):
        config = make_config(Path(source), serving={"runtime": runtime}, checkpoint={})
        files.append(tmp_path / f"config{index}.yaml")
        files[-1].write_text(yaml.safe_dump(config.model_dump(mode="json")))
    words = [sys.executable, "-m", "trtkit", "build", *map(str, files), "--store", str(tmp_path / "store")]
    for more in (["--json"], ["--json", "--dry-run"]):
        done = subprocess.run([*words, *more], capture_output=True, text=True, check=False, timeout=90)
        assert done.returncode == 0, done.stderr
        results = json.loads(done.stdout)
        assert len({tuple(result) for result in results}) == 1  # the same keys for all
        assert [result["checkpoint"] is None for result in results] == [True] * len(NOTHING) + [False]
        assert [result["skipped"] for result in results[:-1]] == [
            f"nothing to build: runtime '{runtime}' serves {source} itself" for runtime, source in NOTHING
        ]
        assert len([line for line in done.stderr.splitlines() if "nothing to build" in line]) == len(NOTHING)


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
