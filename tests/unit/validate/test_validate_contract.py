"""The contract check: silent on a server that keeps it, and each breach named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from standin_client import StandInClient

from trtkit.validate import Subject, contract

SUBJECT = Subject(streaming=True, max_batch_size=4)


def tensor(configs: dict[str, Any], model: str, kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(item for item in configs[model][kind] if item["name"] == name)
    return found


async def test_a_server_that_keeps_the_contract(client: StandInClient) -> None:
    found = await contract.check(SUBJECT, [client])
    assert found.outcome == "passed" and found.findings == ()
    assert "4 models ready" in found.detail
    tables = [contract.TEXT, contract.ENGINE, *contract.STEPS.values()]
    assert [(len(table.inputs), len(table.outputs)) for table in tables] == [(16, 1), (13, 2), (4, 3), (2, 1)]
    assert found.figures["tensors"] == 42


async def test_more_optional_inputs_and_more_outputs_are_fine(client: StandInClient) -> None:
    client.configs["ensemble"]["input"].append({"name": "x", "data_type": "TYPE_FP32", "dims": [1], "optional": True})
    client.configs["ensemble"]["output"].append({"name": "logits", "data_type": "TYPE_FP32", "dims": [-1]})
    assert (await contract.check(SUBJECT, [client])).findings == ()


BREACHES: list[tuple[Callable[[StandInClient], Any], str, str, str]] = [
    (lambda c: setattr(c, "ready", False), "TK701", "grpc://stand-in:1", "not ready"),
    (lambda c: c.configs.pop("tensorrt_llm"), "TK702", "tensorrt_llm", "no such model"),
    (lambda c: c.configs.pop("postprocessing"), "TK702", "postprocessing", "no such model"),
    (lambda c: c.configs.pop("ensemble"), "TK702", "ensemble", "no such model; it has: postprocessing, pre"),
    (lambda c: c.unready.add("ensemble"), "TK702", "ensemble", "not ready (state UNAVAILABLE)"),
    (lambda c: c.configs["ensemble"].pop("max_batch_size"), "TK703", "ensemble", "max_batch_size is 0"),
    (
        lambda c: c.configs["ensemble"]["input"].remove(tensor(c.configs, "ensemble", "input", "seed")),
        "TK704",
        "ensemble/seed",
        "the input is missing",
    ),
    (
        lambda c: tensor(c.configs, "ensemble", "input", "seed").update(data_type="TYPE_INT32"),
        "TK704",
        "ensemble/seed",
        "INT32, not UINT64",
    ),
    (
        lambda c: tensor(c.configs, "tensorrt_llm", "output", "output_ids").update(dims=[-1]),
        "TK704",
        "tensorrt_llm/output_ids",
        "dims [-1], not [-1, -1]",
    ),
    (
        lambda c: tensor(c.configs, "ensemble", "output", "text_output").update(name="text"),
        "TK704",
        "ensemble/text_output",
        "the output is missing",
    ),
    (
        lambda c: tensor(c.configs, "ensemble", "input", "stop_words").update(optional=False),
        "TK705",
        "ensemble/stop_words",
        "required, not optional",
    ),
    (
        lambda c: tensor(c.configs, "ensemble", "input", "max_tokens").update(optional=True),
        "TK705",
        "ensemble/max_tokens",
        "optional, not required",
    ),
    (
        lambda c: c.configs["ensemble"]["input"].append({"name": "extra", "data_type": "TYPE_FP32", "dims": [1]}),
        "TK705",
        "ensemble/extra",
        "do not send",
    ),
    (
        lambda c: c.configs["tensorrt_llm"].pop("model_transaction_policy"),
        "TK706",
        "tensorrt_llm",
        "is not decoupled, but serving.streaming is true",
    ),
    (lambda c: c.configs["ensemble"].update(max_batch_size=2), "TK707", "ensemble", "2, but"),
]
WARNINGS = {"ensemble/max_tokens", "TK707"}


@pytest.mark.parametrize(("breach", "number", "place", "cause"), BREACHES)
async def test_each_breach_is_named(
    breach: Callable[[StandInClient], Any], number: str, place: str, cause: str, client: StandInClient
) -> None:
    breach(client)
    found = await contract.check(SUBJECT, [client])
    (finding,) = [item for item in found.findings if item.place == place]
    assert finding.id == number and cause in finding.cause and finding.fix
    assert finding.severity == ("warning" if {place, number} & WARNINGS else "error")
    assert found.passed == (finding.severity == "warning")


async def test_streaming_off_wants_models_that_answer_once(client: StandInClient) -> None:
    found = await contract.check(Subject(streaming=False), [client])
    assert {finding.place for finding in found.findings} == {"ensemble", "tensorrt_llm"}
    assert all("is decoupled, but serving.streaming is false" in finding.cause for finding in found.findings)


async def test_nothing_is_demanded_that_nobody_configured(client: StandInClient) -> None:
    client.configs["ensemble"]["max_batch_size"] = 99
    assert (await contract.check(Subject(), [client])).findings == ()
