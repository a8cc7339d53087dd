"""What of a job, and of the model's parameters, arrives at each engine's library."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_bench import KINDS, Bench, checkpoint_fixture, make_fixture  # noqa: F401
from standin_model import LONGEST

from trtkit.repository.models.serving.engine import RequestError, Sampling

Make = Callable[..., Bench]
FULL = Sampling(
    temperature=0.75, top_k=40, top_p=0.5, repetition_penalty=1.25, presence_penalty=0.5, frequency_penalty=-0.5,
    min_tokens=2, seed=2**40,
)  # fmt: skip
GREEDY = Sampling(temperature=0.0, top_k=40, top_p=0.5)
UNLIMITED = Sampling(top_k=0, top_p=0.0)
GRAMMAR = Sampling(guide_type="regex", guide="[ab]+")
NAMES = tuple(Sampling.__dataclass_fields__)[:8]


def seen(bench: Bench) -> dict[str, Any]:
    """The sampling settings of the last request, by NVIDIA's names; only those that are set."""
    made = bench.library()
    request = made.requests[-1]
    if isinstance(request, dict):
        given = {name.removeprefix("runtime_"): array.item() for name, array in request.items() if array.size == 1}
    else:
        settings = getattr(request, "sampling_config", None) or request.params
        given = {key: getattr(settings, key, None) for key in (*NAMES, "random_seed", "min_length")}
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_all_sampling_settings_arrive(kind: str, make: Make) -> None:
    bench = make(kind)
    bench.run(bench.job(sampling=FULL))
    given = seen(bench)
    old = kind in ("executor-old", "triton-old")
    for name in NAMES:
        sent = {"seed": "random_seed", "min_tokens": "min_length"}.get(name, name) if old else name
        assert given[sent] == getattr(FULL, name), name


@pytest.mark.parametrize("kind", KINDS[1:])
def test_nothing_is_set_that_nobody_asked_for(kind: str, make: Make) -> None:
    bench = make(kind)
    bench.run(bench.job())
    defaults = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    defaults["temperature"] = 0.0  # vLLM's own is 1; greedy is what the other engines do
    defaults |= {"top_p": 1.0, "top_k": 0, "min_tokens": 0}
    given = {name: value for name, value in seen(bench).items() if name in NAMES}
    assert given == (defaults if kind.startswith("vllm") else {})


@pytest.mark.parametrize("kind", KINDS[1:])
def test_greedy_and_unlimited(kind: str, make: Make) -> None:
    bench = make(kind)
    bench.run(bench.job(sampling=GREEDY))
    given = seen(bench)
    if kind.startswith("vllm"):
        assert given["temperature"] == 0
    else:  # the executor refuses a temperature of 0
        assert given["top_k"] == 1
        assert not {"temperature", "top_p"} & set(given)
    bench.run(bench.job(sampling=UNLIMITED))
    assert seen(bench)["top_k"] == 0
    assert seen(bench).get("top_p") == (1.0 if kind.startswith("vllm") else None)


REFUSED = {
    "reference": [(Sampling(lora_task_id=1), "UNSUPPORTED"), (GRAMMAR, "UNSUPPORTED")],
    "executor": [(Sampling(lora_task_id=1), "UNSUPPORTED"), (GRAMMAR, "UNSUPPORTED")],
    "llmapi": [(Sampling(lora_task_id=1), "INVALID_ARG"), (GRAMMAR, "UNSUPPORTED")],
    "vllm": [(Sampling(lora_task_id=1), "INVALID_ARG"), (Sampling(presence_penalty=3.0), "INVALID_ARG")],
    "triton-old": [(GRAMMAR, "UNSUPPORTED")],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_an_engine_cannot_do_is_refused_first(kind: str, make: Make) -> None:
    bench = make(kind)
    for sampling, code in REFUSED[kind]:
        with pytest.raises(RequestError) as caught:
            bench.engine.check(bench.job(sampling=sampling))
        assert caught.value.code == code


GUIDED = {
    "executor": {"guided_decoding_backend": "xgrammar", "xgrammar_tokenizer_info_path": "info.json"},
    "llmapi": {"engine_args": '{"guided_decoding_backend": "xgrammar"}'},
    "vllm": {},
    "vllm-old": {},
    "triton": {},
}


@pytest.mark.parametrize("kind", GUIDED)
@pytest.mark.parametrize(
    ("guide_type", "guide"), [("json", None), ("json_schema", "{}"), ("regex", "a|b"), ("ebnf_grammar", "root ::= a")]
)
def test_guided_decoding(kind: str, guide_type: str, guide: str | None, make: Make, tmp_path: Any) -> None:
    (tmp_path / "info.json").write_text(json.dumps({"encoded_vocab": ["a", "b"], "stop_token_ids": [1]}))
    bench = make(kind, **GUIDED[kind])
    bench.run(bench.job(sampling=Sampling(guide_type=guide_type, guide=guide)))
    request = bench.library().requests[-1]
    if kind == "executor":
        asked = request.guided_decoding_params
        assert (asked.guide_type, asked.guide) == (guide_type.upper(), guide)
        assert bench.library().config.guided_decoding_config.encoded_vocab == ["a", "b"]
    elif kind == "triton":
        assert request["guided_decoding_guide_type"].item() == guide_type.encode()
        assert ("guided_decoding_guide" in request) == (guide is not None)
    else:
        asked = getattr(
            request.params, {"llmapi": "guided_decoding", "vllm": "structured_outputs"}.get(kind, "guided_decoding")
        )
        field = {"json": "json_object", "json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar"}[guide_type]
        assert getattr(asked, field) == (True if guide is None else guide)
    if kind != "triton":
        for wrong in (Sampling(guide_type="poem", guide="x"), Sampling(guide_type="regex"), Sampling(guide="x")):
            with pytest.raises(RequestError) as caught:
                bench.engine.check(bench.job(sampling=wrong))
            assert caught.value.code == "INVALID_ARG"


def test_adapters(make: Make) -> None:
    asked = Sampling(lora_task_id=2)
    executor = make(
        "executor", built='{"build_config": {"max_seq_len": 512, "lora_config": {"lora_target_modules": ["q"]}}}'
    )
    executor.run(executor.job(sampling=asked))
    assert executor.library().requests[-1].lora_config.task_id == 2
    triton = make("triton")
    triton.run(triton.job(sampling=asked))
    assert triton.library().requests[-1]["lora_task_id"].item() == 2
    for kind in ("llmapi", "vllm"):
        bench = make(kind, lora_adapters='{"first": "/a", "second": "/b"}')
        bench.run(bench.job(sampling=asked))
        lora = bench.library().requests[-1].lora
        assert (lora.lora_name, lora.lora_int_id, lora.lora_path) == ("second", 2, "/b")


def test_bad_words(make: Make) -> None:
    words = [[3, 4], [5]]
    for kind in ("executor", "vllm", "triton", "llmapi"):
        bench = make(kind)
        job = bench.job(bad_words=words)
        if kind == "llmapi":
            with pytest.raises(RequestError, match="one token only"):
                bench.engine.check(job)
            continue
        bench.run(job)
        request = bench.library().requests[-1]
        if kind == "triton":
            assert request["bad_words_list"].tolist() == [[[3, 4, 5], [2, 3, -1]]]
        else:
            assert (request.bad_words if kind == "executor" else request.params._bad_words_token_ids) == words


def test_executor_parameters(make: Make) -> None:
    bench = make(
        "executor",
        kv_cache_free_gpu_mem_fraction="0.5",
        enable_kv_cache_reuse="false",
        max_tokens_in_paged_kv_cache="4096",
        max_attention_window_size="128,256",
        enable_chunked_context="true",
        batch_scheduler_policy="max_utilization",
        gpu_device_ids="0,1;2,3",
        decoding_mode="top_k_top_p",
        lora_cache_max_adapter_size="16",
        lora_prefetch_dir="/adapters",
        medusa_choices="{0}, {0, 1}",
        lookahead_window_size="7",
        lookahead_ngram_size="5",
        lookahead_verification_set_size="3",
        multi_block_mode="false",
        max_beam_width="4",
        cross_kv_cache_fraction="${unfilled}",
        tokenizer_dir="",
    )  # fmt: skip
    config = bench.library().config
    cache = config.kv_cache_config
    assert (cache.free_gpu_memory_fraction, cache.enable_block_reuse, cache.max_tokens) == (0.5, False, 4096)
    assert (cache.max_attention_window, cache.cross_kv_cache_fraction) == ([128, 256], None)
    assert (config.enable_chunked_context, config.max_beam_width) == (True, 1)
    assert config.scheduler_config.capacity_scheduler_policy == "max"
    assert config.parallel_config.device_ids == [0, 1]
    assert config.decoding_config.decoding_mode == "TopKTopP"
    assert config.decoding_config.medusa_choices == [[0], [0, 1]]
    assert config.decoding_config.lookahead_decoding_config.max_ngram_size == 5
    assert (config.peft_cache_config.max_adapter_size, config.peft_cache_config.lora_prefetch_dir) == (16, "/adapters")
    assert config.extended_runtime_perf_knob_config.multi_block_mode is False


@pytest.mark.parametrize(
    "wrong", [{"enable_kv_cache_reuse": "maybe"}, {"gpu_device_ids": "a"}, {"decoding_mode": "beam"}]
)
def test_a_wrong_parameter_is_named(wrong: dict[str, str], make: Make) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make("executor", **wrong)


def test_orchestrator(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTLLM_ORCHESTRATOR", "1")
    parallel = make("executor", executor_worker_path="/worker").library().config.parallel_config
    assert parallel.communication_mode == "orchestrator"
    assert parallel.orchestrator_config.worker_executable_path == "/worker"


def test_a_rank_above_zero_waits_for_the_leader(make: Make) -> None:
    bench = make("executor-follows")
    assert bench.library().shut_down
    assert bench.engine.step(0.01) == []


@pytest.mark.parametrize("kind", ["executor", "llmapi", "vllm", "triton"])
def test_what_the_library_refuses_is_an_error_of_one_request(kind: str, make: Make) -> None:
    bench = make(kind, **({"model_name": "nowhere"} if kind == "triton" else {}))
    wrong = bench.job([1] * LONGEST, 8) if kind != "llmapi" else bench.job(["a text"])
    (heard,) = bench.run(wrong)
    assert heard.error
    assert not heard.tokens
    if kind != "triton":
        assert bench.run(bench.job())[0].finish == "length"


def test_engine_args(make: Make) -> None:
    llm = make("llmapi", engine_args='{"tensor_parallel_size": 2}').library()
    assert (llm.model, llm.skip_tokenizer_init, llm.kwargs) == (
        "some/model", True, {"tensor_parallel_size": 2, "max_batch_size": 3},
    )  # fmt: skip
    vllm = make("vllm", engine_args='{"model": "other", "max_model_len": 64}').library()
    assert (vllm.arguments.model, vllm.arguments.max_model_len, vllm.arguments.max_num_seqs) == ("other", 64, 3)


def test_a_failed_start_leaves_no_thread(make: Make) -> None:
    before = set(threading.enumerate())
    with pytest.raises(TypeError):
        make("vllm", engine_args='{"no_such_argument": 1}')
    assert set(threading.enumerate()) <= before


def test_a_stop_gets_through_when_all_threads_for_calls_wait(make: Make) -> None:
    """40 sequences that are not streamed, each of which would hold one of Triton's 32 threads until its end."""
    bench = make("triton", slots=40)
    jobs = [bench.job(max_tokens=100_000, streams=False) for _ in range(40)]
    bench.submit(*jobs)
    bench.until(lambda: len(bench.library().requests) >= 24)
    for job in jobs:
        bench.engine.cancel(job.key)
    bench.until(lambda: not bench.engine._runs)
    bench.until(lambda: bench.idle)
    assert all(len(run["input_ids"]) == 1 for run in bench.library().requests)


def test_a_stop_that_comes_too_early_is_repeated(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make("triton")
    library = bench.library()
    on_its_way, release = threading.Event(), threading.Event()
    run = library.run

    def late(name: str, outputs: list[str], inputs: dict[str, np.ndarray], answers: Any) -> None:
        if "stop" not in inputs:
            on_its_way.set()
            assert release.wait(60)
        run(name, outputs, inputs, answers)

    monkeypatch.setattr(library, "run", late)
    job = bench.job(max_tokens=100_000)
    bench.submit(job)
    assert on_its_way.wait(60)
    bench.engine.cancel(job.key)
    bench.until(lambda: library.stops > 0)
    release.set()
    bench.until(lambda: not bench.engine._runs)
    assert library.stops > 1


def test_a_stream_that_falls_silent_is_given_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make("triton", slots=1)
    module = sys.modules[type(bench.engine).__module__]
    for name, value in (("SILENCE_S", 0.3), ("LAST_WORD_S", 0.1), ("WATCH_S", 0.02)):
        monkeypatch.setattr(module, name, value)
    library = bench.library()
    library.loses_errors = True
    cancelled, silent = bench.job(max_tokens=100_000), bench.job(max_tokens=100_000)
    bench.submit(cancelled)
    assert bench.engine.step(10)
    bench.engine.cancel(cancelled.key)
    bench.submit(silent)
    heard: list[Any] = []
    bench.until(lambda: heard.extend(bench.engine.step(0.1)) or heard)  # the one thread was replaced
    assert heard[0].key == silent.key
    library.world.stop(library.world.running[0])
    assert bench.hear(silent)[0].code == "UNAVAILABLE"
    assert bench.run(bench.job())[0].finish == "length"


def test_requests_of_two_models_have_different_ids(make: Make) -> None:
    assert make("triton").engine._id != make("triton").engine._id
