"""The tensors of the model `llm`, the one contract of trtkit's serving path: whatever runtime and topology serve it.

Names that NVIDIA's ensemble has too mean the same there (see `trtkit.contract`), so a client of that one needs only
another model name. A request holds one prompt. Streamed pieces hold new text only; what describes the whole answer
(finish_reason, prompt_tokens, completion_tokens) comes with its last piece.
"""

from __future__ import annotations

from trtkit.contract import Tensor

MODEL = "llm"


def _may(name: str, dtype: str, *dims: int) -> Tensor:
    return Tensor(name, dtype, dims or (1,), optional=True)


INPUTS = (
    _may("text_input", "STRING"),
    _may("messages", "STRING"),
    _may("chat_template_kwargs", "STRING"),
    _may("max_tokens", "INT32"),
    _may("stream", "BOOL"),
    _may("cumulative", "BOOL"),
    _may("stop_words", "STRING", -1),
    _may("include_stop_words", "BOOL"),
    _may("bad_words", "STRING", -1),
    _may("end_id", "INT32"),
    _may("min_tokens", "INT32"),
    _may("exclude_input_in_output", "BOOL"),
    _may("num_return_sequences", "INT32"),
    _may("temperature", "FP32"),
    _may("top_k", "INT32"),
    _may("top_p", "FP32"),
    _may("repetition_penalty", "FP32"),
    _may("presence_penalty", "FP32"),
    _may("frequency_penalty", "FP32"),
    _may("seed", "UINT64"),
    _may("return_log_probs", "BOOL"),
    _may("lora_task_id", "UINT64"),
    _may("guided_decoding_guide_type", "STRING"),
    _may("guided_decoding_guide", "STRING"),
)
OUTPUTS = (
    Tensor("text_output", "STRING", (-1,)),
    Tensor("finish_reason", "STRING", (-1,)),
    Tensor("prompt_tokens", "INT32", (1,)),
    Tensor("completion_tokens", "INT32", (-1,)),
    Tensor("sequence_index", "INT32", (1,)),
    Tensor("cum_log_probs", "FP32", (-1,)),
    Tensor("output_log_probs", "FP32", (-1, -1)),
)
