"""Every ready-to-use build config is one that works, as far as that can be told without its weights and a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtkit.config import BuildConfig
from trtkit.config_file import load_config
from trtkit.engine.builders import plan_build
from trtkit.hf import is_hub_id

FOLDER = Path(__file__).parents[2] / "build_configs"
FILES = sorted(FOLDER.glob("*.yaml"))
GPU_FILES = [file for file in FILES if load_config(file).serving.runtime == "tensorrtllm"]

by_name = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
of_gpus = pytest.mark.parametrize("file", GPU_FILES, ids=lambda file: file.stem)


def test_the_promised_ones_are_there() -> None:
    assert {"llama-3.1-8b-fp16", "llama-3.1-8b-fp16-tp2", "mistral-7b-bf16", "llama-3.1-70b-bf16-tp4-pp2"} <= {
        file.stem for file in FILES
    }
    assert not [file.name for file in FOLDER.iterdir() if file.suffix != ".yaml"]


@by_name
def test_it_is_named_after_its_file_and_says_what_it_is(file: Path) -> None:
    config = load_config(file)
    assert config.name == file.stem
    first = file.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    assert Path(config.model.source).exists() or is_hub_id(config.model.source)
    assert not config.model.trust_remote_code


@of_gpus
def test_the_name_tells_the_precision_and_the_ranks(file: Path) -> None:
    checkpoint = load_config(file).checkpoint
    words = file.stem.split("-")
    short = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
    for word in words:
        if word in short:
            assert checkpoint.dtype == short[word]
    assert checkpoint.tp == next((int(word[2:]) for word in words if word.startswith("tp")), 1)
    assert checkpoint.pp == next((int(word[2:]) for word in words if word.startswith("pp")), 1)


@of_gpus
def test_its_release_can_compile_it(file: Path) -> None:
    config = load_config(file)
    architecture = "MistralForCausalLM" if "mistral" in config.name else "LlamaForCausalLM"
    command = plan_build(config, "/checkpoint", "/engine", architecture=architecture)
    assert "trtllm-build" in command.argv


def contradictions(config: BuildConfig) -> list[str]:
    """What would be refused, or quietly not happen, when serving with this engine."""
    engine, serving, deploy = config.engine, config.serving, config.deploy
    gpus = len(deploy.gpus.split(",")) if deploy.gpus != "all" else None
    world = config.checkpoint.tp * config.checkpoint.pp
    checks = {
        "Triton hands over more requests than the engine runs": serving.max_batch_size > engine.max_batch_size,
        "cache reuse needs paged context attention": serving.enable_kv_cache_reuse
        and not engine.use_paged_context_fmha,
        "chunked context needs paged context attention": serving.enable_chunked_context
        and not engine.use_paged_context_fmha,
        "a prompt may be longer than one step, without chunks": engine.max_input_len > engine.max_num_tokens
        and not serving.enable_chunked_context,
        "the longest prompt leaves no room for the output": engine.max_seq_len is not None
        and max(s.max_tokens for s in config.loadtest.values()) > engine.max_seq_len - engine.max_input_len,
        "not a GPU for every rank": gpus is not None and gpus < world,
        "more compile workers than ranks": engine.workers > world,
        "ranks talk through 64 MB of /dev/shm per peer": world > 1 and int(deploy.shm_size[:-1]) < 2,
        "an engine that no local Triton can run": deploy.target == "local",
        "listens beyond this machine": deploy.host != "127.0.0.1",
    }
    return [reason for reason, broken in checks.items() if broken]


@of_gpus
def test_engine_serving_and_deployment_fit_together(file: Path) -> None:
    assert contradictions(load_config(file)) == []


def test_contradictions_are_seen() -> None:
    config = load_config(FOLDER / "llama-3.1-8b-fp16.yaml")
    engine = config.engine.model_copy(update={"use_paged_context_fmha": False, "max_batch_size": 1, "workers": 2})
    assert len(contradictions(config.model_copy(update={"engine": engine}))) == 4
