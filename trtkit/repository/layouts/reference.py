"""The `reference` runtime: the model `tensorrt_llm` executes a TRT-LLM checkpoint on the CPU."""

from __future__ import annotations

from trtkit import contract, pbtxt
from trtkit.repository.layouts import tensorrt_llm_model
from trtkit.repository.layouts.code import model_code
from trtkit.repository.layouts.job import Files, Job


def render(job: Job) -> Files:
    """The model `tensorrt_llm`, with the tensors of NVIDIA's that the reference runtime has."""
    parameters = {
        "checkpoint_dir": job.model_path,
        "end_ids": ",".join(map(str, job.end_ids)),
        "exclude_input_in_output": "true",
    }
    if job.config.engine.max_seq_len is not None:
        parameters["max_seq_len"] = str(job.config.engine.max_seq_len)
    message, files = tensorrt_llm_model.model(
        job,
        parameters,
        inputs=contract.llm_inputs(reference=True),
        outputs=contract.llm_outputs(reference=True),
        backend="python",
    )
    return {"tensorrt_llm/config.pbtxt": pbtxt.dumps(message), **model_code("reference", "tensorrt_llm"), **files}
