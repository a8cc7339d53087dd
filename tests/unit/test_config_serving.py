"""The keys under `serving`: what goes with what, and what a config said before still means the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trtkit.config_file import load_config, parse_config, with_serving
from trtkit.config_serving import OWNERS, RUNTIMES, TOPOLOGIES, ServingConfig
from trtkit.errors import InputError

CONFIGS = sorted((Path(__file__).parents[2] / "build_configs").glob("*.yaml"))


def serving(text: str, more: str = "") -> ServingConfig:
    return parse_config(f"name: x\nmodel: {{source: a/b}}\n{more}serving: {{{text}}}\n").serving


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_each_runtime_has_a_layout_of_its_own(runtime: str) -> None:
    expected = {"tensorrtllm": "ensemble", "reference": "ensemble"}.get(runtime)
    assert serving(f"runtime: {runtime}").layout == expected
    for topology in ("ensemble", "fused"):
        if topology in TOPOLOGIES[runtime]:  # type: ignore[index]
            assert serving(f"runtime: {runtime}, topology: {topology}").layout == topology
        else:
            with pytest.raises(InputError, match=f"topology '{topology}' does not go with runtime '{runtime}'"):
                serving(f"runtime: {runtime}, topology: {topology}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runtime: vllm, max_queue_size: 3", "max_queue_size needs a model that Triton batches"),
        ("runtime: llmapi, queue: {allow_timeout_override: true}", "queue needs a model that Triton batches"),
        (
            "runtime: reference, decoding_mode: top_k",
            "decoding_mode goes with runtime tensorrtllm, not with 'reference'",
        ),
        ("runtime: python, engine_args: {a: 1}", "engine_args goes with runtime llmapi or vllm"),
        ("runtime: onnxruntime, max_token_wait_ms: 2.0", "max_token_wait_ms goes with runtime tensorrtllm or llmapi"),
        ("warmup: [{max_tokens: 1}]", "warmup.0 needs a prompt"),
        ("runtime: python, warmup: [{size: 2}, {prompt: a}]", "warmup.1 takes no prompt"),
        ("instances: 2, gpu_device_ids: ['0']", "gpu_device_ids has 1 entries for 2 instances"),
        ("gpu_device_ids: ['0,0']", "names a GPU twice in '0,0'"),
        ("gpu_device_ids: ['0,1']", "gives '0,1' to an instance that runs on 1 GPUs"),
        ("gpu_device_ids: ['all']", "should match pattern"),
        ("runtime: llmapi, instances: 2", "gpu_device_ids is needed by several instances"),
        ("runtime: vllm, instances: 2", "need one GPU each"),
        ("response_cache: true", "response_cache holds single answers only; set streaming: false"),
        ("runtime: vllm, response_cache: true, streaming: false", "vLLM's model always streams"),
        ("decoding_mode: lookahead", "needs speculative.lookahead"),
        ("speculative: {medusa_choices: [[0]]}", "speculative.medusa_choices needs decoding_mode: medusa"),
        ("speculative: {eagle_choices: [[]]}", "at least 1 item"),
        ("queue: {default_priority_level: 2}", "default_priority_level (2) exceeds priority_levels (0)"),
        ("lora: {max_rank: 4}", "optimal_rank (8) exceeds max_rank (4)"),
        ("runtime: vllm, topology: fused, max_inflight_requests: 4", "max_inflight_requests needs topology: ensemble"),
        ("version_policy: []", "at least 1 item"),
        ("version_policy: 0", "greater than or equal to 1"),
        ("runtime: llmapi, engine_args: {a: 2024-01-01}", "only what JSON can say"),
        ("runtime: llmapi, engine_args: {a: .nan}", "only what JSON can say"),
        ("max_token_wait_ms: 1000.5", "valid: 0 to 1000"),
        ("rate_limiter: {resources: {'a b': 1}}", "should match pattern"),
        ("runtime: python, python: {function: 'os.system'}", "should match pattern"),
        ("backend_parameters: {a: [1]}", "serving.backend_parameters.a"),
    ],
)
def test_what_does_not_go_together(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        serving(text)
    assert words in caught.value.cause


def test_fused_brings_its_own_queue() -> None:
    found = serving("runtime: vllm, topology: fused, max_queue_size: 3, queue: {default_timeout_microseconds: 5}")
    assert (found.max_queue_size, found.queue.default_timeout_microseconds) == (3, 5)


@pytest.mark.parametrize(("levels", "given", "expected"), [(1, 0, 1), (2, 0, 1), (5, 0, 3), (5, 1, 1), (5, 5, 5)])
def test_the_level_of_requests_that_name_none(levels: int, given: int, expected: int) -> None:
    queue = serving(f"queue: {{priority_levels: {levels}, default_priority_level: {given}}}").queue
    assert queue.default_level == expected


@pytest.mark.parametrize(
    ("text", "decoupled"),
    [
        ("streaming: true", True), ("streaming: false", False), ("runtime: vllm, streaming: false", True),
        ("runtime: llmapi", True), ("runtime: onnxruntime", False), ("runtime: python", False),
    ],
)  # fmt: skip
def test_which_models_stream(text: str, decoupled: bool) -> None:
    assert serving(text).decoupled is decoupled


def test_every_owned_key_is_a_key_with_a_default() -> None:
    for key, runtimes in OWNERS.items():
        assert not ServingConfig.model_fields[key].is_required()
        assert set(runtimes) < set(RUNTIMES)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_survives_being_written_out_in_full(file: Path) -> None:
    config = load_config(file)
    assert parse_config(yaml.safe_dump(config.model_dump())) == config


def test_files_are_found_beside_the_config(tmp_path: Path) -> None:
    for name in ("m.onnx", "f.py", "t.jinja"):
        (tmp_path / name).write_text("")
    file = tmp_path / "c.yaml"
    file.write_text("name: x\nmodel: {source: a/b}\nserving: {runtime: onnxruntime, onnx: {model: m.onnx}}\n")
    assert load_config(file).serving.onnx.model == str(tmp_path / "m.onnx")
    file.write_text("name: x\nmodel: {source: a/b}\nserving: {runtime: python, python: {model: f.py}}\n")
    assert load_config(file).serving.python.model == str(tmp_path / "f.py")
    file.write_text("name: x\nmodel: {source: a/b}\nserving: {chat_template: t.jinja}\n")
    assert load_config(file).serving.chat_template == str(tmp_path / "t.jinja")


def test_another_runtime_is_checked_as_a_whole() -> None:
    config = parse_config("name: x\nmodel: {source: a/b}\nserving: {max_batch_size: 9}\n")
    assert with_serving(config, runtime="vllm").serving.runtime == "vllm"
    assert with_serving(config, topology="fused").serving.layout == "fused"
    assert config.serving.runtime == "tensorrtllm"
    special = parse_config("name: x\nmodel: {source: a/b}\nserving: {decoding_mode: top_k}\n")
    with pytest.raises(InputError, match=r"with serving\.runtime 'vllm': serving: decoding_mode goes with"):
        with_serving(special, runtime="vllm")


values = (
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=4) | st.lists(st.integers(0, 3))
)
keys = st.sampled_from([*ServingConfig.model_fields])


@given(st.dictionaries(keys, values | st.dictionaries(st.text(max_size=8), values, max_size=2), max_size=5))
def test_any_values_are_a_config_or_an_error_for_the_user(data: dict[str, Any]) -> None:
    text = yaml.safe_dump({"name": "x", "model": {"source": "a/b"}, "serving": data})
    try:
        config = parse_config(text, "f.yaml")
    except InputError as error:
        assert all(line.startswith("f.yaml") for line in error.cause.splitlines())
    else:
        assert parse_config(yaml.safe_dump(config.model_dump())) == config
