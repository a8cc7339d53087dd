"""The model `llm`: tokenises, drives an engine in its own process and detokenises.

It is all there is in the `fused` topology. Beside an ensemble it is the front for streams: its engine then is the model
`tensorrt_llm` of the same server, which it can stop when a client goes away, as an ensemble cannot.
"""

from __future__ import annotations

from pathlib import Path

from trtkit import pbtxt, serving_contract
from trtkit.config_serving import Runtime
from trtkit.repository.layouts import scheduling
from trtkit.repository.layouts.job import MODELS, TOKENIZER_FILES, Files, Job, flag, tokenizer_json

FOLDER = f"{serving_contract.MODEL}/1"

ENGINES: dict[Runtime, tuple[str, str]] = {
    "reference": ("reference", "checkpoint_dir"),
    "tensorrtllm": ("executor", "gpt_model_path"),
    "llmapi": ("llmapi", "model"),
    "vllm": ("vllm", "model"),
}
"""Runtime -> the module in models/serving/engines that drives it in the model's own process, and the parameter that
tells it what to execute."""


def render(job: Job) -> Files:
    """The `fused` topology."""
    engine, parameter = ENGINES[job.config.serving.runtime]
    return _model(job, engine, {parameter: job.model_path})


def front(job: Job) -> Files:
    """`llm` beside an ensemble, in front of the server's own `tensorrt_llm`."""
    engine = job.config.serving.runtime == "tensorrtllm"
    release = {"model_release": job.tensorrt_llm} if engine else {}  # decides how tensors are called
    return _model(job, "triton", {"model_name": "tensorrt_llm", **release})


def _model(job: Job, engine: str, parameters: dict[str, str]) -> Files:
    serving = job.config.serving
    message = pbtxt.model_config(
        serving_contract.MODEL,
        inputs=serving_contract.INPUTS,
        outputs=serving_contract.OUTPUTS,
        max_batch_size=serving.max_batch_size,
        decoupled=serving.streaming,
        backend="python",
        parameters={**_parameters(job), "engine": engine, **parameters},
        # Requests that come together are tokenised together; how many run and wait, the model itself decides.
        dynamic_batching={},
    )
    scheduling.choose_versions(message, serving)
    tokenizer_json(job.tokenizer_dir)
    files: Files = {f"{serving_contract.MODEL}/config.pbtxt": pbtxt.dumps(message), **code(engine)}
    for name in TOKENIZER_FILES:
        if (job.tokenizer_dir / name).is_file():
            files[f"{FOLDER}/tokenizer/{name}"] = (job.tokenizer_dir / name).read_bytes()
    if serving.chat_template is not None:
        files[f"{FOLDER}/tokenizer/chat_template.jinja"] = Path(serving.chat_template).read_bytes()
    return files


def _parameters(job: Job) -> dict[str, str]:
    serving = job.config.serving
    given = {
        "tokenizer_dir": "tokenizer",
        "end_ids": ",".join(map(str, job.end_ids)),
        "add_special_tokens": flag(serving.add_special_tokens),
        "coalesce": flag(serving.coalesce),
        "max_token_wait_ms": f"{serving.max_token_wait_ms or 0.0:g}",
        "max_queue_size": str(serving.max_queue_size),
        "timeout_ms": f"{serving.queue.default_timeout_microseconds / 1000:g}",
        "allow_timeout_override": flag(serving.queue.allow_timeout_override),
    }
    if job.config.engine.max_seq_len is not None:
        given["max_seq_len"] = str(job.config.engine.max_seq_len)
    return given


def code(engine: str) -> Files:
    """model.py and the package beside it, with the one engine that this repository needs."""
    files: Files = {f"{FOLDER}/model.py": (MODELS / "llm/model.py").read_bytes()}
    package = MODELS / "serving"
    for path in sorted(package.rglob("*.py")):
        if path.parent.name != "engines" or path.stem in ("__init__", engine):
            files[f"{FOLDER}/serving/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    return files
