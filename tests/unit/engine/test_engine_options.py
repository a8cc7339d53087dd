from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit.config import EngineConfig
from trtkit.engine.options import FLAGS, trtllm_build_args, version_line
from trtkit.errors import InputError

TABLE = json.loads((Path(__file__).parents[2] / "data" / "trtllm_build_flags.json").read_text())
VERSIONS = ["0.17.0", "0.17.0.post1", "0.18.2", "0.21.0", "1.0.0", "1.0.3.2510", "1.1.0", "1.2.1"]


def upstream(version: str) -> dict[str, Any]:
    flags: dict[str, Any] = TABLE["0.17" if version.startswith("0.") else "1.x"]["flags"]
    return flags


def as_dict(arguments: list[str]) -> dict[str, str]:
    assert len(arguments) % 2 == 0
    names = arguments[::2]
    assert len(set(names)) == len(names)
    return dict(zip(names, arguments[1::2], strict=True))


def engines() -> st.SearchStrategy[EngineConfig]:
    kv = st.sampled_from(["paged", "continuous", "disabled"])
    return st.builds(
        lambda kv_cache_type, paged, length, extra, **other: EngineConfig(
            kv_cache_type=kv_cache_type,
            use_paged_context_fmha=paged and kv_cache_type == "paged",
            max_input_len=length,
            max_seq_len=None if extra is None else length + extra,
            **other,
        ),
        kv,
        st.booleans(),
        st.integers(1, 1 << 20),
        st.none() | st.integers(1, 1 << 20),
        max_batch_size=st.integers(1, 65536),
        max_num_tokens=st.integers(1, 1 << 20),
        max_beam_width=st.integers(1, 64),
        gemm_plugin=st.sampled_from(["auto", "float16", "bfloat16", "float32", "fp8", "disable"]),
        multiple_profiles=st.booleans(),
        reduce_fusion=st.booleans(),
        workers=st.integers(1, 64),
    )


@settings(deadline=None)
@given(engine=engines(), version=st.sampled_from(VERSIONS))
def test_every_flag_and_value_is_one_that_the_version_takes(engine: EngineConfig, version: str) -> None:
    arguments = as_dict(trtllm_build_args(engine, "ckpt", "out", tensorrt_llm_version=version, tp=2))
    flags = upstream(version)
    for name, value in arguments.items():
        assert flags[name]["kind"] == "value"
        if "choices" in flags[name]:
            assert value in flags[name]["choices"]
        if flags[name]["type"] == "int":
            assert str(int(value)) == value


@settings(deadline=None)
@given(engine=engines())
def test_every_setting_that_steers_the_compilation_is_sent(engine: EngineConfig) -> None:
    arguments = as_dict(trtllm_build_args(engine, "ckpt", "out", tensorrt_llm_version="1.2.1", tp=2))
    for name, value in engine.model_dump(exclude={"builder"}, exclude_none=True).items():
        text = {True: "enable", False: "disable"}[value] if isinstance(value, bool) else str(value)
        assert arguments[f"--{name}"] == text


@pytest.mark.parametrize("line", FLAGS)
def test_our_table_says_what_the_upstream_parser_says(line: str) -> None:
    theirs = TABLE[line]["flags"]
    for name, kind in FLAGS[line].items():
        flag = theirs[f"--{name}"]
        if isinstance(kind, tuple):
            assert sorted(kind) == sorted(flag["choices"])
        else:
            assert "choices" not in flag
            # The 1.x transcription leaves the type of some flags open.
            assert flag["type"] in (kind.__name__, None)


def test_the_exact_arguments() -> None:
    engine = EngineConfig(max_batch_size=8, max_input_len=2048, max_seq_len=4096, workers=2, reduce_fusion=True)
    arguments = trtllm_build_args(
        engine, "/c", "/e", tensorrt_llm_version="1.2.1", tp=2, architecture="LlamaForCausalLM"
    )
    assert " ".join(arguments) == (
        "--checkpoint_dir /c --output_dir /e --output_timing_cache /e/model.cache --workers 2 --max_batch_size 8 "
        "--max_input_len 2048 --max_seq_len 4096 --max_num_tokens 8192 --max_beam_width 1 --kv_cache_type paged "
        "--gemm_plugin auto --use_paged_context_fmha enable --multiple_profiles disable --reduce_fusion enable"
    )


def test_no_max_seq_len_leaves_the_limit_to_the_model() -> None:
    assert "--max_seq_len" not in trtllm_build_args(EngineConfig(), "/c", "/e", tensorrt_llm_version="1.2.1")


@pytest.mark.parametrize(("version", "line"), [(v, "0.17" if v.startswith("0.") else "1.x") for v in VERSIONS])
def test_version_line(version: str, line: str) -> None:
    assert version_line(version) == line


@pytest.mark.parametrize(
    ("version", "cause", "fix"),
    [
        ("1.3.0", "has no engine builder", "26.07"),
        ("1.3.0rc20", "has no engine builder", "26.07"),
        ("2.0", "has no engine builder", "26.07"),
        ("0.16.0", "too old", "25.01"),
        ("0.9.0", "too old", "25.01"),
        ("newest", "not a TensorRT-LLM version", "1.2.1"),
        ("", "not a TensorRT-LLM version", "1.2.1"),
    ],
)
def test_versions_without_a_known_builder_are_refused(version: str, cause: str, fix: str) -> None:
    with pytest.raises(InputError) as caught:
        trtllm_build_args(EngineConfig(), "/c", "/e", tensorrt_llm_version=version)
    assert cause in caught.value.cause
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("settings", "tp", "architecture", "cause"),
    [
        ({"reduce_fusion": True}, 1, "LlamaForCausalLM", "checkpoint.tp is 1"),
        ({"reduce_fusion": True}, 2, "Qwen2ForCausalLM", "Qwen2ForCausalLM"),
        ({"kv_cache_type": "continuous"}, 1, None, "kv_cache_type is continuous"),
        ({"kv_cache_type": "disabled"}, 1, None, "kv_cache_type is disabled"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], tp: int, architecture: str | None, cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        trtllm_build_args(
            EngineConfig(**settings), "/c", "/e", tensorrt_llm_version="1.2.1", tp=tp, architecture=architecture
        )
