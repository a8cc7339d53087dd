"""What runs where: formats, GPU generations, runtimes, releases and families."""

from __future__ import annotations

import itertools
import re

import pytest

from trtkit import architectures, releases
from trtkit.convert.quantization import FORMATS, Quantization
from trtkit.convert.support import (
    GPUS,
    LIMITS,
    ROWS,
    RUNTIMES,
    Target,
    check_support,
    describe,
    gpu_generation,
    refusal,
    supported,
)
from trtkit.errors import InputError

ENGINE, LLMAPI = "tensorrtllm", "llmapi"
LINEAR = "transformer.layers.0.attention.qkv"


@pytest.mark.parametrize(
    ("q", "target", "instead"),
    [
        # What trtllm-build refuses on SM100 to SM119.
        *((Quantization(name), Target(ENGINE, sm=sm), "fp8") for sm in (100, 103) for name in FORMATS if name != "fp8"),
        (Quantization("fp8", kv_cache="int8"), Target(ENGINE, sm=100), "FP8 KV cache"),
        (Quantization("fp8"), Target(ENGINE, sm=80), "int8_sq"),
        (Quantization("int4_awq", kv_cache="fp8"), Target(ENGINE, sm=86), "model's dtype"),
        (Quantization("w4a8_awq"), Target(ENGINE, sm=80), "int4_awq"),
        (Quantization("w4a8_awq"), Target(ENGINE, sm=120), "SM89 or SM90"),
        (Quantization("int4_awq"), Target(ENGINE, sm=75), "SM80"),
        (Quantization("int8_wo"), Target(ENGINE, None, "1.2.1", 75), "0.13.0"),
        (Quantization("fp8"), Target(ENGINE, sm=110), "SM100"),
        # What the PyTorch backend does not have.
        (Quantization("int8_sq"), Target(LLMAPI, sm=90), "int8_wo"),
        (Quantization("int8_sq_plugin"), Target(LLMAPI), "fp8"),
        (Quantization("int4_gptq"), Target(LLMAPI), "int4_awq"),
        (Quantization("fp8", kv_cache="int8"), Target(LLMAPI), "an FP8 KV cache"),
        (Quantization("fp8_rowwise"), Target(LLMAPI, sm=89), "fp8"),
        (Quantization("int4_awq"), Target(LLMAPI, None, "1.2.1", 100), "fp8"),
        # Releases.
        (Quantization("int8_sq"), Target(ENGINE, None, "0.14.0", 90), "int8_sq_plugin"),
        (Quantization("w4a8_awq"), Target(ENGINE, None, "0.9.0", 89), "int4_awq"),
        (Quantization("fp8_rowwise"), Target(ENGINE, None, "0.14.0", 89), "fp8"),
        (Quantization("int4_wo"), Target(LLMAPI, None, "0.21.0", 90), "int4_awq"),
        (Quantization("int4_wo"), Target(ENGINE, None, "1.3.0"), "26.07"),
        # Families.
        (Quantization("int8_sq"), Target(ENGINE, "MixtralForCausalLM"), "fp8"),
        (Quantization("fp8_rowwise"), Target(ENGINE, "Qwen3MoeForCausalLM"), "fp8"),
        (Quantization("int4_awq"), Target(ENGINE, "MixtralForCausalLM", "0.18.0"), "int4_wo"),
        (Quantization("int4_awq"), Target(LLMAPI, "MixtralForCausalLM"), "fp8"),
        (Quantization("int8_sq_plugin"), Target(ENGINE, "Qwen3ForCausalLM"), "int8_sq"),
        (Quantization("fp8_rowwise"), Target(ENGINE, "Qwen2ForCausalLM"), "fp8"),
        # Mixed precision.
        (Quantization("fp8", overrides={LINEAR: "int8_sq"}), Target(ENGINE, None, "0.14.0"), "fp8"),
        (Quantization("int4_awq", overrides={LINEAR: "int8_wo"}), Target(ENGINE), "int4_awq"),
        (Quantization("fp8", overrides={LINEAR: "int4_awq"}), Target(ENGINE, "MixtralForCausalLM"), "fp8"),
    ],
)
def test_refused_before_any_work_with_what_runs_instead(q: Quantization, target: Target, instead: str) -> None:
    with pytest.raises(InputError) as caught:
        check_support(q, target)
    assert instead in caught.value.fix
    assert "\n" not in caught.value.cause + caught.value.fix


@pytest.mark.parametrize(
    ("q", "target"),
    [
        (Quantization("int4_awq", kv_cache="int8"), Target(ENGINE, "LlamaForCausalLM", "1.2.1", 80)),
        (Quantization("int8_sq"), Target(ENGINE, "Qwen3ForCausalLM", "0.15.0", 90)),
        (Quantization("int8_sq_plugin"), Target(ENGINE, "Qwen2ForCausalLM", "1.2.1", 86)),
        (Quantization("fp8_rowwise"), Target(ENGINE, "MistralForCausalLM", "1.2.1", 89)),
        (Quantization("fp8", kv_cache="fp8"), Target(ENGINE, "MixtralForCausalLM", "1.2.1", 100)),
        (Quantization("int4_awq"), Target(ENGINE, "MixtralForCausalLM", "0.19.0", 80)),
        (Quantization("int8_wo"), Target(ENGINE, None, "0.17.0.post1", 90)),
        (Quantization("int4_awq", kv_cache="fp8"), Target(LLMAPI, "LlamaForCausalLM", "1.0.3.2510", 80)),
        (Quantization("w4a8_awq"), Target(LLMAPI, None, "1.3.0", 103)),
        (Quantization("int4_awq", overrides={LINEAR: "fp8"}), Target(ENGINE, "LlamaForCausalLM", "1.2.1", 89)),
        (Quantization("int8_sq_plugin", kv_cache="int8"), Target("reference", "MixtralForCausalLM")),
        (Quantization(), Target(ENGINE, None, "1.2.1", 75)),
    ],
)
def test_what_runs_is_let_through(q: Quantization, target: Target) -> None:
    check_support(q, target)


def test_every_refusal_names_something_that_runs() -> None:
    """Over all formats, KV caches, runtimes, generations, releases and families."""
    versions = [None, *sorted({release.tensorrt_llm for release in releases.load()}), "1.3.0"]
    families = [None, "LlamaForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM"]
    mixed = [Quantization("int4_awq", overrides={LINEAR: name}) for name in ("fp8", "int8_wo")]
    plain = [Quantization(name, kv_cache=kv) for name in (None, *FORMATS) for kv in (None, "int8", "fp8")]
    refused = 0
    places = itertools.product(RUNTIMES, families, versions[::5], [None, *GPUS])
    for q, place in itertools.product([*plain, *mixed], places):
        target = Target(*place)
        found = refusal(q, target)
        if found is None:
            assert supported(q, target)
            continue
        refused += 1
        assert found.cause and found.fix and found.alternatives
        for other, there in found.alternatives:
            assert (other, there) != (q, target)
            check_support(other, there)
            assert there.runtime == target.runtime or f"runtime {there.runtime}" in found.fix
            if there == target and other.format != q.format:
                assert str(other.format) in found.fix and not FORMATS[str(other.format)].import_only
    assert refused > 1000


def test_tables_name_only_what_exists() -> None:
    caches = {"INT8 KV cache", "FP8 KV cache"}
    assert {name for row in ROWS for name in row.names} == {*FORMATS, *caches}
    assert {sm for row in ROWS for sm in row.sms} <= set(GPUS)
    assert {name for limit in LIMITS for name in limit.names} <= {*FORMATS, "mixed precision"}
    assert {family for limit in LIMITS for family in limit.families} <= set(architectures.FAMILIES)


@pytest.mark.parametrize("text", ["Radeon", "GTX 1080", "sm", "9", ""])
def test_a_gpu_that_is_not_known(text: str) -> None:
    with pytest.raises(InputError, match="no known GPU"):
        gpu_generation(text)


@pytest.mark.parametrize(
    ("text", "sm"),
    [
        ("H100", 90), ("NVIDIA H100 80GB HBM3", 90), ("NVIDIA A100-SXM4-80GB", 80), ("a10g", 86), ("Tesla T4", 75),
        ("NVIDIA L4", 89), ("L40S", 89), ("B200", 100), ("GB200", 100), ("B300", 103), ("H20", 90), ("GH200", 90),
        ("NVIDIA GeForce RTX 4090", 89), ("RTX 4070Ti", 89), ("NVIDIA RTX A6000", 86), ("RTX 5090", 120),
        ("NVIDIA RTX 5000 Ada Generation", 89), ("NVIDIA RTX PRO 6000 Blackwell", 120), ("Quadro RTX 5000", 75),
        ("NVIDIA GB10", 121), ("sm90", 90), ("sm_90a", 90), ("9.0", 90), ("90", 90), ("12.0", 120), ("SM 103", 103),
    ],
)  # fmt: skip
def test_gpus_by_name_and_by_number(text: str, sm: int) -> None:
    assert gpu_generation(text) == sm


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Target("onnxruntime"), "onnxruntime"),
        (Target(ENGINE, tensorrt_llm="newest"), "newest"),
        (Target(ENGINE, "Nope"), "Nope"),
    ],
)
def test_unknown_runtimes_versions_and_families(target: Target, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_support(Quantization("fp8"), target)


def test_the_table_for_the_docs_agrees_with_the_checks() -> None:
    rows = {row["format"]: row for row in describe()}
    assert list(rows) == list(FORMATS)
    for name, runtime, sm in itertools.product(FORMATS, (ENGINE, LLMAPI), GPUS):
        runs = supported(Quantization(name), Target(runtime, sm=sm))
        # No release of today runs on Turing, which is not worth a row.
        assert (f"SM{sm}" in re.findall(r"\bSM\d+", rows[name][runtime])) == (runs and sm != 75)
