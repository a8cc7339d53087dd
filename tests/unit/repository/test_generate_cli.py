"""`trtkit repo generate`: its two ways to say where, its overrides, and the ready-made configs without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from trtkit import pbtxt
from trtkit.cli.repo import command
from trtkit.errors import InputError
from trtkit.repository.lint import lint_repository

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "build_configs"


def run(*args: object) -> Any:
    return CliRunner().invoke(command, ["generate", *map(str, args)])


def test_out_is_said_once(tmp_path: Path) -> None:
    config = CONFIGS / "text-statistics.yaml"
    for arguments in ([tmp_path / "a"], ["-o", tmp_path / "b"], ["--output", tmp_path / "c"]):
        assert run(config, *arguments).exit_code == 0
        assert (Path(arguments[-1]) / "text-statistics" / "config.pbtxt").is_file()
    for arguments in ([], [tmp_path / "d", "-o", tmp_path / "d"]):
        result = run(config, *arguments)
        assert result.exit_code == 2
        assert "OUT, or -o OUT" in result.output


@pytest.mark.parametrize("name", ["text-statistics", "onnx-classifier", "llama-3.1-8b-llmapi", "llama-3.1-8b-vllm-tp2"])
def test_ready_made_configs(name: str, tmp_path: Path) -> None:
    planned = run(CONFIGS / f"{name}.yaml", tmp_path / "out", "--dry-run", "--json")
    written = run(CONFIGS / f"{name}.yaml", tmp_path / "out", "--json")
    assert (planned.exit_code, written.exit_code) == (0, 0), written.output
    before, after = json.loads(planned.stdout), json.loads(written.stdout)
    assert (before.pop("written"), after.pop("written")) == (False, True)
    assert before == after
    sizes = {
        str(p.relative_to(tmp_path / "out")): p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert after["files"] == sizes
    assert lint_repository(tmp_path / "out") == []


def test_options_go_before_the_config(tmp_path: Path, source: Path) -> None:
    (source / "config.json").write_text('{"model_type": "llama"}')
    config = tmp_path / "c.yaml"
    config.write_text(f"name: t\nmodel: {{source: {source}}}\nserving: {{max_batch_size: 3}}\n")
    result = run(config, tmp_path / "out", "--runtime", "vllm", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "vllm_model" / "1" / "model.json").read_text())["max_num_seqs"] == 3
    assert any("vllm-python-py3" in line for line in json.loads(result.stdout)["notes"])
    fused = run(config, tmp_path / "out", "--runtime", "llmapi", "--topology", "fused", "--json")
    assert fused.exit_code == 0, fused.output
    assert "llm/config.pbtxt" in json.loads(fused.stdout)["files"]
    wrong = run(config, tmp_path / "out", "--runtime", "vllm", "--topology", "ensemble")
    assert isinstance(wrong.exception, InputError)
    assert "topology 'ensemble' does not go with runtime 'vllm'" in wrong.exception.cause
    assert run(config, tmp_path / "out", "--runtime", "tensorflow").exit_code == 2


def test_the_repository_may_be_elsewhere_for_the_server(tmp_path: Path, source: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"name: t\nmodel: {{source: {source}}}\nserving: {{guided_decoding_backend: xgrammar}}\n")
    key = "xgrammar_tokenizer_info_path"
    for option, folder in (([], str(tmp_path / "out")), (["--repository-in-container", "/models"], "/models")):
        result = run(config, tmp_path / "out", "--model-path-in-container", "/engine", *option)
        assert result.exit_code == 0, result.output
        message = pbtxt.load(tmp_path / "out" / "tensorrt_llm" / "config.pbtxt")
        assert message.parameters[key].string_value == f"{folder}/tensorrt_llm/1/xgrammar_tokenizer_info.json"
    wrong = run(config, tmp_path / "out", "--model-path-in-container", "/engine", "--repository-in-container", "models")
    assert isinstance(wrong.exception, InputError)
    assert "--repository-in-container models is not absolute" in wrong.exception.cause


def test_the_classifier_is_what_its_script_makes() -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    folder = ROOT / "examples" / "onnx-classifier"
    spec = spec_from_file_location("make_classifier", folder / "make.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    features = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    answers = [
        onnxruntime.InferenceSession(content).run(None, {"features": features})
        for content in ((folder / "classifier.onnx").read_bytes(), module.classifier().SerializeToString())
    ]
    for one, other in zip(*answers, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_example_function_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("text_statistics", ROOT / "examples" / "text-statistics" / "statistics.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    counts, frequency = module.infer(np.array(["a b a", ""], dtype=object), np.array(["a", "a"], dtype=object))
    assert counts.tolist() == [[5, 3, 1], [0, 0, 1]]
    np.testing.assert_allclose(frequency, [[2 / 3], [0]], rtol=1e-6)
    assert module.infer("x")[0].tolist() == [[1, 1, 1]]
