"""Generated repositories of every runtime in a real Triton server, which has the python backend only.

ONNX models run through trtkit's wrapper and are compared with onnxruntime itself; python functions with plain calls.
Where a backend cannot exist here (tensorrtllm, vllm, NVIDIA's LLM-API model), `STAND_IN` takes its place behind the
generated configuration: it says what it was sent.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from triton_process import serve
from tritonclient import grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from trtkit import pbtxt
from trtkit.config_file import parse_config
from trtkit.deploy.local import running_server
from trtkit.repository.generate import render_repository, write_repository
from trtkit.repository.layouts.job import Files

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("layouts_server")]

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama"
PATIENCE_S = 60.0

STAND_IN = """
import json
import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.names = [item["name"] for item in config["input"]]
        self.output = next(item for item in config["output"] if item["data_type"] in ("TYPE_STRING", "TYPE_INT32"))
        self.decoupled = config["model_transaction_policy"]["decoupled"]

    def execute(self, requests):
        answers = [self.answer(request) for request in requests]
        if not self.decoupled:
            return answers
        for request, answer in zip(requests, answers):
            sender = request.get_response_sender()
            sender.send(answer)
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def answer(self, request):
        said = {}
        for name in self.names:
            tensor = pb.get_input_tensor_by_name(request, name)
            if tensor is not None:
                values = tensor.as_numpy()
                said[name] = [list(values.shape), [v.decode() if isinstance(v, bytes) else v.item()
                              for v in values.reshape(-1)]]
        with open(pb.get_model_dir() + "/said", "a") as file:
            file.write(json.dumps(said) + "\\n")
        if self.output["data_type"] == "TYPE_STRING":
            values = np.array([json.dumps(said).encode()], dtype=object)
        else:
            values = np.array([[[len(said)]]], dtype=np.int32)
        return pb.InferenceResponse([pb.Tensor(self.output["name"], values)])
"""


def graph(name: str, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any]) -> Any:
    tensors = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    body = helper.make_graph(nodes, name, inputs, outputs, tensors)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def value(name: str, kind: int, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def _widen() -> Any:
    return helper.make_node("Cast", ["h"], ["wide"], to=TensorProto.FLOAT)


def onnx_models(folder: Path) -> dict[str, Path]:
    """Models of all kinds of tensors, by name."""
    random = np.random.default_rng(7)
    weight = random.standard_normal((4, 3)).astype(np.float32)
    models = {
        "linear": graph(
            "linear", [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])],
            [value("x", TensorProto.FLOAT, "batch", "length", 4)],
            [value("y", TensorProto.FLOAT, "batch", "length", 3), value("z", TensorProto.FLOAT, "batch", "length", 3)],
            {"w": weight},
        ),
        "texts": graph(
            "texts", [helper.make_node("StringConcat", ["a", "b"], ["joined"])],
            [value("a", TensorProto.STRING, "batch", "n"), value("b", TensorProto.STRING, "batch", "n")],
            [value("joined", TensorProto.STRING, "batch", "n")], {},
        ),
        "numbers": graph(
            "numbers", [helper.make_node("Mul", ["i", "j"], ["product"]), _widen()],
            [value("i", TensorProto.INT64, "batch"), value("j", TensorProto.INT64, "batch"),
             value("h", TensorProto.FLOAT16, "batch", 2)],
            [value("product", TensorProto.INT64, "batch"), value("wide", TensorProto.FLOAT, "batch", 2)], {},
        ),
        "fixed": graph(
            "fixed", [helper.make_node("Not", ["on"], ["off"]), helper.make_node("Identity", ["d"], ["e"])],
            [value("on", TensorProto.BOOL, 2, 3), value("d", TensorProto.DOUBLE, "any")],
            [value("off", TensorProto.BOOL, 2, 3), value("e", TensorProto.DOUBLE, "any")], {},
        ),
        "outside": graph(
            "outside", [helper.make_node("Add", ["x", "big"], ["y"])],
            [value("x", TensorProto.FLOAT, "batch", 600)], [value("y", TensorProto.FLOAT, "batch", 600)],
            {"big": random.standard_normal(600).astype(np.float32)},
        ),
    }  # fmt: skip
    paths = {}
    for name, model in models.items():
        paths[name] = folder / name / f"{name}.onnx"
        paths[name].parent.mkdir(parents=True)
        onnx.save(model, paths[name], save_as_external_data=name == "outside", location="weights.bin", size_threshold=0)
    return paths


FUNCTIONS = """
from collections.abc import Iterator
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

greeting = ""


def load(folder: str) -> None:
    global greeting
    greeting = "hello"


def scaled(
    x: Annotated[NDArray[np.float32], -1, 3], factor: float = 2.0, name: str | None = None
) -> tuple[Annotated[NDArray[np.float32], "y", -1, 3], Annotated[str, "text"], Annotated[int, "rows"]]:
    factors = np.reshape(np.broadcast_to(factor, len(x)), (-1, 1, 1))
    names = ["nobody"] * len(x) if name is None else name
    return (x * factors).astype(np.float32), [f"{greeting} {one}" for one in names], np.full(len(x), len(x))


def single(word: str, times: int = 2) -> Annotated[NDArray[np.str_], "words", -1]:
    if not word:
        raise ValueError("the word is empty")
    return np.array([word] * times, dtype=object)


def counted(until: int, step: np.int64 = 1) -> Iterator[Annotated[int, "number"]]:
    yield from range(0, until, int(step))
"""

OWN = """
import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        return [pb.InferenceResponse([pb.Tensor("twice", self.infer(
            pb.get_input_tensor_by_name(request, "x").as_numpy()))]) for request in requests]

    def infer(self, x: "np.int32") -> 'Annotated[NDArray[np.int32], "twice", 1]':
        return (x * 2).astype(np.int32)
"""


def add(repository: dict[str, Any], name: str, text: str, **more: Any) -> None:
    """The files of one generated model, under its name."""
    files = render_repository(parse_config(f"name: {name}\n{text}"), **more)
    repository.update(files)


def replaced(files: Files, model: str) -> Files:
    """The files of one model with the stand-in for its backend; only `backend` differs from what was generated."""
    text = files[f"{model}/config.pbtxt"]
    assert isinstance(text, str)
    message = pbtxt.loads(text)
    message.backend = "python"
    kept = {name: content for name, content in files.items() if name.startswith(f"{model}/")}
    return {**kept, f"{model}/config.pbtxt": pbtxt.dumps(message), f"{model}/1/model.py": STAND_IN}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def models(work: Path) -> dict[str, Path]:
    return onnx_models(work / "onnx")


@pytest.fixture(scope="module")
def client(work: Path, models: dict[str, Path]) -> Iterator[Any]:
    """A server with one generated model of each kind."""
    files: dict[str, Any] = {}
    for name, path in models.items():
        delay = 1_000_000 if name == "outside" else 1000
        batching = f"max_batch_size: 8, max_queue_delay_microseconds: {delay}, warmup: [{{size: 3, count: 2}}]"
        add(files, name, f"model: {{source: {path}}}\nserving: {{runtime: onnxruntime, {batching}}}\n")
    code = work / "functions.py"
    code.write_text(FUNCTIONS)
    queue_policy = "queue: {default_timeout_microseconds: 30000000, timeout_action: delay}"
    for name, batch in (("scaled", "true"), ("single", "false"), ("counted", "true")):
        options = f"python: {{function: {name}, batch: {batch}}}, version_policy: 2"
        options += (
            f", max_batch_size: 8, max_queue_delay_microseconds: 5000, {queue_policy}" if name == "scaled" else ""
        )
        add(files, name, f"model: {{source: {code}}}\nserving: {{runtime: python, {options}}}\n")
    (work / "own.py").write_text(OWN)
    add(
        files,
        "own",
        f"model: {{source: {work / 'own.py'}}}\nserving: {{runtime: python, instances: 2, version_policy: all}}\n",
    )
    write_repository(files, work / "repository")
    stand_ins = {
        **replaced(
            llm(work, "tensorrtllm", "max_batch_size: 4, warmup: [{prompt: def main, max_tokens: 3}]"), "tensorrt_llm"
        ),
        **replaced(llm(work, "vllm", "warmup: [{prompt: def main, max_tokens: 3}]"), "vllm_model"),
    }
    for name, content in stand_ins.items():
        path = work / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with (
        running_server(work / "repository") as deployment,
        grpc.InferenceServerClient(deployment.grpc_url) as connection,
    ):
        for name in models:
            statistics = connection.get_inference_statistics(name, as_json=True)["model_stats"][0]
            executions_before_requests[name] = int(statistics["execution_count"])
        yield connection


executions_before_requests: dict[str, int] = {}
"""ONNX model -> executions when the server became ready."""


def llm(work: Path, runtime: str, options: str = "") -> Files:
    config = parse_config(f"name: t\nmodel: {{source: {TINY}}}\nserving: {{runtime: {runtime}, {options}}}\n")
    more = {"model_path_in_container": "/models/engine"} if runtime == "tensorrtllm" else {}
    return render_repository(config, **more)


def tensors(values: dict[str, Any]) -> list[Any]:
    found = []
    for name, array in values.items():
        found.append(grpc.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        found[-1].set_data_from_numpy(array)
    return found


def infer(client: Any, model: str, values: dict[str, Any]) -> Any:
    return client.infer(model, tensors(values), client_timeout=PATIENCE_S)


def texts(*words: str) -> Any:
    return np.array([word.encode() for word in words], dtype=object)


def random_inputs(name: str, seed: int) -> dict[str, Any]:
    """One request for an ONNX model; its dynamic axes differ with the seed."""
    random = np.random.default_rng(seed)
    rows, length = int(random.integers(1, 4)), int(random.integers(1, 6))
    words = np.array(["", "é", "naïve 漢字", "two words", "🙂"], dtype=object)
    return {
        "linear": lambda: {"x": random.standard_normal((rows, length, 4)).astype(np.float32)},
        "texts": lambda: {key: random.choice(words, (rows, length)) for key in ("a", "b")},
        "numbers": lambda: {
            "i": random.integers(-(2**40), 2**40, (rows, 1)),
            "j": random.integers(-9, 9, (rows, 1)),
            "h": random.standard_normal((rows, 2)).astype(np.float16),
        },
        "fixed": lambda: {"on": random.random((2, 3)) < 0.5, "d": random.standard_normal(length)},
        "outside": lambda: {"x": random.standard_normal((rows, 600)).astype(np.float32)},
    }[name]()


def expected(session: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What onnxruntime itself says; where config.pbtxt has [batch, 1], its graph has [batch]."""
    ranks = {item.name: len(item.shape) for item in session.get_inputs()}
    feed = {name: array.reshape(len(array)) if ranks[name] < array.ndim else array for name, array in inputs.items()}
    answers = zip([item.name for item in session.get_outputs()], session.run(None, feed), strict=True)
    return {name: array.reshape(-1, 1) if array.ndim == 1 and name == "product" else array for name, array in answers}


@pytest.mark.parametrize("name", ["linear", "texts", "numbers", "fixed", "outside"])
def test_answers_are_those_of_onnxruntime(name: str, client: Any, models: dict[str, Path]) -> None:
    """Many requests at once with changing shapes, so that some share a run and others must not."""
    session = onnxruntime.InferenceSession(models[name])
    asked = [random_inputs(name, seed) for seed in range(24)]
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    for index, inputs in enumerate(asked):
        encoded = {
            k: np.char.encode(v.astype(str), "utf-8").astype(object) if v.dtype == object else v
            for k, v in inputs.items()
        }
        client.async_infer(
            name, tensors(encoded), callback=lambda result, error, index=index: answers.put((index, result, error))
        )
    for _ in asked:
        index, result, error = answers.get(timeout=PATIENCE_S)
        assert error is None, error
        for output, array in expected(session, asked[index]).items():
            given = result.as_numpy(output)
            if array.dtype == object:
                given = np.array([text.decode() for text in given.reshape(-1)], dtype=object).reshape(given.shape)
            assert given.dtype == array.dtype
            assert given.shape == array.shape
            if array.dtype.kind == "f":
                np.testing.assert_allclose(given, array, rtol=1e-6, atol=1e-6)
            else:
                np.testing.assert_array_equal(given, array)


def test_requests_share_a_run(client: Any) -> None:
    """The batcher of this model waits for eight."""
    answers: queue.Queue[Any] = queue.Queue()
    given = tensors({"x": np.zeros((1, 600), np.float32)})
    for _ in range(8):
        client.async_infer("outside", given, callback=lambda result, error: answers.put(error))
    assert [answers.get(timeout=PATIENCE_S) for _ in range(8)] == [None] * 8
    statistics = client.get_inference_statistics("outside", as_json=True)["model_stats"][0]
    assert max(int(batch["batch_size"]) for batch in statistics["batch_stats"]) == 8


def test_only_the_asked_output_is_computed(client: Any) -> None:
    asked = [grpc.InferRequestedOutput("z")]
    x = np.full((1, 2, 4), -1, np.float32)
    result = client.infer("linear", tensors({"x": x}), outputs=asked, client_timeout=PATIENCE_S)
    assert result.as_numpy("z").shape == (1, 2, 3)
    assert [output.name for output in result.get_response().outputs] == ["z"]


def test_a_wrong_request_is_an_error_and_leaves_the_others_alone(client: Any) -> None:
    """Sent at once, so that they share a batch of the server."""
    words = {"good": texts("y"), "not UTF-8": np.array([b"\xff"], dtype=object), "too long": texts("x", "y", "z")}
    answers: queue.Queue[tuple[str, Any, Any]] = queue.Queue()
    for name in [*words] * 3:
        b = words[name].reshape(1, -1)
        a = texts(*["x"] * (2 if name == "too long" else 1)).reshape(1, -1)
        client.async_infer(
            "texts",
            tensors({"a": a, "b": b}),
            callback=lambda result, error, name=name: answers.put((name, result, error)),
        )
    for _ in range(9):
        name, result, error = answers.get(timeout=PATIENCE_S)
        if name == "good":
            assert result.as_numpy("joined").tolist() == [[b"xy"]]
        else:
            assert "onnxruntime: " in str(error)


def test_a_function_gets_batches_and_its_own_defaults(client: Any) -> None:
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    result = infer(client, "scaled", {"x": x})
    np.testing.assert_array_equal(result.as_numpy("y"), x * 2)
    assert [text.decode() for text in result.as_numpy("text").reshape(-1)] == ["hello nobody"] * 2
    assert result.as_numpy("text").shape == (2, 1)
    assert result.as_numpy("rows").tolist() == [[2], [2]]
    given = {"x": x, "factor": np.array([[3.0], [0.5]]), "name": texts("Zoë", "漢").reshape(2, 1)}
    result = infer(client, "scaled", given)
    np.testing.assert_array_equal(result.as_numpy("y"), x * np.array([3, 0.5]).reshape(2, 1, 1))
    assert [text.decode() for text in result.as_numpy("text").reshape(-1)] == ["hello Zoë", "hello 漢"]


def test_requests_to_a_function_at_the_same_time_do_not_mix(client: Any) -> None:
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    for index in range(30):
        x = np.full((1 + index % 2, 1 + index % 3, 3), index, np.float32)
        given = {"x": x} | ({"factor": np.full((len(x), 1), 10.0)} if index % 5 == 0 else {})
        client.async_infer(
            "scaled", tensors(given), callback=lambda result, error, index=index: answers.put((index, result, error))
        )
    for _ in range(30):
        index, result, error = answers.get(timeout=PATIENCE_S)
        assert error is None, error
        expected_ = np.full((1 + index % 2, 1 + index % 3, 3), index * (10 if index % 5 == 0 else 2), np.float32)
        np.testing.assert_array_equal(result.as_numpy("y"), expected_)


def test_a_function_without_batches_gets_plain_values(client: Any) -> None:
    result = infer(client, "single", {"word": texts("ja"), "times": np.array([3])})
    assert result.as_numpy("words").tolist() == [b"ja"] * 3
    assert infer(client, "single", {"word": texts("ja")}).as_numpy("words").tolist() == [b"ja"] * 2
    with pytest.raises(InferenceServerException, match="ValueError: the word is empty"):
        infer(client, "single", {"word": texts("")})


def test_a_generator_streams(client: Any) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    given = tensors({"until": np.array([7]), "step": np.array([3])})
    client.async_stream_infer("counted", given, enable_empty_final_response=True)
    numbers = []
    while True:
        result, error = answers.get(timeout=PATIENCE_S)
        assert error is None, error
        if result.as_numpy("number") is None:
            break
        numbers += result.as_numpy("number").tolist()
    client.stop_stream()
    assert numbers == [0, 3, 6]


def test_warm_up_requests_of_zeros_are_run(client: Any) -> None:
    assert executions_before_requests == dict.fromkeys(["linear", "texts", "numbers", "fixed", "outside"], 2)


def test_a_file_with_its_own_triton_model_is_served_as_it_is(client: Any) -> None:
    assert infer(client, "own", {"x": np.array([[4]], np.int32)}).as_numpy("twice").tolist() == [[8]]
    config = client.get_model_config("own", as_json=True)["config"]
    assert config["instance_group"][0]["count"] == 2
    assert "all" in config["version_policy"]


def said(repository: Path, model: str) -> list[dict[str, Any]]:
    """What the stand-in was sent: shape and values of every tensor."""
    return [json.loads(line) for line in (repository / model / "1" / "said").read_text().splitlines()]


def test_warm_up_requests_reach_the_models_with_their_prompts(client: Any, work: Path) -> None:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode("def main").ids
    seen = said(work / "repository", "tensorrt_llm")
    assert {
        "input_ids": [[1, len(ids)], ids],
        "input_lengths": [[1], [len(ids)]],
        "request_output_len": [[1], [3]],
        "end_id": [[1], [1]],
    } in seen
    sampling = [[1], ['{\n  "max_tokens": 3\n}']]
    assert {"text_input": [[1], ["def main"]], "sampling_parameters": sampling} in said(
        work / "repository", "vllm_model"
    )


def test_the_configuration_of_vllm_needs_no_completion(client: Any) -> None:
    config = client.get_model_config("vllm_model", as_json=True)["config"]
    assert config["model_transaction_policy"]["decoupled"] is True
    assert len(config["input"]) == 10
    assert "max_batch_size" not in config  # 0 is not sent


NVIDIAS_WAY = STAND_IN.replace(
    "class TritonPythonModel:",
    """
import os
import yaml
from helpers import answer_of


class TritonPythonModel:
    @classmethod
    def auto_complete_config(cls, config):
        given = cls.read()["triton_config"]
        config.set_model_transaction_policy(dict(decoupled=bool(given["decoupled"])))
        config.set_max_batch_size(int(given["max_batch_size"]))
        return config

    @staticmethod
    def read():
        with open(os.path.join(pb.get_model_dir(), "model.yaml")) as file:
            return yaml.safe_load(file)
""",
).replace("        answers = [", "        assert answer_of(self.read())['model']\n        answers = [")


@pytest.mark.parametrize("streaming", [True, False])
def test_llmapi_hands_over_to_the_code_of_the_container(streaming: bool, tmp_path: Path) -> None:
    """A stand-in for NVIDIA's model.py, which reads model.yaml the same way, in a folder as the container has."""
    (tmp_path / "container").mkdir()
    (tmp_path / "container" / "model.py").write_text(NVIDIAS_WAY)
    (tmp_path / "container" / "helpers.py").write_text("def answer_of(given):\n    return given\n")
    options = (
        f"streaming: {str(streaming).lower()}, warmup: [{{prompt: Hello}}], llmapi_folder: {tmp_path / 'container'}"
    )
    files = llm(tmp_path, "llmapi", options)
    write_repository(files, tmp_path / "repository")
    with (
        running_server(tmp_path / "repository") as deployment,
        grpc.InferenceServerClient(deployment.grpc_url) as client,
    ):
        assert {"text_input": [[1], ["Hello"]], "sampling_param_max_tokens": [[1], [1]]} in said(
            tmp_path / "repository", "tensorrt_llm"
        )
        config = client.get_model_config("tensorrt_llm", as_json=True)["config"]
        assert config["model_transaction_policy"].get("decoupled", False) is streaming


def test_the_response_cache_answers_without_the_models(tmp_path: Path) -> None:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    files = render_repository(
        parse_config(
            f"name: single\nmodel: {{source: {tmp_path / 'functions.py'}}}\nserving: {{runtime: python, "
            "response_cache: true, python: {function: single, batch: false}, "
            "rate_limiter: {resources: {slots: 2}, priority: 3}}\n"
        )
    )
    write_repository(files, tmp_path / "repository")
    options = ("--cache-config=local,size=1048576", "--rate-limit=execution_count", "--rate-limit-resource=slots:2")
    with (
        serve(tmp_path / "repository", tmp_path, *options) as server,
        grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client,
    ):
        for _ in range(3):
            assert infer(client, "single", {"word": texts("ja")}).as_numpy("words").tolist() == [b"ja"] * 2
        statistics = client.get_inference_statistics("single", as_json=True)["model_stats"][0]
        assert (int(statistics["execution_count"]), int(statistics["inference_stats"]["cache_hit"]["count"])) == (1, 2)


def test_the_cache_of_an_ensemble_is_one_that_servers_take(tmp_path: Path) -> None:
    files = llm(tmp_path, "tensorrtllm", "streaming: false, response_cache: true, max_batch_size: 4")
    write_repository({**files, **replaced(files, "tensorrt_llm")}, tmp_path / "repository")
    with (
        serve(tmp_path / "repository", tmp_path, "--cache-config=local,size=1048576") as server,
        grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client,
    ):
        assert client.get_model_config("ensemble", as_json=True)["config"]["response_cache"]["enable"] is True
