"""The tables of NVIDIA's tensors and parameters against NVIDIA's own files, and values that the backend cannot read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trtkit import contract
from trtkit.contract_tensors import in_range
from trtkit.repository.layouts.backend_parameters import PARAMETERS, problem

UPSTREAM = json.loads((Path(__file__).parents[2] / "data" / "trtllm_backend_contract.json").read_text())


def upstream(kind: str, version: str) -> dict[str, Any]:
    """Names and specifications at a tag of NVIDIA's repository."""
    order = UPSTREAM["tags"]
    return {
        name: spec
        for name, runs in UPSTREAM[kind].items()
        for first, last, spec in runs
        if order.index(first) <= order.index(version) <= order.index(last)
    }


@pytest.mark.parametrize("version", UPSTREAM["tags"])
def test_tensors_and_parameters_are_those_of_nvidias_files(version: str) -> None:
    for kind, ours in (
        ("inputs", contract.llm_inputs(version=version, logits_dtype="LOGITS")),
        ("outputs", contract.llm_outputs(version=version, logits_dtype="LOGITS")),
    ):
        theirs = upstream(kind, version)
        if not in_range(version, "0.17", ""):  # FP32 then, with no placeholder
            theirs = {k: ["LOGITS", *v[1:]] if "logits" in k and v[0] == "FP32" else v for k, v in theirs.items()}
        given = {}
        for one in ours:
            flags = (("optional", one.optional), ("ragged", one.ragged), ("scalar", one.scalar))
            given[one.name] = [one.dtype, list(one.dims), [name for name, on in flags if on]]
        assert given == theirs
    parameters = {name for name, one in PARAMETERS.items() if in_range(version, one.since, one.until)}
    hidden = {"recv_poll_period_ms"} if in_range(version, "0.13", "") else set()  # read by the code, not in the file
    removed = {"enable_trt_overlap"} if not in_range(version, "0.10", "") else set()  # without effect
    assert parameters - hidden == set(upstream("parameters", version)) - removed


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("max_beam_width", "2", False), ("max_beam_width", "0", True), ("max_beam_width", "2.0", True),
        ("kv_cache_free_gpu_mem_fraction", "0.5", False), ("kv_cache_free_gpu_mem_fraction", "1", True),
        ("kv_cache_free_gpu_mem_fraction", "nan", True), ("gpu_weights_percent", "1", False),
        ("enable_kv_cache_reuse", "True", False), ("enable_kv_cache_reuse", "yes", True),
        ("gpu_device_ids", "0,1;2,3", False), ("gpu_device_ids", "0-1", True), ("gpu_device_ids", "", False),
        ("medusa_choices", "{0}, {0, 1}", False), ("medusa_choices", "[0]", True),
        ("batch_scheduler_policy", "max_utilization", False), ("batch_scheduler_policy", "fifo", True),
        ("something_else", "x", False), ("gpt_model_path", "anything", False),
    ],
)  # fmt: skip
def test_values_that_the_backend_cannot_read(name: str, text: str, wrong: bool) -> None:
    assert (problem(name, text) is not None) is wrong


def test_every_parameters_own_default_is_valid() -> None:
    assert [name for name, one in PARAMETERS.items() if problem(name, one.default)] == []
