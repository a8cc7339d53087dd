"""A served side: what is asked of it, what is made of its answers. The client is a stand-in; tests/integration has a
real server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from trtkit import contract, serving_contract
from trtkit.client import ServerError
from trtkit.errors import InputError, LacksError
from trtkit.evaluate import comparison, served
from trtkit.evaluate.comparison import Side, evaluate
from trtkit.evaluate.next_tokens import compare_next_tokens, prefix_lengths
from trtkit.evaluate.scores import logits_of, score
from trtkit.evaluate.served import ServedModel

TOKENS = np.random.default_rng(1).integers(3, 300, (3, 17)).astype(np.int64)


class StandInClient:
    """An engine model that computes with a transformers model, and refuses inputs that the contract does not have.

    Attributes:
        logits: whether the engine was built to return them.
        log_probs: "full" over the vocabulary, or "none": 0 for every token.
        echo: the answer begins with the prompt.
    """

    def __init__(self, model: Any, *, reference: bool = True) -> None:
        self.url, self.model, self.protocol = "grpc://stand-in:1", "tensorrt_llm", "grpc"
        self._logits = logits_of(model)
        self.reference = reference
        self.logits, self.log_probs, self.echo, self.live = True, "full", False, True
        self.asked: list[dict[str, Any]] = []
        self.running = self.most = 0
        self.closed = False
        self.names = ["tensorrt_llm"]

    async def models(self, **options: Any) -> dict[str, str]:
        return dict.fromkeys(self.names, "READY")

    async def is_live(self, **options: Any) -> bool:
        return self.live

    async def close(self) -> None:
        self.closed = True

    async def metadata(self, model: str, **options: Any) -> dict[str, Any]:
        if model == "llm" and model in self.names:
            tables = {"inputs": serving_contract.INPUTS, "outputs": serving_contract.OUTPUTS}
            return {side: [{"name": tensor.name} for tensor in table] for side, table in tables.items()}
        if model not in self.names or model != "tensorrt_llm":
            raise ServerError(f"unknown model '{model}'", model=model)
        tables = {
            "inputs": contract.llm_inputs(reference=self.reference),
            "outputs": contract.llm_outputs(reference=self.reference),
        }
        return {side: [{"name": tensor.name} for tensor in table] for side, table in tables.items()}

    async def infer(self, model: str, inputs: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
        import asyncio

        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        values = {tensor.name: tensor.data for tensor in inputs}
        assert values.keys() <= {tensor.name for tensor in contract.llm_inputs(reference=self.reference)}
        self.asked.append(values)
        if values.get("return_context_logits") and not self.logits:
            raise ServerError("need to build engine with gather_context")
        ids = list(values["input_ids"])
        with torch.inference_mode():
            rows = self._logits(torch.tensor([ids]))[0]
        token = int(rows[-1].argmax())
        log_prob = float(rows[-1].log_softmax(dim=-1)[token]) if self.log_probs == "full" else 0.0
        tokens = [*ids, token] if self.echo else [token]
        answer = {
            "output_ids": np.array([[tokens]], np.int32),
            "output_log_probs": np.array([[[log_prob]]], np.float32),
        }
        if values.get("return_context_logits"):
            answer["context_logits"] = rows.numpy()[None]
        return [answer, {"output_ids": np.empty((1, 1, 0), np.int32)}]


@pytest.fixture
def client(llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> StandInClient:
    standin = StandInClient(llama())
    monkeypatch.setattr(served, "connect", lambda url, **options: standin)
    return standin


def test_lengths_of_prefixes() -> None:
    assert prefix_lengths(17, 4) == [4, 8, 12, 16]
    assert prefix_lengths(512, 1) == [511]
    assert prefix_lengths(3, 8) == [1, 2]


def test_a_server_of_the_same_model_agrees(client: StandInClient, llama: Callable[..., Any]) -> None:
    with ServedModel(client, "tensorrt_llm") as side:  # type: ignore[arg-type]
        found = compare_next_tokens(side, TOKENS, logits_of(llama()))
    assert found.prefixes == 12 and found.top1_agreement == 1 and found.disagreement_margin is None
    assert found.log_prob_difference == pytest.approx(0, abs=1e-5)
    assert client.closed and client.most <= 8
    lengths = [len(values["input_ids"]) for values in client.asked]
    assert lengths == [4, 8, 12, 16] * 3
    for values in client.asked:
        assert values["request_output_len"] == (1,) and values["runtime_top_k"] == (1,) and values["end_id"] == (-1,)


def test_a_server_of_another_model_does_not(client: StandInClient, llama: Callable[..., Any]) -> None:
    model = llama(1)
    with ServedModel(client, "tensorrt_llm") as side:  # type: ignore[arg-type]
        found = compare_next_tokens(side, TOKENS, logits_of(model))
        turned = compare_next_tokens(logits_of(model), TOKENS, side)
    assert found == turned
    agreed, differences, margins = 0, [], []
    for window in TOKENS:
        for length in (4, 8, 12, 16):
            ids = torch.from_numpy(window[None, :length])
            with torch.inference_mode():
                ours, theirs = (m(ids).logits[0, -1].double().log_softmax(-1).numpy() for m in (model, llama()))
            token = int(theirs.argmax())
            agreed += token == int(ours.argmax())
            differences.append(abs(ours[token] - theirs[token]))
            if token != int(ours.argmax()):
                margins.append(ours.max() - ours[token])
    assert found.top1_agreement == agreed / 12 < 1
    assert found.log_prob_difference == pytest.approx(np.mean(differences), rel=1e-4)
    assert found.disagreement_margin == pytest.approx(np.mean(margins), rel=1e-4)


def test_an_engine_that_repeats_the_prompt_and_tells_no_probabilities(
    client: StandInClient, llama: Callable[..., Any]
) -> None:
    client.echo, client.log_probs = True, "none"
    with ServedModel(client, "tensorrt_llm") as side:  # type: ignore[arg-type]
        found = compare_next_tokens(side, TOKENS, logits_of(llama()))
    assert found.top1_agreement == 1 and found.log_prob_difference is None


def test_two_servers(llama: Callable[..., Any]) -> None:
    one, other = StandInClient(llama()), StandInClient(llama(1))
    with ServedModel(one, "tensorrt_llm") as a, ServedModel(other, "tensorrt_llm") as b:  # type: ignore[arg-type]
        same = compare_next_tokens(a, TOKENS, a)
        found = compare_next_tokens(b, TOKENS, a)
    assert same.top1_agreement == 1 and same.log_prob_difference == 0
    assert found.top1_agreement < 1 and found.disagreement_margin is None


def test_two_models_that_run_here_are_no_case_for_this(llama: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="compared by their logits"):
        compare_next_tokens(logits_of(llama()), TOKENS, logits_of(llama()))


def test_a_token_that_the_model_does_not_have(client: StandInClient, llama: Callable[..., Any]) -> None:
    small = logits_of(llama(vocab_size=4))
    client._logits = lambda ids: torch.nn.functional.one_hot(torch.full_like(ids, 299), 300).float()
    with (
        ServedModel(client, "tensorrt_llm") as side,  # type: ignore[arg-type]
        pytest.raises(InputError, match="the server answers token 299, the model has 4"),
    ):
        compare_next_tokens(side, TOKENS % 4, small)


# --- a server with logits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_an_engine_that_returns_logits_is_measured_like_any_model(
    client: StandInClient,
    llama: Callable[..., Any],
    sources: dict[str, Any],
    flat: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client.reference = False
    infer = client.infer

    async def over_http(*args: Any, **options: Any) -> list[dict[str, Any]]:
        return [{name: array.reshape(-1) for name, array in answer.items()} for answer in await infer(*args, **options)]

    if flat:
        monkeypatch.setattr(client, "infer", over_http)
    reference = Side("source", str(sources["other"]))
    found = evaluate(reference, Side("served", "grpc://x:1"), TOKENS, limit=10.0)
    assert found.scores is not None and found.next_tokens is None and found.missing is None
    from trtkit.evaluate.models import load_source

    wanted = score(llama(), TOKENS, load_source(sources["other"]))
    assert found.scores.to_dict() == pytest.approx(wanted.to_dict(), rel=1e-5)
    assert found.scores.mean_kl > 0.1


WITHOUT_LOGITS = {
    "no such output": ({"reference": True}, "has no output 'context_logits'"),
    "engine built without": ({"reference": False, "logits": False}, "need to build engine with gather_context"),
}


@pytest.mark.parametrize("case", WITHOUT_LOGITS)
def test_a_server_without_logits_says_what_is_missing(
    client: StandInClient, sources: dict[str, Any], case: str
) -> None:
    changes, why = WITHOUT_LOGITS[case]
    for name, value in changes.items():
        setattr(client, name, value)
    one, other = Side("source", str(sources["one"])), Side("served", "grpc://x:1")
    found = evaluate(one, other, TOKENS, prefixes=2)
    assert found.scores is None and found.next_tokens is not None and found.next_tokens.prefixes == 6
    assert found.missing is not None and set(found.missing) == {"perplexity", "KL divergence"}
    assert all(why in reason for reason in found.missing.values())
    assert found.passed and found.to_dict()["scores"] is None
    with pytest.raises(InputError, match="gives no logits"):
        evaluate(one, other, TOKENS, limit=0.02)


def test_logits_of_a_wrong_shape_are_none(client: StandInClient, monkeypatch: pytest.MonkeyPatch) -> None:
    client.reference = False

    async def infer(*args: Any, **options: Any) -> list[dict[str, Any]]:
        return [{"output_ids": np.array([[[5]]]), "context_logits": np.zeros((1, 1, 1), np.float32)}]

    monkeypatch.setattr(client, "infer", infer)
    with ServedModel(client, "tensorrt_llm") as side:  # type: ignore[arg-type]
        side.probe([1, 2, 3])
    assert "context_logits of shape [1, 1, 1]" in side.missing


def test_a_server_that_is_not_there(client: StandInClient, sources: dict[str, Any]) -> None:
    client.live = False
    with pytest.raises(LacksError, match="no server answers at"):
        evaluate(Side("served", "grpc://x:1"), Side("source", str(sources["one"])), TOKENS)
    assert client.closed
    client.live = True
    with pytest.raises(ServerError, match="unknown model 'nope'"):
        evaluate(Side("served", "grpc://x:1", "nope"), Side("source", str(sources["one"])), TOKENS)


@pytest.mark.parametrize(
    ("model", "lacks"), [("tensorrt_llm", "there is no model 'tensorrt_llm'"), ("llm", "no tokens")]
)
def test_a_server_whose_model_takes_text(
    client: StandInClient, sources: dict[str, Any], model: str, lacks: str
) -> None:
    client.names = ["llm"]
    with pytest.raises(InputError, match=f"model 'llm' takes text and {lacks}") as error:
        evaluate(Side("source", str(sources["one"])), Side("served", "grpc://x:1", model), TOKENS)
    assert "topology: ensemble" in error.value.fix and client.closed


def test_the_same_side_twice_is_loaded_once(sources: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    side = Side("source", str(sources["one"]))
    found = comparison.evaluate(side, side, TOKENS, on_step=steps.append)
    assert len(steps) == 1 and found.scores is not None and found.scores.mean_kl == 0
