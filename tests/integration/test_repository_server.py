"""A generated repository in a real Triton server: text in, the same text out, streamed or not.

`STAND_IN` takes the place of the LLM: it repeats the prompt's tokens, one response per token when it streams, and
answers a batch row by row as the C++ backend does.
"""

from __future__ import annotations

import json
import queue
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from triton_process import Server, serve
from tritonclient import grpc

from trtkit import contract, pbtxt
from trtkit.config_file import parse_config
from trtkit.findings import has_errors
from trtkit.repository.generate import Files, render_repository, write_repository
from trtkit.repository.lint import lint_repository

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("repository_server")]

STAND_IN = """
import numpy as np
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            self.answer(request)

    def answer(self, request):
        def read(name):
            tensor = pb.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy()

        ids, lengths, budget = read("input_ids"), read("input_lengths"), read("request_output_len")
        streaming = read("streaming")
        # Scalars come as [batch]: the server takes the 1 off.
        assert lengths.shape == (ids.shape[0],), lengths.shape
        assert budget.shape in ((ids.shape[0],), (ids.shape[0], 1)), budget.shape
        assert streaming is None or streaming.shape == (ids.shape[0],), streaming.shape
        assert read("stop_words_list").shape[:2] == (ids.shape[0], 2)
        sender = request.get_response_sender()
        for row in range(ids.shape[0]):
            tokens = ids[row, 1 : lengths[row]][: budget.reshape(-1)[row]]  # without <s>
            step = 1 if streaming is not None and streaming[row] else max(len(tokens), 1)
            for start in range(0, len(tokens), step):
                sender.send(self.piece(tokens[start : start + step], row))
        sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def piece(self, tokens, row):
        tensors = {
            "output_ids": tokens.reshape(1, 1, -1).astype(np.int32),
            "sequence_length": np.array([[len(tokens)]], np.int32),
            "cum_log_probs": np.zeros((1, 1), np.float32),
            "output_log_probs": np.zeros((1, 1, len(tokens)), np.float32),
            "batch_index": np.array([[row]], np.int32),
            "sequence_index": np.array([[0]], np.int32),
        }
        return pb.InferenceResponse([pb.Tensor(name, value) for name, value in tensors.items()])
"""
TEXTS = [
    "The quick brown fox",
    "漢字とかな交じり文 🙂🚀",
    "Grüße aus Köln;\n\tça va, naïve façade?  two  spaces ",
    "Ελληνικά 🏳️‍🌈 кириллица",
]


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer that spells every character beyond ASCII in bytes, one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>", "<|eot|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder


def with_stand_in(files: Files, *, decoupled: bool = True) -> Files:
    """The generated files with the stand-in for the LLM, behind the tensors of the `reference` runtime."""
    config = pbtxt.model_config(
        "tensorrt_llm",
        inputs=contract.llm_inputs(reference=True),
        outputs=contract.llm_outputs(reference=True),
        max_batch_size=8,
        decoupled=decoupled,
        backend="python",
        dynamic_batching={},
    )
    kept = {name: content for name, content in files.items() if not name.startswith("tensorrt_llm/")}
    return {**kept, "tensorrt_llm/config.pbtxt": pbtxt.dumps(config), "tensorrt_llm/1/model.py": STAND_IN}


def generated(source: Path, outputs: Sequence[str] = contract.EXTRA_OUTPUTS) -> Files:
    settings = json.dumps({"max_batch_size": 8, "ensemble_outputs": list(outputs)})
    config = parse_config(f"name: t\nmodel: {{source: x}}\nserving: {settings}\n")
    return with_stand_in(render_repository(config, tokenizer_dir=source, model_path_in_container="/models/engine"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    work = tmp_path_factory.mktemp("serving")
    write_repository(generated(write_tokenizer(work / "source")), work / "repository")
    assert not has_errors(lint_repository(work / "repository"))
    with serve(work / "repository", work) as running:
        yield running


def inputs(texts: list[str] | bytes, **more: Any) -> list[Any]:
    """gRPC inputs of the ensemble."""
    texts_ = [texts] if isinstance(texts, bytes) else [text.encode() for text in texts]
    size = len(texts_)
    values = {
        "text_input": np.array(texts_, dtype=object).reshape(size, 1),
        "max_tokens": np.full((size, 1), more.pop("max_tokens", 500), np.int32),
        **more,
    }
    names = {"object": "BYTES", "int32": "INT32", "bool": "BOOL", "float32": "FP32"}
    tensors = []
    for name, value in values.items():
        tensor = grpc.InferInput(name, list(value.shape), names[str(value.dtype)])
        tensor.set_data_from_numpy(value)
        tensors.append(tensor)
    return tensors


Pieces = dict[str, list[tuple[str, int]]]


def ask(server: Server, requests: dict[str, list[Any]]) -> tuple[Pieces, list[str]]:
    """Sends all requests (id to inputs) at once: (text, batch index) of every piece by id, and the errors."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    pieces: Pieces = {name: [] for name in requests}
    errors: list[str] = []
    try:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for name, tensors in requests.items():
            client.async_stream_infer("ensemble", tensors, request_id=name, enable_empty_final_response=True)
        finals = 0
        while finals + len(errors) < len(requests):
            result, error = answers.get(timeout=60)
            if error is not None:
                errors.append(str(error))
                continue
            response = result.get_response()
            text = result.as_numpy("text_output")
            if text is not None:
                rows = result.as_numpy("batch_index")
                index = 0 if rows is None else int(rows.reshape(-1)[0])
                pieces[response.id] += [(item.decode(), index) for item in text.reshape(-1)]
            finals += response.parameters["triton_final_response"].bool_param
        client.stop_stream()
    finally:
        client.close()
    return pieces, errors


STREAM = {"stream": np.array([[True]])}


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_or_not_the_text_is_the_same(server: Server, text: str) -> None:
    pieces, errors = ask(server, {"whole": inputs([text]), "stream": inputs([text], **STREAM)})
    assert errors == []
    assert [piece for piece, _ in pieces["whole"]] == [text]
    streamed = [piece for piece, _ in pieces["stream"]]
    assert len(streamed) > len(text) / 6
    assert "".join(streamed) == text
    assert not any("\ufffd" in piece for piece in streamed)


def test_streams_at_the_same_time_do_not_mix(server: Server) -> None:
    requests = {f"{number}-{copy}": inputs([text], **STREAM) for number, text in enumerate(TEXTS) for copy in range(8)}
    pieces, errors = ask(server, requests)
    assert errors == []
    for name, found in pieces.items():
        assert "".join(piece for piece, _ in found) == TEXTS[int(name.split("-")[0])]


def test_tensors_that_are_sent_again_stay_good_when_the_shared_memory_grows(tmp_path: Path) -> None:
    """The models keep small tensors in shared memory, where the server reads them each time."""
    source = write_tokenizer(tmp_path / "source")
    ids = Tokenizer.from_file(str(source / "tokenizer.json")).encode("fox ", add_special_tokens=False).ids
    many = np.array([[ids * 400_000]], np.int32)  # far beyond the megabyte that a model begins with
    tokens = grpc.InferInput("TOKENS_BATCH", list(many.shape), "INT32")
    tokens.set_data_from_numpy(many)
    length = grpc.InferInput("SEQUENCE_LENGTH", [1, 1], "INT32")
    length.set_data_from_numpy(np.array([[many.size]], np.int32))
    requests = {f"{number}": inputs([text], **STREAM) for number, text in enumerate(TEXTS)}
    write_repository(generated(source), tmp_path / "repository")
    with serve(tmp_path / "repository", tmp_path) as running:
        client = grpc.InferenceServerClient(f"127.0.0.1:{running.grpc_port}")
        for _ in range(3):
            pieces, errors = ask(running, requests)
            assert errors == []
            assert {name: "".join(text for text, _ in found) for name, found in pieces.items()} == {
                str(number): text for number, text in enumerate(TEXTS)
            }
            answer = client.infer("postprocessing", [tokens, length]).as_numpy("OUTPUT")
            assert answer.reshape(-1)[0].decode() == "fox " * 400_000
        client.close()
    log = running.log.read_text()
    assert running.process.returncode == 0 and "Non-graceful" not in log, log[-3000:]
    assert re.findall(r"Signal \((\d+)\)", log) == ["15"], "a model ended otherwise than by the server's word"


def test_without_batch_index_a_request_has_one_prompt(tmp_path: Path) -> None:
    write_repository(generated(write_tokenizer(tmp_path / "source"), outputs=[]), tmp_path / "repository")
    with serve(tmp_path / "repository", tmp_path) as lean:
        pieces, errors = ask(lean, {"one": inputs([TEXTS[0]], **STREAM), "two": inputs(TEXTS[:2])})
    assert "".join(piece for piece, _ in pieces["one"]) == TEXTS[0]
    (error,) = errors
    assert "the request has 2 prompts" in error


def test_the_rows_of_one_request_do_not_mix(server: Server) -> None:
    pieces, errors = ask(server, {"batch": inputs(TEXTS, stream=np.ones((len(TEXTS), 1), bool))})
    assert errors == []
    for row, text in enumerate(TEXTS):
        assert "".join(piece for piece, index in pieces["batch"] if index == row) == text


def test_without_an_id_a_cut_character_becomes_a_replacement_character(server: Server) -> None:
    status, body = server.http(
        "models/ensemble/generate_stream", {"text_input": "a漢b", "max_tokens": 9, "stream": True}
    )
    texts = [json.loads(line[6:])["text_output"] for line in body.splitlines() if line.startswith("data: ")]
    assert status == 200
    assert "".join(texts) == "a\ufffd\ufffd\ufffdb"
    body_with_id = {"text_input": "a漢b", "max_tokens": 9, "stream": True, "id": "x-1"}
    _, body = server.http("models/ensemble/generate_stream", body_with_id)
    texts = [json.loads(line[6:])["text_output"] for line in body.splitlines() if line.startswith("data: ")]
    assert "".join(texts) == "a漢b"


def test_generate_over_http_takes_nvidias_documented_request(server: Server) -> None:
    request = {"text_input": "lazy dog", "max_tokens": 20, "bad_words": "", "stop_words": ""}
    status, body = server.http("models/ensemble/generate", request)
    assert (status, json.loads(body)["text_output"]) == (200, "lazy dog")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda: inputs([""]), "the prompt is empty"),
        (lambda: inputs(b"\xff"), "the prompt is not UTF-8"),
        (lambda: inputs(["a"], max_tokens=0), "max_tokens must be at least 1, got 0"),
    ],
)
def test_a_wrong_request_is_answered_and_leaves_the_others_alone(
    server: Server, tensors: Callable[[], list[Any]], message: str
) -> None:
    good = {f"good{number}": inputs([text], **STREAM) for number, text in enumerate(TEXTS)}
    pieces, errors = ask(server, {**good, "bad": tensors()})
    assert len(errors) == 1
    assert message in errors[0]
    for number, text in enumerate(TEXTS):
        assert "".join(piece for piece, _ in pieces[f"good{number}"]) == text


def test_the_server_serves_the_contract(server: Server) -> None:
    """What the server says about its models is what the contract says: nothing was dropped or changed on the way."""
    expected = {
        "preprocessing": (contract.PREPROCESSING_INPUTS, contract.PREPROCESSING_OUTPUTS),
        "postprocessing": (contract.POSTPROCESSING_INPUTS, contract.POSTPROCESSING_OUTPUTS),
        "ensemble": (contract.ENSEMBLE_INPUTS, contract.ENSEMBLE_OUTPUTS),
    }
    for model, (ins, outs) in expected.items():
        metadata = json.loads(server.http(f"models/{model}")[1])
        for kind, tensors in (("inputs", ins), ("outputs", outs)):
            found = {item["name"]: (item["datatype"], item["shape"]) for item in metadata[kind]}
            bytes_ = {"STRING": "BYTES"}
            assert found == {t.name: (bytes_.get(t.dtype, t.dtype), [-1, *t.dims]) for t in tensors}


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
def test_the_reference_runtime_answers_like_transformers(
    tmp_path: Path, make_source: Callable[..., Path], streaming: bool
) -> None:
    """The whole way: a random model, converted for two ranks, generated, served; its text is transformers' text.

    Random weights write bytes that are no UTF-8 most of the time, which is the hard case for detokenisation.
    """
    import torch
    import transformers

    from trtkit.config import CheckpointConfig
    from trtkit.convert.conversion import convert
    from trtkit.convert.source import plan_conversion
    from trtkit.hf import open_source

    tokenizer_dir = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    folder = make_source(vocab_size=tokenizer.get_vocab_size(), dtype="float16", num_hidden_layers=2)
    source = open_source(folder)
    convert(plan_conversion(source, CheckpointConfig(tp=2)), source, tmp_path / "checkpoint")
    settings = json.dumps({"runtime": "reference", "max_batch_size": 8, "streaming": streaming})
    config = parse_config(f"name: t\nmodel: {{source: x}}\nserving: {settings}\n")
    files = render_repository(config, tokenizer_dir=tokenizer_dir, checkpoint_dir=tmp_path / "checkpoint")
    write_repository(files, tmp_path / "repository")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def expected(text: str) -> str:
        ids = torch.tensor([tokenizer.encode(text).ids])
        tokens = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=[1, 2], pad_token_id=1)
        said: str = tokenizer.decode(tokens[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
        return said.removesuffix("\ufffd")  # a character that the end cuts is left out

    more = {"max_tokens": 24, "top_k": np.array([[1]], np.int32)}
    with serve(tmp_path / "repository", tmp_path) as server:
        requests = {f"whole{number}": inputs([text], **more) for number, text in enumerate(TEXTS)}
        if streaming:
            streams = {f"stream{number}": inputs([text], **more, **STREAM) for number, text in enumerate(TEXTS)}
            requests = {**requests, **streams}
        pieces, errors = ask(server, requests)
    assert errors == []
    for name, found in pieces.items():
        text = TEXTS[int(name[-1])]
        assert "".join(piece for piece, _ in found).removesuffix("\ufffd") == expected(text), name
    assert streaming == any(len(found) > 1 for found in pieces.values())
