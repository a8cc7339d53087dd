"""Repositories of all runtimes over a table of options: the same twice, read back as written, fit for the linter."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from trtkit import pbtxt, releases
from trtkit.cli.repo import _RUNTIMES
from trtkit.config_file import parse_config
from trtkit.config_serving import RUNTIMES, TOPOLOGIES
from trtkit.errors import InputError
from trtkit.findings import has_errors
from trtkit.repository.generate import render_repository, size_of, write_repository
from trtkit.repository.layouts import LAYOUTS
from trtkit.repository.layouts.job import Files
from trtkit.repository.layouts.notes import notes
from trtkit.repository.lint import lint_repository


@dataclass(frozen=True)
class Case:
    """One repository: a runtime, the rest of `serving` and other sections as YAML, and what must stand in a file."""

    runtime: str
    serving: str = ""
    more: str = ""
    file: str = "tensorrt_llm/config.pbtxt"
    holds: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


QUEUE = "queue: {default_timeout_microseconds: 5000, timeout_action: delay, allow_timeout_override: true}"
PRIORITY = "queue: {priority_levels: 5}"
LIMITER = "rate_limiter: {resources: {gpu: 2}, priority: 3}"
WARM = "warmup: [{prompt: 'Hello, you', max_tokens: 4, count: 2}]"
OLD = "deploy: {release: '24.10'}\n"
CASES = {
    "engine": Case("tensorrtllm"),
    "engine, one answer": Case("tensorrtllm", "streaming: false, response_cache: true", file="ensemble/config.pbtxt",
                               holds=("response_cache {\n  enable: true",)),
    "engine, queue": Case("tensorrtllm", QUEUE, holds=("timeout_action: DELAY", "default_timeout_microseconds: 5000",
                                                       "allow_timeout_override: true")),
    "engine, priority": Case("tensorrtllm", PRIORITY, holds=("priority_levels: 5", "default_priority_level: 3")),
    "engine, two instances": Case(
        "tensorrtllm", "instances: 2, gpu_device_ids: ['0,1', '2,3']", "checkpoint: {tp: 2}\n",
        holds=("count: 2", '"0,1;2,3"')),
    "engine, cache": Case(
        "tensorrtllm", "kv_cache: {max_tokens: 4096, host_memory_bytes: 1024, max_attention_window: [128, 256], "
        "sink_token_length: 4, cross_fraction: 0.25}, enable_chunked_context: true",
        holds=('"4096"', '"1024"', '"128,256"', '"4"', '"0.25"', "cross_kv_cache_fraction")),
    "engine, LoRA": Case("tensorrtllm", "lora: {max_rank: 32, prefetch_dir: /loras}",
                         holds=("lora_cache_max_adapter_size", '"32"', "lora_prefetch_dir")),
    "engine, Medusa": Case("tensorrtllm", "decoding_mode: medusa, speculative: {medusa_choices: [[0], [0, 1]]}",
                           holds=('"{0}, {0, 1}"',)),
    "engine, lookahead": Case(
        "tensorrtllm", "decoding_mode: lookahead, speculative: {lookahead: {window_size: 7, ngram_size: 6, "
        "verification_set_size: 5}}", holds=("lookahead_ngram_size", '"6"')),
    "engine, grammar": Case("tensorrtllm", "guided_decoding_backend: xgrammar",
                            holds=('"/repository/tensorrt_llm/1/xgrammar_tokenizer_info.json"',)),
    "engine, other parameters": Case(
        "tensorrtllm", "backend_parameters: {cuda_graph_mode: true, gpu_weights_percent: 0.5, num_nodes: 2, "
        "batch_scheduler_policy: max_utilization}", holds=("max_utilization", '"0.5"', "num_nodes")),
    "engine, old release": Case("tensorrtllm", WARM, OLD, holds=("min_length", "random_seed"), lacks=(
        "guided_decoding", "num_nodes", "return_perf_metrics", "kv_cache_reused_blocks", "num_input_tokens",
        "min_tokens", "tokenizer_dir")),
    "engine, bounded ensemble": Case("tensorrtllm", "max_inflight_requests: 16", "deploy: {target: docker}\n",
                                     file="ensemble/config.pbtxt", holds=("max_inflight_requests: 16",)),
    "engine, limiter": Case("tensorrtllm", LIMITER, holds=('name: "gpu"', "priority: 3")),
    "engine, versions": Case("tensorrtllm", "version_policy: all", holds=("version_policy {\n  all",)),
    "reference": Case("reference"),
    "reference, all scheduling": Case(
        "reference", f"{QUEUE}, {LIMITER}, {WARM}, instances: 2, version_policy: 3",
        holds=("num_versions: 3", "count: 2", "prompt0_input_ids", "DELAY")),
    "llmapi": Case("llmapi", file="tensorrt_llm/1/model.yaml", holds=("decoupled: true", "max_batch_size: 0")),
    "llmapi, one answer": Case("llmapi", "streaming: false, response_cache: true, max_batch_size: 5",
                               file="tensorrt_llm/1/model.yaml", holds=("decoupled: false", "max_batch_size: 5")),
    "llmapi, two instances": Case("llmapi", "instances: 2, gpu_device_ids: ['0', '3']", holds=('"0;3"', "count: 2")),
    "llmapi, ranks": Case("llmapi", WARM, "checkpoint: {tp: 4, pp: 2, ep: 2}\nengine: {max_seq_len: 9000}\n",
                          file="tensorrt_llm/1/model.yaml",
                          holds=("tensor_parallel_size: 4", "pipeline_parallel_size: 2", "moe_expert_parallel_size: 2",
                                 "max_seq_len: 9000")),
    "llmapi, arguments": Case(
        "llmapi", "engine_args: {kv_cache_config: {copy_on_partial_reuse: false}, disable_overlap_scheduler: true}, "
        "guided_decoding_backend: xgrammar, kv_cache: {max_tokens: 99}", file="tensorrt_llm/1/model.yaml",
        holds=("  copy_on_partial_reuse: false", "disable_overlap_scheduler: true", "  max_tokens: 99",
               "guided_decoding_backend: xgrammar")),
    "vllm": Case("vllm", file="vllm_model/config.pbtxt", holds=("kind: KIND_MODEL", "decoupled: true")),
    "vllm, fp8 cache": Case("vllm", "", "checkpoint: {quantization: {kv_cache: fp8}}\n",
                            file="vllm_model/1/model.json", holds=('"kv_cache_dtype": "fp8"',)),
    "vllm, ranks": Case("vllm", "gpu_device_ids: ['0,1']", "checkpoint: {tp: 2}\n", file="vllm_model/config.pbtxt",
                        holds=("GPU_DEVICE_IDS", '"0,1"')),
    "vllm, two instances": Case("vllm", f"instances: 2, gpu_device_ids: ['0', '1'], {LIMITER}",
                                file="vllm_model/config.pbtxt", holds=("kind: KIND_GPU", "gpus: 1")),
    "vllm, LoRA": Case("vllm", "lora: {adapters: {french: /loras/fr}}", file="vllm_model/1/multi_lora.json",
                       holds=('"french": "/loras/fr"',)),
    "vllm, arguments": Case("vllm", f"engine_args: {{enforce_eager: true}}, {WARM}", file="vllm_model/1/model.json",
                            holds=('"enforce_eager": true', '"max_num_seqs": 64')),
    "onnxruntime": Case("onnxruntime", "max_batch_size: 16, warmup: [{size: 2}]", file="t/config.pbtxt",
                        holds=('backend: "python"', "max_batch_size: 16", "zero_data: true")),
    "onnxruntime in a container": Case(
        "onnxruntime", f"instances: 2, gpu_device_ids: ['0', '1'], onnx: {{threads: 3}}, {QUEUE}",
        "deploy: {target: docker}\n", file="t/config.pbtxt",
        holds=('backend: "onnxruntime"', "KIND_GPU", "intra_op_thread_count")),
    "onnxruntime, not batched": Case(
        "onnxruntime", "onnx: {batch: false}, response_cache: true", file="t/config.pbtxt",
        holds=("dims: -1\n  dims: 3",), lacks=("dynamic_batching",)),
    "python": Case("python", QUEUE, file="t/config.pbtxt", holds=('key: "texts"', "max_batch_size: 64")),
    "python, not batched": Case("python", "python: {batch: false}, instances: 3", file="t/config.pbtxt",
                                holds=("count: 3",), lacks=("dynamic_batching", "reshape")),
}  # fmt: skip

CODE = """
from typing import Annotated
import numpy as np
from numpy.typing import NDArray

def infer(x: NDArray[np.int32], word: str = "a") -> Annotated[NDArray[np.float32], "y", -1]: ...
"""


@pytest.fixture
def model(source: Path, tmp_path: Path) -> dict[str, Path]:
    """What `model.source` may name, by runtime."""
    (source / "config.json").write_text('{"model_type": "llama"}')
    shape = ["batch", 3]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(body), tmp_path / "m.onnx")
    (tmp_path / "f.py").write_text(CODE)
    return dict.fromkeys(RUNTIMES, source) | {"onnxruntime": tmp_path / "m.onnx", "python": tmp_path / "f.py"}


def render(model: dict[str, Path], case: Case) -> Files:
    config = parse_config(
        f"name: t\nmodel: {{source: {model[case.runtime]}}}\n{case.more}"
        f"serving: {{runtime: {case.runtime}{', ' if case.serving else ''}{case.serving}}}\n"
    )
    path = "/models/weights" if case.runtime in ("tensorrtllm", "reference") else None
    return render_repository(config, model_path_in_container=path, repository_path="/repository", **case.options)


@pytest.mark.parametrize("name", CASES)
def test_what_is_asked_for_is_written_and_passes_the_linter(name: str, model: dict[str, Path], tmp_path: Path) -> None:
    case = CASES[name]
    files = render(model, case)
    text = files[case.file]
    assert isinstance(text, str)
    for words in case.holds:
        assert words in text
    for words in case.lacks:
        assert words not in text
    assert render(model, case) == files
    for path, content in files.items():
        assert size_of(content) >= 0
        if path.endswith("config.pbtxt"):
            assert isinstance(content, str)
            assert pbtxt.dumps(pbtxt.loads(content)) == content
            assert "${" not in content
    write_repository(files, tmp_path / "out")
    findings = [one for one in lint_repository(tmp_path / "out") if one.id != "TK138"]  # the checkpoint is elsewhere
    assert not has_errors(findings), findings


def test_the_table_has_every_runtime() -> None:
    assert {case.runtime for case in CASES.values()} == set(RUNTIMES) == set(LAYOUTS) == set(TOPOLOGIES)
    assert list(RUNTIMES) == _RUNTIMES


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            Case("tensorrtllm", "decoding_mode: eagle", "deploy: {release: '24.10'}\n"),
            "'eagle' is unknown to TensorRT-LLM 0.14.0: it came with 0.16",
        ),
        (Case("tensorrtllm", "guided_decoding_backend: xgrammar", OLD), "serving.guided_decoding_backend"),
        (
            Case("tensorrtllm", "backend_parameters: {num_nodes: 2}", OLD),
            "serving.backend_parameters.num_nodes (parameter num_nodes) is unknown",
        ),
        (
            Case("tensorrtllm", "backend_parameters: {enable_trt_overlap: true}", "deploy: {release: '25.09'}\n"),
            "it came with 1.2",
        ),
        (
            Case("tensorrtllm", "kv_cache: {cross_fraction: 0.5}", "deploy: {release: '24.08'}\n"),
            "serving.kv_cache.cross_fraction",
        ),
        (Case("tensorrtllm", "backend_parameters: {cuda_graph: true}"), "no parameter of the tensorrtllm backend"),
        (Case("tensorrtllm", "backend_parameters: {max_beam_width: 2}"), "has a key of its own"),
        (Case("tensorrtllm", "backend_parameters: {gpt_model_type: V1}"), "is set by trtkit itself"),
        (
            Case("tensorrtllm", "backend_parameters: {cuda_graph_mode: 1}"),
            "serving.backend_parameters.cuda_graph_mode is 1",
        ),
        (Case("tensorrtllm", "backend_parameters: {gpu_weights_percent: 1.5}"), "gpu_weights_percent is '1.5'"),
        (Case("tensorrtllm", "backend_parameters: {participant_ids: 'a,b'}"), "participant_ids is 'a,b'"),
        (Case("tensorrtllm", "lora: {adapters: {a: /x}}"), "serving.lora.adapters does not go with"),
        (Case("tensorrtllm", "max_inflight_requests: 3"), "unknown to the local server"),
        (
            Case("tensorrtllm", "max_inflight_requests: 3", "deploy: {target: docker, release: '25.10'}\n"),
            "release 25.10",
        ),
        (Case("tensorrtllm", "", OLD, options={"logits_dtype": "FP16"}), "logits of type FP16"),
        (Case("tensorrtllm", "", "deploy: {release: '19.01'}\n"), "no release '19.01'"),
        (Case("llmapi", "", OLD), "runtime 'llmapi' needs 1.0 or later"),
        (Case("llmapi", "lora: {}"), "serving.lora is unknown to the llmapi model"),
        (Case("llmapi", "engine_args: {tensor_parallel_size: 2}"), "has a key of its own"),
        (Case("llmapi", "engine_args: {triton_config: {}}"), "is written by trtkit"),
        (
            Case("llmapi", "engine_args: {kv_cache_config: {free_gpu_memory_fraction: 0.1}}"),
            "kv_cache_config.free_gpu_memory_fraction",
        ),
        (
            Case("llmapi", "", "checkpoint: {quantization: {kv_cache: int8}}\n"),
            "is none of the PyTorch backend's",
        ),
        (Case("vllm", "", "checkpoint: {quantization: {kv_cache: int8}}\n"), "'int8' is none of vLLM's"),
        (Case("vllm", "lora: {}"), "has no adapters"),
        (Case("vllm", "kv_cache: {max_tokens: 3}"), "serving.kv_cache.max_tokens does not go with"),
        (Case("vllm", "engine_args: {model: x}"), "set model.source"),
        (Case("onnxruntime", "gpu_device_ids: ['0']"), "deploy.target is local"),
    ],
)
def test_what_a_release_or_runtime_does_not_know_is_an_error(case: Case, words: str, model: dict[str, Path]) -> None:
    with pytest.raises(InputError) as caught:
        render(model, case)
    assert words in f"{caught.value.cause}\n{caught.value.fix}"
    assert caught.value.fix


def test_the_fix_names_releases_that_know_it(model: dict[str, Path]) -> None:
    with pytest.raises(InputError) as caught:
        render(model, Case("tensorrtllm", "guided_decoding_backend: xgrammar", OLD))
    assert caught.value.fix == "use a release from 25.05 to 26.07, or leave it out"


def test_llmapi_and_vllm_take_hugging_face_checkpoints_only(model: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for text, words in (
        (None, "cannot be read"),
        ('{"mapping": {}}', "is a TRT-LLM checkpoint"),
        ("[]", "something else"),
    ):
        if text is not None:
            (other / "config.json").write_text(text)
        for runtime in ("llmapi", "vllm"):
            with pytest.raises(InputError, match=words):
                render(model, Case(runtime, options={"checkpoint_dir": other}))


def test_a_model_of_the_hub_is_downloaded_by_the_server() -> None:
    config = parse_config("name: t\nmodel: {source: owner/name, revision: abc}\nserving: {runtime: llmapi}\n")
    content = yaml.safe_load(render_repository(config)["tensorrt_llm/1/model.yaml"])  # type: ignore[arg-type]
    assert (content["model"], content["revision"]) == ("owner/name", "abc")
    config = parse_config("name: t\nmodel: {source: owner/name}\nserving: {runtime: vllm}\n")
    assert json.loads(render_repository(config)["vllm_model/1/model.json"])["model"] == "owner/name"  # type: ignore[arg-type]


@pytest.mark.parametrize("tag", [one.tag for one in releases.load()])
def test_the_ensemble_fits_the_engine_of_every_release(tag: str, model: dict[str, Path], tmp_path: Path) -> None:
    files = render(model, Case("tensorrtllm", more=f"deploy: {{release: '{tag}'}}\n"))
    write_repository(files, tmp_path / "out")
    steps = pbtxt.loads(files["ensemble/config.pbtxt"]).ensemble_scheduling.step  # type: ignore[arg-type]
    names = {one.name for one in pbtxt.loads(files["tensorrt_llm/config.pbtxt"]).input}  # type: ignore[arg-type]
    assert set(steps[1].input_map) <= names


def test_the_grammar_file_has_the_whole_vocabulary(model: dict[str, Path], byte_tokenizer: Any) -> None:
    files = render(model, Case("tensorrtllm", "guided_decoding_backend: xgrammar"))
    info = json.loads(files["tensorrt_llm/1/xgrammar_tokenizer_info.json"])  # type: ignore[arg-type]
    assert info["encoded_vocab"] == [byte_tokenizer.id_to_token(i) for i in range(byte_tokenizer.get_vocab_size())]
    assert info["stop_token_ids"] == [1, 2]
    assert json.loads(info["tokenizer_str"])["model"]["type"] == "BPE"


def test_notes_say_what_no_file_can() -> None:
    def told(runtime: str, serving: str, more: str = "") -> str:
        text = f"name: t\nmodel: {{source: a/b}}\n{more}serving: {{runtime: {runtime}, {serving}}}\n"
        return "\n".join(notes(parse_config(text)))

    assert told("reference", "max_batch_size: 3") == ""
    assert "500 ms" in told("reference", PRIORITY)
    assert "--rate-limit" in told("reference", LIMITER)
    assert "--cache-config" in told("reference", "streaming: false, response_cache: true")
    assert "TRTLLM_ORCHESTRATOR" in told("tensorrtllm", "instances: 2")
    assert "/app/all_models/llmapi/tensorrt_llm/1" in told("llmapi", "streaming: true")
    assert "vllm-python-py3" in told("vllm", "streaming: true")


levels = st.integers(0, 9)
policies = st.fixed_dictionaries(
    {},
    optional={
        "default_timeout_microseconds": st.integers(0, 10**9),
        "timeout_action": st.sampled_from(["reject", "delay"]),
        "allow_timeout_override": st.booleans(),
        "priority_levels": levels,
    },
)
servings = st.fixed_dictionaries(
    {"runtime": st.sampled_from(["reference", "tensorrtllm"]), "max_batch_size": st.integers(1, 64)},
    optional={
        "streaming": st.booleans(),
        "max_queue_size": st.integers(0, 10_000),
        "max_queue_delay_microseconds": st.integers(0, 10_000),
        "instances": st.integers(1, 8),
        "queue": policies,
        "version_policy": st.just("all") | st.integers(1, 9) | st.lists(st.integers(1, 9), min_size=1, max_size=3),
        "rate_limiter": st.fixed_dictionaries(
            {"resources": st.dictionaries(st.from_regex(r"\A[a-z]{1,8}\Z"), st.integers(1, 9), max_size=3)},
            optional={"priority": st.integers(0, 99)},
        ),
    },
)


@settings(deadline=None, max_examples=60)
@given(serving=servings)
def test_every_scheduling_key_reaches_the_model(
    serving: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Config to config.pbtxt and back."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "tokenizer.json").write_text("{}")
    config = parse_config(f"name: t\nmodel: {{source: {folder}}}\nserving: {json.dumps(serving)}\n")
    files = render_repository(config, model_path_in_container="/w")
    message = pbtxt.loads(files["tensorrt_llm/config.pbtxt"])  # type: ignore[arg-type]
    queue, batching = config.serving.queue, message.dynamic_batching
    policy = batching.default_queue_policy
    assert message.max_batch_size == config.serving.max_batch_size
    assert message.model_transaction_policy.decoupled is config.serving.streaming
    assert policy.max_queue_size == config.serving.max_queue_size
    assert batching.max_queue_delay_microseconds == config.serving.max_queue_delay_microseconds
    assert policy.default_timeout_microseconds == queue.default_timeout_microseconds
    assert policy.timeout_action == (queue.timeout_action == "delay" and queue.default_timeout_microseconds > 0)
    assert policy.allow_timeout_override is queue.allow_timeout_override
    assert batching.priority_levels == queue.priority_levels
    assert (1 <= batching.default_priority_level <= queue.priority_levels) is (queue.priority_levels > 0)
    (group,) = message.instance_group
    assert group.count == config.serving.instances
    limiter = config.serving.rate_limiter
    assert {one.name: one.count for one in group.rate_limiter.resources} == (limiter.resources if limiter else {})
    chosen, kind = config.serving.version_policy, message.version_policy.WhichOneof("policy_choice")
    if isinstance(chosen, list):
        assert list(message.version_policy.specific.versions) == chosen
    else:
        assert kind == ("all" if chosen == "all" else None if chosen == 1 else "latest")
    assert pbtxt.dumps(message) == files["tensorrt_llm/config.pbtxt"]
