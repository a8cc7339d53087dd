"""`trtkit inspect` as a user calls it; and that no config.json gives it more than one error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inspect_samples import engine_of, mixtral, to_checkpoint

from trtkit.errors import InputError
from trtkit.inspect import (
    Kind,
    inspect_folder,
)
from trtkit.store import ArtifactStore

ROOT = Path(__file__).parents[2]

# Whatever a config says

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Folder and config.json of a source with experts, a checkpoint and an engine."""
    root = tmp_path_factory.mktemp("targets")
    source, _, _ = mixtral(root / "source")
    folders = {
        "source": source,
        "checkpoint": to_checkpoint(source, root / "checkpoint", tp=2, ep=2),
        "engine": engine_of(root / "engine"),
    }
    return {kind: (folder, json.loads((folder / "config.json").read_text())) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", ["source", "checkpoint", "engine"])
@given(data=st.data())
def test_any_config_gives_a_report_or_one_error(kind: Kind, data: st.DataObject, targets: Any) -> None:
    folder, config = targets[kind]
    config = json.loads(json.dumps(config))
    places = [config, *(value for value in config.values() if isinstance(value, dict))]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places))
        extra = ["quantization_config", "quantization", "moe", "rope_scaling", "text_config", "torch_dtype"]
        place[data.draw(st.sampled_from([*place, *extra]))] = data.draw(JSON)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        report = inspect_folder(folder, kind=kind)
    except InputError as error:
        assert error.cause and "\n" not in error.cause
    else:
        assert report.kind == kind
        json.dumps(asdict(report), allow_nan=False)
        assert all("\n" not in problem.cause for problem in report.problems)


def trtkit(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trtkit", "inspect", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


MODEL = {
    "layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_size", "vocabulary", "context",
    "rope_scaling", "rope_factor", "tied_embeddings", "experts", "experts_per_token",
}  # fmt: skip
RANK = {"file", "present", "tensors", "bytes", "problem"}
BUILT = {
    "kind", "path", "architecture", "dtype", "tp", "pp", "ep", "complete", "bytes", "quantization", "model", "ranks",
    "problems",
}  # fmt: skip
KEYS = {
    "source": {
        "kind", "path", "origin", "architecture", "supported", "near", "convertible", "files", "tensors", "bytes",
        "parameters", "active_parameters", "dtypes", "quantization", "model", "layouts", "warnings", "problems",
    },
    "checkpoint": BUILT | {"supported", "parameters", "dtypes", "producer", "conversion"},
    "engine": BUILT | {"tensorrt_llm", "releases", "limits", "kv_cache_type", "plugins"},
    "repository": {
        "kind", "path", "models", "files", "bytes", "errors", "warnings", "problems", "runtimes", "topology",
    },
    "store": {"kind", "path", "artifacts", "problems"},
}  # fmt: skip


@pytest.fixture
def one_of_each(make_source: Any, tmp_path: Path) -> dict[str, Path]:
    source = make_source()
    made = to_checkpoint(source, tmp_path / "checkpoint")
    store = ArtifactStore(tmp_path / "store")
    store.build("checkpoint", {}, lambda folder: shutil.copytree(made, folder, dirs_exist_ok=True) and None)
    return {
        "source": source,
        "checkpoint": made,
        "engine": engine_of(tmp_path / "engine"),
        "repository": ROOT / "model_repository",
        "store": store.root,
    }


def test_json_schema(one_of_each: dict[str, Path]) -> None:
    for kind, path in one_of_each.items():
        done = trtkit(path, "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["kind"] == kind and next(iter(report)) == "kind"
        assert report.keys() == KEYS[kind]
        assert report == {"kind": kind, **json.loads(json.dumps(asdict(inspect_folder(path))))}
        if "model" in report:
            assert report["model"].keys() == MODEL
        if "ranks" in report:
            assert report["ranks"][0].keys() == RANK
        if kind == "source":
            assert report["layouts"].keys() == {"tp", "pp_max", "ep", "dtype", "converts_dtype", "rank_bytes"}
            assert report["dtypes"][0].keys() == {"dtype", "tensors", "elements", "bytes", "share"}
        if kind == "checkpoint":
            assert report["conversion"].keys() == {"made_by", "origin", "source_digest", "files", "checksums"}
        if kind == "repository":
            assert report["models"][0].keys() == {
                "name", "backend", "versions", "max_batch_size", "decoupled", "instances", "inputs", "outputs", "steps",
                "runtime", "drives",
            }  # fmt: skip
        if kind == "store":
            assert report["artifacts"][0].keys() == {"path", "created", "report"}


def test_tables(one_of_each: dict[str, Path], edit_config: Any) -> None:
    wanted = {
        "source": ["LlamaForCausalLM", "BF16 100%", "1, 2, 4, 8", "bfloat16, as stored", "TP 8: "],
        "checkpoint": ["TP 1 x PP 1", "made by", "2 of 2 files"],
        "engine": ["1.2.1 (containers", "max_num_tokens", "2048", "FP8, 8 bits, key/value cache FP8"],
        "repository": [
            "preprocessing > tensorrt_llm > postprocessing",
            "1 x CPU",
            "`trtkit repo lint`: 0 errors",
            "reference, ensemble",
            "asks tensorrt_llm",
        ],
        "store": ["checkpoint/", "LlamaForCausalLM"],
    }
    for kind, path in one_of_each.items():
        done = trtkit(path)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        for text in wanted[kind]:
            assert text in done.stdout, (kind, text)
    edit_config(one_of_each["source"], architectures=["Llama9ForCausalLM"])
    (one_of_each["engine"] / "rank0.engine").unlink()
    done = trtkit(one_of_each["source"])
    assert done.returncode == 0
    assert "Llama9ForCausalLM (not supported; closest: LlamaForCausalLM" in done.stdout
    assert "problem: " in done.stdout and "fix: " in done.stdout
    assert "INCOMPLETE: 0 of 1" in trtkit(one_of_each["engine"]).stdout


def test_errors_are_a_cause_and_a_fix(tmp_path: Path) -> None:
    done = trtkit(tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "  fix"]
    done = trtkit(ROOT / "pyproject.toml", "--json")
    assert json.loads(done.stdout)["error"]["exit_code"] == done.returncode == 2


def test_help_has_an_example() -> None:
    done = trtkit("--help")
    assert done.returncode == 0
    assert "Example:\n    trtkit inspect examples/tiny-llama\n" in done.stdout
