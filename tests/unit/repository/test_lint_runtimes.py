"""What the linter says about models of the LLM API, of vLLM and of ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from trtkit.repository.lint import Server, lint_repository

CODE = "from tensorrt_llm import LLM\nCONFIG = 'model.yaml'\nclass TritonPythonModel:\n    pass\n"
LLMAPI = (
    'backend: "python"\nmax_batch_size: 0\nmodel_transaction_policy { decoupled: true }\n'
    'input { name: "text_input" data_type: TYPE_STRING dims: -1 }\n'
    'output { name: "text_output" data_type: TYPE_STRING dims: -1 }\ninstance_group { count: 1 kind: KIND_CPU }\n'
)
YAML = "model: some/model\ntensor_parallel_size: 2\ntriton_config: {max_batch_size: 0, decoupled: true}\n"


def rules(repository: Path, server: Server | None = None) -> set[str]:
    return {item.id for item in lint_repository(repository, server=server or Server())} - {"TK127"}


def write(repository: Path, config: str, **files: str | bytes | None) -> None:
    """A model with files in its version's folder; None leaves one out."""
    folder = repository / "m" / "1"
    folder.mkdir(parents=True)
    (folder.parent / "config.pbtxt").write_text(config)
    for name, content in files.items():
        if content is not None:
            (folder / name.replace("__", ".")).write_bytes(content.encode() if isinstance(content, str) else content)


def gpus(text: str) -> str:
    return f'parameters {{ key: "gpu_device_ids" value {{ string_value: "{text}" }} }}\n'


@pytest.mark.parametrize(
    ("rule", "config", "yaml"),
    [
        ("", LLMAPI, YAML),
        ("", LLMAPI, "model: x\n"),
        ("TK221", LLMAPI, None),
        ("TK221", LLMAPI, "- a list\n"),
        ("TK221", LLMAPI, "a: [1\n"),
        ("TK221", LLMAPI, "tensor_parallel_size: 1\n"),
        ("TK222", LLMAPI.replace("decoupled: true", "decoupled: false"), YAML),
        ("TK222", LLMAPI.replace("decoupled: true", ""), YAML),
        ("TK222", LLMAPI.replace("model_transaction_policy { decoupled: true }\n", ""), YAML),
        ("", LLMAPI.replace("model_transaction_policy { decoupled: true }\n", ""), YAML.replace("true", "false")),
        ("TK222", LLMAPI, YAML.replace("true", "false")),
        ("TK222", LLMAPI.replace("max_batch_size: 0", "max_batch_size: 8"), YAML),
        ("", LLMAPI + gpus("0,1"), YAML),
        ("TK223", LLMAPI + gpus("0"), YAML),
        ("TK223", LLMAPI.replace("count: 1", "count: 2"), YAML),
        ("TK223", LLMAPI.replace("count: 1", "count: 2") + gpus("0,1"), YAML),
        ("", LLMAPI.replace("count: 1", "count: 2") + gpus("0,1;2,3"), YAML),
    ],
)
def test_llmapi(tmp_path: Path, rule: str, config: str, yaml: str | None) -> None:
    write(tmp_path, config, model__py=CODE, model__yaml=yaml)
    assert rules(tmp_path) == ({rule} if rule else set())


def test_a_server_that_completes_configs_takes_them_from_model_yaml(tmp_path: Path) -> None:
    write(tmp_path, LLMAPI.replace("decoupled: true", ""), model__py=CODE, model__yaml=YAML)
    assert rules(tmp_path, Server(auto_complete=True)) == set()


VLLM = LLMAPI.replace('"python"', '"vllm"').replace("KIND_CPU", "KIND_MODEL")


@pytest.mark.parametrize(
    ("rule", "config", "settings"),
    [
        ("", VLLM, '{"model": "x"}'),
        ("", VLLM, '{"model": "x", "tensor_parallel_size": 2}'),
        ("TK231", VLLM, None),
        ("TK231", VLLM, "{"),
        ("TK231", VLLM, "[]"),
        ("TK231", VLLM, "{}"),
        ("TK232", VLLM.replace("model_transaction_policy { decoupled: true }\n", ""), '{"model": "x"}'),
        ("TK232", 'backend: "vllm"\n', '{"model": "x"}'),
        ("TK232", VLLM.replace("max_batch_size: 0", "max_batch_size: 8"), '{"model": "x"}'),
        ("TK233", VLLM.replace("KIND_MODEL", "KIND_GPU"), '{"model": "x", "tensor_parallel_size": 2}'),
        ("", VLLM.replace("KIND_MODEL", "KIND_GPU"), '{"model": "x"}'),
    ],
)
def test_vllm(tmp_path: Path, rule: str, config: str, settings: str | None) -> None:
    write(tmp_path, config, model__json=settings)
    assert rules(tmp_path) == ({rule} if rule else set())


def test_vllm_and_a_server_that_completes_configs(tmp_path: Path) -> None:
    write(tmp_path, 'backend: "vllm"\n', model__json='{"model": "x"}')
    assert rules(tmp_path, Server(auto_complete=True)) == set()


def graph(dims: tuple[Any, ...] = ("batch", 3), dtype: int = TensorProto.FLOAT) -> bytes:
    """y = x + w, w of 3 elements."""
    weights = helper.make_tensor("w", dtype, [3], [1, 2, 3])
    made = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", dtype, dims), helper.make_tensor_value_info("w", dtype, [3])],
        [helper.make_tensor_value_info("y", dtype, dims)],
        [weights],
    )
    model = helper.make_model(made)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


ONNX = (
    'backend: "onnxruntime"\nmax_batch_size: 8\ninput { name: "x" data_type: TYPE_FP32 dims: 3 }\n'
    'output { name: "y" data_type: TYPE_FP32 dims: 3 }\n'
)
FIXED = ONNX.replace("max_batch_size: 8", "max_batch_size: 0").replace("dims: 3", "dims: [ 2, 3 ]")


@pytest.mark.parametrize(
    ("rule", "config", "model"),
    [
        ("", ONNX, graph()),
        ("", ONNX.replace('backend: "onnxruntime"', 'platform: "onnxruntime_onnx"'), graph()),
        ("", ONNX.replace("dims: 3", "dims: -1"), graph(("batch", "n"))),
        ("", FIXED, graph((2, 3))),
        ("", ONNX.replace("dims: 3", "dims: [ 3, 1 ] reshape { shape: 3 }"), graph()),
        ("", ONNX.replace("FP32", "FP16"), graph(dtype=TensorProto.FLOAT16)),
        ("TK241", ONNX, None),
        ("TK241", ONNX, b"no graph"),
        ("TK242", ONNX.replace('"x"', '"z"'), graph()),
        ("TK242", ONNX.replace('"y"', '"z"'), graph()),
        ("TK242", ONNX.replace("FP32", "INT32"), graph()),
        ("TK242", ONNX.replace("dims: 3", "dims: 4"), graph()),
        ("TK242", ONNX.replace("dims: 3", "dims: [ 3, 1 ]"), graph()),
        ("TK242", FIXED, graph((4, 3))),
        ("TK243", ONNX, graph((2, 3))),
    ],
)
def test_onnx(tmp_path: Path, rule: str, config: str, model: bytes | None) -> None:
    write(tmp_path, config, model__onnx=model)
    assert rules(tmp_path) == ({rule} if rule else set())


def test_a_graph_with_an_input_that_config_pbtxt_lacks(tmp_path: Path) -> None:
    made = onnx.load_from_string(graph())
    made.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch"]))
    write(tmp_path, ONNX, model__onnx=bytes(made.SerializeToString()))
    (finding,) = lint_repository(tmp_path)
    assert finding.id == "TK242"
    assert "'more'" in finding.cause


def test_code_that_is_trusted_in_settings(tmp_path: Path) -> None:
    write(tmp_path, VLLM, model__json=json.dumps({"model": "x", "trust_remote_code": True}, indent=1))
    (finding,) = lint_repository(tmp_path)
    assert (finding.id, finding.place) == ("TK181", "m/1/model.json:3")
