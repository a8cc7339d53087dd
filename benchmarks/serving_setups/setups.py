"""The repositories that the serving-path benchmark compares, and what each is asked."""

from __future__ import annotations

import shutil
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtkit import contract, pbtxt
from trtkit.config import BuildConfig
from trtkit.repository.generate import render_repository, write_repository

HERE = Path(__file__).parent
SLOTS = 128
"""max_batch_size of every model: more than the highest concurrency, so that admission is nowhere the limit."""
TOKENS = 64
Prompts = list[tuple[str, list[int]]]


@dataclass(frozen=True)
class Setup:
    """One way to serve.

    Attributes:
        write: fills an empty folder with the model repository.
        model: which model is asked.
        requests: inputs of each request as `name -> [dtype, shape, values]`.
        outputs: what the client asks for.
    """

    write: Callable[[Path], None]
    model: str
    requests: list[dict[str, Any]]
    outputs: list[str] = field(default_factory=lambda: ["text_output"])


def engine_requests(prompts: Prompts, streams: bool) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": ["INT32", [1, len(ids)], ids],
            "input_lengths": ["INT32", [1, 1], [len(ids)]],
            "request_output_len": ["INT32", [1, 1], [TOKENS]],
            "streaming": ["BOOL", [1, 1], [streams]],
        }
        for _, ids in prompts
    ]


def text_requests(prompts: Prompts, streams: bool) -> list[dict[str, Any]]:
    return [
        {
            "text_input": ["BYTES", [1, 1], [text]],
            "max_tokens": ["INT32", [1, 1], [TOKENS]],
            "stream": ["BOOL", [1, 1], [streams]],
        }
        for text, _ in prompts
    ]


def preprocessing_requests(prompts: Prompts) -> list[dict[str, Any]]:
    return [
        {"QUERY": ["BYTES", [1, 1], [text]], "REQUEST_OUTPUT_LEN": ["INT32", [1, 1], [TOKENS]]} for text, _ in prompts
    ]


def write_echo(folder: Path, *, streams: bool, config: str | None = None) -> None:
    """The stand-in engine as model `tensorrt_llm`, behind trtkit's config.pbtxt or a given one."""
    if config is None:
        message = pbtxt.model_config(
            "tensorrt_llm",
            inputs=contract.llm_inputs(),
            outputs=contract.llm_outputs(),
            max_batch_size=SLOTS,
            decoupled=streams,
            backend="python",
            parameters={},
        )
        config = pbtxt.dumps(message)
    (folder / "tensorrt_llm/1").mkdir(parents=True)
    (folder / "tensorrt_llm/config.pbtxt").write_text(config)
    shutil.copy(HERE / "echo_model.py", folder / "tensorrt_llm/1/model.py")


def write_nvidia(folder: Path, models: Path, tokenizer: Path, *, streams: bool) -> None:
    """NVIDIA's preprocessing, postprocessing and ensemble, one instance each, around the stand-in engine.

    Args:
        models: `all_models/inflight_batcher_llm` of a checkout of triton-inference-server/tensorrtllm_backend.
    """
    values = {
        "tokenizer_dir": str(tokenizer), "triton_max_batch_size": SLOTS, "preprocessing_instance_count": 1,
        "postprocessing_instance_count": 1, "max_queue_delay_microseconds": 0, "max_queue_size": 0,
        "logits_datatype": "TYPE_FP32", "decoupled_mode": str(streams).lower(), "triton_backend": "python",
        "encoder_input_features_data_type": "TYPE_FP16", "prompt_embedding_table_data_type": "TYPE_FP16",
        "exclude_input_in_output": "true", "add_special_tokens": "true", "skip_special_tokens": "true",
    }  # fmt: skip

    def filled(name: str) -> str:
        return string.Template((models / name / "config.pbtxt").read_text()).safe_substitute(values)

    for name in ("preprocessing", "postprocessing", "ensemble"):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(filled(name))
        if (models / name / "1/model.py").is_file():
            shutil.copy(models / name / "1/model.py", folder / name / "1/model.py")
    write_echo(folder, streams=streams, config=filled("tensorrt_llm"))


def write_ensemble(folder: Path, tokenizer: Path, *, streams: bool) -> None:
    """trtkit's `ensemble` topology around the stand-in engine."""
    _write(folder, tokenizer, runtime="tensorrtllm", topology="ensemble", streams=streams)
    config = (folder / "tensorrt_llm/config.pbtxt").read_text()
    for name in ("llm", "tensorrt_llm"):
        shutil.rmtree(folder / name, ignore_errors=True)
    write_echo(folder, streams=streams, config=config.replace('backend: "tensorrtllm"', 'backend: "python"'))


def write_fused(folder: Path, tokenizer: Path, *, streams: bool, wait_ms: float = 0.0) -> None:
    """trtkit's `fused` topology with the stand-in engine in its process."""
    _write(folder, tokenizer, runtime="reference", topology="fused", streams=streams, wait_ms=wait_ms)
    config = folder / "llm/config.pbtxt"
    text = config.read_text()
    changed = text.replace('string_value: "reference"', 'string_value: "echo"')
    assert changed != text
    config.write_text(changed)
    shutil.copy(HERE / "echo_engine.py", folder / "llm/1/serving/engines/echo.py")


def _write(folder: Path, tokenizer: Path, *, runtime: str, topology: str, streams: bool, wait_ms: float = 0.0) -> None:
    config = BuildConfig.model_validate(
        {
            "name": "benchmark",
            "model": {"source": str(tokenizer)},
            "engine": {"max_batch_size": SLOTS},
            "serving": {
                "runtime": runtime,
                "topology": topology,
                "streaming": streams,
                "max_batch_size": SLOTS,
                **({"max_token_wait_ms": wait_ms} if wait_ms else {}),
            },
        }
    )
    files = render_repository(config, tokenizer_dir=tokenizer, model_path_in_container="/not/there")
    folder.rmdir()
    write_repository(files, folder)
