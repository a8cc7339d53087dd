"""The reference runtime in a real Triton server: what a client of NVIDIA's `tensorrt_llm` model may expect.

One server has the model three times: `streams` is decoupled, `unary` is not, `single` is decoupled and has one slot.
`joined` is an ensemble around `streams`, since ensembles treat the end of a stream in their own way.
"""

from __future__ import annotations

import queue
import re
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient import grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from trtkit import contract, pbtxt
from trtkit.config import CheckpointConfig
from trtkit.convert.conversion import convert
from trtkit.convert.readback import load_transformers_model
from trtkit.convert.source import plan_conversion
from trtkit.deploy.local import running_server
from trtkit.errors import CheckFailedError
from trtkit.hf import open_source
from trtkit.repository.models import reference

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("reference_server")]

VOCABULARY = 131
PATIENCE_S = 60.0
ENDLESS = 400_000
"""Tokens that nobody waits for: minutes of work, so whoever gets a slot behind such a request shows that it is gone."""
SHOW = """
import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        tokens = pb.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
        length = pb.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()
        text = " ".join(map(str, tokens.reshape(-1)[: length.reshape(-1)[0]]))
        return pb.InferenceResponse([pb.Tensor("OUTPUT", np.array([[text]], dtype=object))])
"""
"""Takes the place of postprocessing: tokens as decimal numbers."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama on four ranks."""
    import transformers

    folder = tmp_path_factory.mktemp("reference")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder / "source")
    source = open_source(folder / "source")
    convert(plan_conversion(source, CheckpointConfig(dtype="float32", tp=2, pp=2)), source, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    repository = tmp_path_factory.mktemp("repository")
    add_model(repository, "streams", checkpoint, slots=8, decoupled=True)
    longest = str(2 * ENDLESS)
    add_model(
        repository, "unary", checkpoint, slots=4, decoupled=False, max_seq_len=longest, exclude_input_in_output="true"
    )
    add_model(repository, "single", checkpoint, slots=1, decoupled=True, max_seq_len=longest, end_ids="${end}")
    add_ensemble(repository)
    with running_server(repository) as deployment:
        yield deployment


@pytest.fixture
def client(server: Any) -> Iterator[Any]:
    with grpc.InferenceServerClient(server.grpc_url) as connection:
        yield connection


def add_model(repository: Path, name: str, checkpoint: Path, *, slots: int, decoupled: bool, **parameters: str) -> None:
    message = pbtxt.model_config(
        name,
        inputs=contract.llm_inputs(reference=True),
        outputs=contract.llm_outputs(reference=True),
        max_batch_size=slots,
        decoupled=decoupled,
        backend="python",
        parameters={"checkpoint_dir": str(checkpoint), **parameters},
        dynamic_batching={},
    )
    folder = repository / name
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(pbtxt.dumps(message))
    shutil.copy(Path(reference.__file__).parent / "model.py", folder / "1" / "model.py")


def add_ensemble(repository: Path) -> None:
    show = pbtxt.model_config(
        "show",
        inputs=contract.POSTPROCESSING_INPUTS[:2],
        outputs=contract.POSTPROCESSING_OUTPUTS,
        max_batch_size=8,
        decoupled=False,
        backend="python",
    )
    names = ("input_ids", "input_lengths", "request_output_len", "end_id", "streaming")
    joined = pbtxt.model_config(
        "joined",
        inputs=tuple(
            contract.Tensor(tensor.name, tensor.dtype, tensor.dims, optional=tensor.optional)
            for tensor in contract.llm_inputs(reference=True)
            if tensor.name in names
        ),
        outputs=(*contract.POSTPROCESSING_OUTPUTS, *contract.llm_outputs(reference=True)[2:4]),
        max_batch_size=8,
        decoupled=True,
    )
    outputs = {
        "output_ids": "_TOKENS",
        "sequence_length": "_LENGTH",
        "cum_log_probs": "cum_log_probs",
        "output_log_probs": "output_log_probs",
    }
    pbtxt.add_steps(
        joined,
        (
            contract.Step("streams", {name: name for name in names}, outputs),
            contract.Step("show", {"TOKENS_BATCH": "_TOKENS", "SEQUENCE_LENGTH": "_LENGTH"}, {"OUTPUT": "OUTPUT"}),
        ),
    )
    for name, message in (("show", show), ("joined", joined)):
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "config.pbtxt").write_text(pbtxt.dumps(message))
    (repository / "show" / "1" / "model.py").write_text(SHOW)


_model: list[Any] = []


@pytest.fixture
def greedy(checkpoint: Path) -> Any:
    """`greedy(prompt, count)`: the answer of transformers."""
    if not _model:
        torch.set_num_threads(1)
        _model.append(load_transformers_model(checkpoint))

    def answer(prompt: list[int], count: int) -> list[int]:
        tokens = _model[0].generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return tokens[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    return answer


def prompt_of(seed: int, length: int = 10) -> list[int]:
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def inputs(prompt: list[int], count: int, **more: Any) -> list[Any]:
    """Input tensors of one prompt; further ones by name."""
    arrays = {
        "input_ids": np.array([prompt], dtype=np.int32),
        "input_lengths": np.array([[len(prompt)]], dtype=np.int32),
        "request_output_len": np.array([[count]], dtype=np.int32),
        **{name: as_array(name, value) for name, value in more.items()},
    }
    result = []
    for name, array in arrays.items():
        tensor = grpc.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        result.append(tensor)
    return result


def as_array(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value
    if name.endswith("_words_list"):
        ids = [token for word in value for token in word]
        ends = np.cumsum([len(word) for word in value]).tolist()
        return np.array([[ids, ends + [-1] * (len(ids) - len(ends))]], dtype=np.int32)
    dtypes = {tensor.name: tensor.dtype for tensor in contract.llm_inputs(reference=True)}
    numpy_types = {"INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_}
    return np.array([[value]], dtype=numpy_types[dtypes[name]])


def tokens_of(result: Any) -> list[int]:
    ids, length = result.as_numpy("output_ids"), result.as_numpy("sequence_length")
    assert ids.shape[:2] == (1, 1)
    assert ids.shape[2] == length.reshape(-1)[0]
    return ids[0, 0].tolist()  # type: ignore[no-any-return]


class Stream:
    """A gRPC stream on a connection of its own."""

    def __init__(self, url: str) -> None:
        self.responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.connection = grpc.InferenceServerClient(url)
        self.connection.start_stream(lambda result, error: self.responses.put((result, error)))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.stop_stream(cancel_requests=True)
        self.connection.close()

    def send(self, model: str, tensors: list[Any], request_id: str = "") -> None:
        self.connection.async_stream_infer(model, tensors, request_id=request_id, enable_empty_final_response=True)

    def receive(self) -> tuple[Any, bool]:
        """The next response, and whether it is its request's last."""
        result, error = self.responses.get(timeout=PATIENCE_S)
        if error is not None:
            raise error
        return result, result.get_response().parameters["triton_final_response"].bool_param

    def answers(self, model: str, tensors: list[Any], request_id: str = "") -> list[Any]:
        """All responses to one request."""
        self.send(model, tensors, request_id)
        results = []
        while True:
            result, final = self.receive()
            results.append(result)
            if final:
                return results


@pytest.fixture
def stream(server: Any) -> Iterator[Stream]:
    with Stream(server.grpc_url) as opened:
        yield opened


def unary(client: Any, prompt: list[int], count: int, **more: Any) -> list[int]:
    """The answer of `unary`, which leaves the prompt out."""
    return tokens_of(client.infer("unary", inputs(prompt, count, **more), client_timeout=PATIENCE_S))


def metrics(server: Any, model: str) -> dict[str, float]:
    """What a model reports of itself."""
    with urllib.request.urlopen(server.metrics_url, timeout=PATIENCE_S) as answer:  # noqa: S310
        text = answer.read().decode()
    found = re.findall(rf'^trtkit_reference_(\w+){{model="{model}",version="1"}} (\S+)$', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_concurrent_answers_equal_transformers(client: Any, greedy: Any) -> None:
    """Twice as many as there are slots, of different lengths."""
    plan = {seed: (prompt_of(seed, 3 + 5 * seed), 30 - 3 * seed) for seed in range(8)}
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    for seed, (prompt, count) in plan.items():
        client.async_infer(
            "unary",
            inputs(prompt, count),
            callback=lambda result, error, seed=seed: answers.put((seed, result, error)),
        )
    for _ in plan:
        seed, result, error = answers.get(timeout=PATIENCE_S)
        assert error is None
        assert tokens_of(result) == greedy(*plan[seed])


def test_concurrent_streams_equal_transformers(stream: Stream, greedy: Any) -> None:
    plan = {str(seed): (prompt_of(seed, 3 + 5 * seed), 40 - 3 * seed) for seed in range(8)}
    for name, (prompt, count) in plan.items():
        stream.send("streams", inputs(prompt, count, streaming=True), name)
    received: dict[str, list[int]] = {name: [] for name in plan}
    open_requests = set(plan)
    while open_requests:
        result, final = stream.receive()
        name = result.get_response().id
        new = tokens_of(result)
        assert len(new) == 1
        received[name] += new
        if final:
            open_requests.remove(name)
    assert received == {name: greedy(*request) for name, request in plan.items()}


def test_a_model_that_is_not_decoupled_batches_too(client: Any, greedy: Any) -> None:
    """A short request overtakes a long one, so `execute` does not wait for the answer and both run at once."""
    answers: queue.Queue[str] = queue.Queue()
    client.async_infer("unary", inputs(prompt_of(1), 450), callback=lambda result, error: answers.put("long"))
    short = prompt_of(2)
    client.async_infer("unary", inputs(short, 2), callback=lambda result, error: answers.put("short"))
    assert [answers.get(timeout=PATIENCE_S) for _ in range(2)] == ["short", "long"]
    assert unary(client, short, 2) == greedy(short, 2)


def test_the_prompt_is_echoed_unless_excluded(client: Any, stream: Stream, greedy: Any) -> None:
    prompt = prompt_of(3)
    answer = greedy(prompt, 6)
    (whole,) = stream.answers("streams", inputs(prompt, 6))
    assert tokens_of(whole) == prompt + answer
    (bare,) = stream.answers("streams", inputs(prompt, 6, exclude_input_in_output=True))
    assert tokens_of(bare) == answer
    assert unary(client, prompt, 6) == answer
    assert unary(client, prompt, 6, exclude_input_in_output=False) == prompt + answer


def test_an_end_id_ends_a_stream_with_an_empty_response(stream: Stream, greedy: Any) -> None:
    prompt = prompt_of(4)
    answer = greedy(prompt, 12)
    end = next(token for token in answer[4:] if answer.index(token) >= 4)
    pieces = [tokens_of(result) for result in stream.answers("streams", inputs(prompt, 12, end_id=end, streaming=True))]
    assert pieces == [[token] for token in answer[: answer.index(end)]] + [[]]
    (whole,) = stream.answers("streams", inputs(prompt, 12, end_id=end, exclude_input_in_output=True))
    assert tokens_of(whole) == answer[: answer.index(end)]


@pytest.mark.parametrize("ends_early", [False, True])
def test_streams_come_whole_through_an_ensemble(stream: Stream, greedy: Any, ends_early: bool) -> None:
    prompt = prompt_of(4)
    answer = greedy(prompt, 12)
    end = next(token for token in answer[4:] if answer.index(token) >= 4) if ends_early else -1
    results = stream.answers("joined", inputs(prompt, 12, end_id=end, streaming=True))
    texts = [result.as_numpy("OUTPUT") for result in results]
    words = [text.reshape(-1)[0].decode() for text in texts if text is not None]
    kept = answer[: answer.index(end)] if ends_early else answer
    assert [word for word in words if word] == [str(token) for token in kept]
    assert len(words) - len(kept) == ends_early  # the empty piece went through as well
    (whole,) = stream.answers("joined", inputs(prompt, 5))
    assert whole.as_numpy("OUTPUT").reshape(-1)[0].decode() == " ".join(map(str, prompt + greedy(prompt, 5)))


def test_words(client: Any, greedy: Any) -> None:
    prompt = prompt_of(5)
    answer = greedy(prompt, 10)
    stop = answer[3:5]
    ends_at = next(index for index in range(1, 10) if answer[index - 1 : index + 1] == stop)
    assert unary(client, prompt, 10, stop_words_list=[[130, 129], stop]) == answer[: ends_at + 1]
    without = unary(client, prompt, 10, bad_words_list=[[answer[0]], [130, 129]])
    assert answer[0] not in without
    assert len(without) == 10


def test_min_tokens_and_several_end_ids(client: Any, checkpoint: Path, tmp_path: Path, greedy: Any) -> None:
    """A model with two end ids of its own, in a server of its own: ids are known only after a look at the answer.

    Nobody else asks this server, so it is here that the model's own metrics are known.
    """
    prompt = prompt_of(6)
    answer = greedy(prompt, 12)
    first, second = answer[5], answer[3]
    add_model(tmp_path, "ends", checkpoint, slots=2, decoupled=False, end_ids=f"{first}, {second}")
    expected = answer[: min(answer.index(first), answer.index(second))]
    with running_server(tmp_path) as deployment, grpc.InferenceServerClient(deployment.grpc_url) as connection:
        answers: list[list[int]] = []

        def ask(**more: Any) -> list[int]:
            more["exclude_input_in_output"] = True
            result = connection.infer("ends", inputs(prompt, 12, **more), client_timeout=PATIENCE_S)
            answers.append(tokens_of(result))
            return answers[-1]

        assert ask() == expected
        for named in (first, second):
            assert ask(end_id=named) == answer[: answer.index(named)]  # that one alone, as with the engine
        assert ask(end_id=-1) == answer
        longer = ask(min_tokens=len(expected) + 3)
        assert len(longer) >= len(expected) + 3
        assert longer[: len(expected)] == expected
        assert not {first, second} & set(longer)
        limit = time.monotonic() + PATIENCE_S
        while (found := metrics(deployment, "ends"))["requests_total"] < len(answers):
            assert time.monotonic() < limit, found
            time.sleep(0.1)
        assert found == {
            "requests_total": len(answers), "generated_tokens_total": sum(map(len, answers)),
            "cancelled_requests_total": 0, "running_sequences": 0, "waiting_requests": 0,
        }  # fmt: skip


def test_a_seed_makes_a_request_reproducible_in_any_company(client: Any) -> None:
    def ask(seed: int) -> list[int]:
        return unary(client, prompt_of(7), 20, seed=seed, temperature=2.0, runtime_top_k=50, runtime_top_p=0.95)

    alone = ask(2**63 + 1)
    others: queue.Queue[Any] = queue.Queue()
    for seed in range(3):
        client.async_infer("unary", inputs(prompt_of(seed, 20), 60), callback=lambda result, error: others.put(error))
    assert ask(2**63 + 1) == alone
    assert ask(5) != alone
    assert [others.get(timeout=PATIENCE_S) for _ in range(3)] == [None] * 3


def test_log_probs_are_those_of_the_model(client: Any, stream: Stream, greedy: Any) -> None:
    prompt = prompt_of(8)
    answer = greedy(prompt, 5)
    with torch.inference_mode():
        logits = _model[0](torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].numpy()
    result = client.infer("unary", inputs(prompt, 5, return_log_probs=True), client_timeout=PATIENCE_S)
    np.testing.assert_allclose(result.as_numpy("output_log_probs")[0, 0], expected, atol=1e-4)
    np.testing.assert_allclose(result.as_numpy("cum_log_probs")[0, 0], expected.sum(), atol=1e-4)
    pieces = stream.answers("streams", inputs(prompt, 5, return_log_probs=True, streaming=True))
    np.testing.assert_allclose([p.as_numpy("output_log_probs")[0, 0, 0] for p in pieces], expected, atol=1e-4)
    np.testing.assert_allclose(pieces[-1].as_numpy("cum_log_probs")[0, 0], expected.sum(), atol=1e-4)


def test_a_batch_in_one_request(client: Any, stream: Stream, greedy: Any) -> None:
    """Not decoupled: one response with a row per prompt. Decoupled: responses of their own that say which row."""
    prompts = [prompt_of(1, 6), prompt_of(2, 3)]
    batch = inputs(prompts[0], 4)
    for tensor, array in zip(batch, ([prompts[0], prompts[1] + [0, 0, 0]], [[6], [3]], [[4], [2]]), strict=True):
        tensor.set_shape([2, len(array[0])])
        tensor.set_data_from_numpy(np.array(array, dtype=np.int32))
    result = client.infer("unary", batch, client_timeout=PATIENCE_S)
    rows = [greedy(prompts[0], 4), greedy(prompts[1], 2)]
    lengths = result.as_numpy("sequence_length")[:, 0].tolist()
    assert [result.as_numpy("output_ids")[i, 0, : lengths[i]].tolist() for i in range(2)] == rows
    received: dict[int, list[int]] = {0: [], 1: []}
    streaming = grpc.InferInput("streaming", [2, 1], "BOOL")
    streaming.set_data_from_numpy(np.array([[True], [True]]))
    for piece in stream.answers("streams", [*batch, streaming]):
        received[int(piece.as_numpy("batch_index")[0, 0])] += tokens_of(piece)
    assert [received[0], received[1]] == rows


@pytest.mark.parametrize("streaming", [True, False])
def test_cancelling_frees_the_slot(server: Any, stream: Stream, streaming: bool, greedy: Any) -> None:
    with Stream(server.grpc_url) as doomed:
        doomed.send("single", inputs(prompt_of(1), ENDLESS, streaming=streaming))
        if streaming:
            doomed.receive()  # it runs
    prompt = prompt_of(2)
    (answer,) = stream.answers("single", inputs(prompt, 3, exclude_input_in_output=True))
    assert tokens_of(answer) == greedy(prompt, 3)


def test_cancelling_a_unary_request(client: Any, greedy: Any) -> None:
    """Endless requests fill all slots of a model that is not decoupled, and its queue."""
    errors: queue.Queue[Any] = queue.Queue()
    calls = [
        client.async_infer("unary", inputs(prompt_of(seed), ENDLESS), callback=lambda result, error: errors.put(error))
        for seed in range(8)
    ]
    for call in calls:
        call.cancel()
    for _ in calls:
        assert "cancel" in str(errors.get(timeout=PATIENCE_S)).lower()
    assert unary(client, prompt_of(2), 3) == greedy(prompt_of(2), 3)


def test_stop_ends_the_running_request_of_the_same_id(stream: Stream, greedy: Any) -> None:
    stream.send("single", inputs(prompt_of(1), ENDLESS, streaming=True), "r1")
    stream.receive()
    stream.send("single", inputs([1], 1, stop=True), "r1")
    finals = 0
    while finals < 2:  # the stop request's empty answer, and the end of the one it stopped
        finals += stream.receive()[1]
    prompt = prompt_of(2)
    (answer,) = stream.answers("single", inputs(prompt, 3, exclude_input_in_output=True))
    assert tokens_of(answer) == greedy(prompt, 3)


BAD: dict[str, dict[str, Any]] = {
    "input_ids: 131 is not in the vocabulary": {"input_ids": np.array([[131]], dtype=np.int32)},
    "input_ids: shape [1, 0] holds no prompt": {"input_ids": np.zeros((1, 0), dtype=np.int32)},
    "input_lengths: 9 is not": {"input_lengths": 9},
    "request_output_len: 0 is not at least 1": {"request_output_len": 0},
    "request_output_len: 800000 tokens after a prompt of 1": {"request_output_len": 2 * ENDLESS},
    "temperature: nan": {"temperature": float("nan")},
    "runtime_top_p: 1.5": {"runtime_top_p": 1.5},
    "beam_width: 4": {"beam_width": 4},
    "stop_words_list: the offsets": {"stop_words_list": np.array([[[1, 2], [2, 1]]], dtype=np.int32)},
    "streaming: the model is not decoupled": {"streaming": True},
    "stop: the request has no id": {"stop": True},
}


@pytest.mark.parametrize("cause", BAD)
def test_wrong_requests_get_an_error_at_once(client: Any, greedy: Any, cause: str) -> None:
    arrays = {"input_ids": np.array([[5]], dtype=np.int32), "input_lengths": 1, "request_output_len": 2, **BAD[cause]}
    tensors = inputs([5], 2, **arrays)
    with pytest.raises(InferenceServerException) as error:
        client.infer("unary", tensors, client_timeout=PATIENCE_S)
    assert cause in str(error.value)
    assert unary(client, [5], 2) == greedy([5], 2)


def test_a_wrong_request_in_a_stream(stream: Stream, greedy: Any) -> None:
    with pytest.raises(InferenceServerException, match="temperature: -1"):
        stream.answers("streams", inputs([5], 2, temperature=-1.0, streaming=True))
    (answer,) = stream.answers("streams", inputs([5], 2, exclude_input_in_output=True))
    assert tokens_of(answer) == greedy([5], 2)


def test_a_missing_checkpoint_is_named_when_the_server_starts(tmp_path: Path) -> None:
    add_model(tmp_path, "lost", tmp_path / "nowhere", slots=2, decoupled=False)
    with pytest.raises(CheckFailedError, match="nowhere"), running_server(tmp_path):
        pass
