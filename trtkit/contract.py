"""The tensors of the four models in an LLM repository, as data: what the generator writes, clients send, the
`reference` runtime reads and the validator looks for.

Names, types and shapes are those of NVIDIA's inflight_batcher_llm repository (tensorrtllm_backend v0.20,
`all_models/inflight_batcher_llm/*/config.pbtxt`), so clients written for it work unchanged. Text only: the multimodal,
encoder-decoder, LoRA and guided-decoding tensors of preprocessing and of the ensemble are left out; the `tensorrt_llm`
model has them all, because the C++ backend looks for them by name.

Two tensors are additions: postprocessing takes `BATCH_INDEX` and `SEQUENCE_INDEX`, which tell apart the sequences of
one request whose pieces arrive one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tensor:
    """One input or output of a model.

    Attributes:
        dtype: without the `TYPE_` prefix, such as `INT32`.
        dims: shape without the batch dimension; -1 is any size.
        optional: a request may leave it out (inputs only).
        scalar: the model sees shape [batch] where clients send [batch, 1] (a reshape to []).
        ragged: requests with different sizes may share a batch.
        reference: the `reference` runtime has this tensor too.
    """

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    scalar: bool = False
    ragged: bool = False
    reference: bool = False

    @property
    def wire_dtype(self) -> str:
        """The dtype as requests name it: the KServe protocol says BYTES where config.pbtxt says STRING."""
        return "BYTES" if self.dtype == "STRING" else self.dtype


@dataclass(frozen=True)
class Step:
    """One step of the ensemble: which ensemble tensor feeds which input, and what each output is called there."""

    model: str
    inputs: dict[str, str]
    outputs: dict[str, str]


def _need(name: str, dtype: str, *dims: int, reference: bool = False) -> Tensor:
    return Tensor(name, dtype, dims or (1,), reference=reference)


def _may(name: str, dtype: str, *dims: int) -> Tensor:
    return Tensor(name, dtype, dims or (1,), optional=True)


def _scalar(name: str, dtype: str, *, reference: bool = False) -> Tensor:
    return Tensor(name, dtype, optional=True, scalar=True, reference=reference)


def _ragged(name: str, dtype: str, *dims: int, reference: bool = False) -> Tensor:
    return Tensor(name, dtype, dims or (1,), optional=True, ragged=True, reference=reference)


PREPROCESSING_INPUTS = (
    _need("QUERY", "STRING"),
    _need("REQUEST_OUTPUT_LEN", "INT32"),
    _may("BAD_WORDS_DICT", "STRING", -1),
    _may("STOP_WORDS_DICT", "STRING", -1),
    _may("END_ID", "INT32"),
    _may("PAD_ID", "INT32"),
)
PREPROCESSING_OUTPUTS = (
    _need("INPUT_ID", "INT32", -1),
    _need("REQUEST_INPUT_LEN", "INT32"),
    _need("BAD_WORDS_IDS", "INT32", 2, -1),
    _need("STOP_WORDS_IDS", "INT32", 2, -1),
    _need("REQUEST_OUTPUT_LEN", "INT32", -1),
    _need("OUT_END_ID", "INT32"),
    _need("OUT_PAD_ID", "INT32"),
)

POSTPROCESSING_INPUTS = (
    _need("TOKENS_BATCH", "INT32", -1, -1),
    _need("SEQUENCE_LENGTH", "INT32", -1),
    _may("BATCH_INDEX", "INT32"),
    _may("SEQUENCE_INDEX", "INT32"),
)
POSTPROCESSING_OUTPUTS = (_need("OUTPUT", "STRING", -1),)

_LLM_INPUTS = (
    _ragged("input_ids", "INT32", -1, reference=True),
    _ragged("encoder_input_features", "FP16", -1, -1),
    _scalar("encoder_output_lengths", "INT32"),
    Tensor("input_lengths", "INT32", scalar=True, reference=True),
    Tensor("request_output_len", "INT32", scalar=True, reference=True),
    _scalar("num_return_sequences", "INT32", reference=True),
    _ragged("draft_input_ids", "INT32", -1),
    _ragged("decoder_input_ids", "INT32", -1),
    _scalar("decoder_input_lengths", "INT32"),
    _ragged("draft_logits", "LOGITS", -1, -1),
    _scalar("draft_acceptance_threshold", "FP32"),
    _scalar("end_id", "INT32", reference=True),
    _scalar("pad_id", "INT32", reference=True),
    _ragged("stop_words_list", "INT32", 2, -1, reference=True),
    _ragged("bad_words_list", "INT32", 2, -1, reference=True),
    _ragged("embedding_bias", "FP32", -1),
    _scalar("beam_width", "INT32", reference=True),
    _scalar("temperature", "FP32", reference=True),
    _scalar("runtime_top_k", "INT32", reference=True),
    _scalar("runtime_top_p", "FP32", reference=True),
    _scalar("runtime_top_p_min", "FP32"),
    _scalar("runtime_top_p_decay", "FP32"),
    _scalar("runtime_top_p_reset_ids", "INT32"),
    _scalar("len_penalty", "FP32"),
    _scalar("early_stopping", "BOOL"),
    _scalar("repetition_penalty", "FP32", reference=True),
    _scalar("min_tokens", "INT32", reference=True),
    _scalar("beam_search_diversity_rate", "FP32"),
    _scalar("presence_penalty", "FP32", reference=True),
    _scalar("frequency_penalty", "FP32", reference=True),
    _scalar("seed", "UINT64", reference=True),
    _scalar("return_log_probs", "BOOL", reference=True),
    _scalar("return_context_logits", "BOOL"),
    _scalar("return_generation_logits", "BOOL"),
    _scalar("return_perf_metrics", "BOOL"),
    _scalar("exclude_input_in_output", "BOOL", reference=True),
    _scalar("stop", "BOOL", reference=True),
    _scalar("streaming", "BOOL", reference=True),
    _ragged("prompt_embedding_table", "FP16", -1, -1),
    _ragged("prompt_table_extra_ids", "UINT64", -1),
    _scalar("prompt_vocab_size", "INT32"),
    _ragged("cross_attention_mask", "BOOL", -1, -1),
    _may("mrope_rotary_cos_sin", "FP32", -1),
    _may("mrope_position_deltas", "INT64"),
    _scalar("lora_task_id", "UINT64"),
    _ragged("lora_weights", "FP16", -1, -1),
    _ragged("lora_config", "INT32", -1, 3),
    _ragged("context_phase_params", "UINT8", -1),
    _ragged("skip_cross_attn_blocks", "BOOL"),
    _ragged("retention_token_range_starts", "INT32", -1),
    _ragged("retention_token_range_ends", "INT32", -1),
    _ragged("retention_token_range_priorities", "INT32", -1),
    _ragged("retention_token_range_durations_ms", "INT32", -1),
    _ragged("retention_decode_priority", "INT32"),
    _ragged("retention_decode_duration_ms", "INT32"),
    _ragged("guided_decoding_guide_type", "STRING"),
    _ragged("guided_decoding_guide", "STRING"),
    _ragged("lookahead_window_size", "INT32"),
    _ragged("lookahead_ngram_size", "INT32"),
    _ragged("lookahead_verification_set_size", "INT32"),
)
_LLM_OUTPUTS = (
    _need("output_ids", "INT32", -1, -1, reference=True),
    _need("sequence_length", "INT32", -1, reference=True),
    _need("cum_log_probs", "FP32", -1, reference=True),
    _need("output_log_probs", "FP32", -1, -1, reference=True),
    _need("context_logits", "LOGITS", -1, -1),
    _need("generation_logits", "LOGITS", -1, -1, -1),
    _need("batch_index", "INT32", reference=True),
    _need("sequence_index", "INT32", reference=True),
    _need("context_phase_params", "UINT8", -1),
    _need("kv_cache_alloc_new_blocks", "INT32"),
    _need("kv_cache_reused_blocks", "INT32"),
    _need("kv_cache_alloc_total_blocks", "INT32"),
    _need("arrival_time_ns", "INT64"),
    _need("first_scheduled_time_ns", "INT64"),
    _need("first_token_time_ns", "INT64"),
    _need("last_token_time_ns", "INT64"),
    _need("acceptance_rate", "FP32"),
    _need("total_accepted_draft_tokens", "INT32"),
    _need("total_draft_tokens", "INT32"),
)

ENSEMBLE_INPUTS = (
    _need("text_input", "STRING"),
    _need("max_tokens", "INT32"),
    _may("num_return_sequences", "INT32"),
    _may("bad_words", "STRING", -1),
    _may("stop_words", "STRING", -1),
    _may("exclude_input_in_output", "BOOL"),
    _may("end_id", "INT32"),
    _may("pad_id", "INT32"),
    _may("top_k", "INT32"),
    _may("top_p", "FP32"),
    _may("temperature", "FP32"),
    _may("repetition_penalty", "FP32"),
    _may("min_tokens", "INT32"),
    _may("presence_penalty", "FP32"),
    _may("frequency_penalty", "FP32"),
    _may("seed", "UINT64"),
    _may("return_log_probs", "BOOL"),
    _may("beam_width", "INT32"),
    _may("stream", "BOOL"),
)
ENSEMBLE_OUTPUTS = (
    _need("text_output", "STRING", -1),
    _need("cum_log_probs", "FP32", -1),
    _need("output_log_probs", "FP32", -1, -1),
    _need("batch_index", "INT32"),
    _need("sequence_index", "INT32"),
)
ENSEMBLE_STEPS = (
    Step(
        "preprocessing",
        inputs={
            "QUERY": "text_input",
            "REQUEST_OUTPUT_LEN": "max_tokens",
            "BAD_WORDS_DICT": "bad_words",
            "STOP_WORDS_DICT": "stop_words",
            "END_ID": "end_id",
            "PAD_ID": "pad_id",
        },
        outputs={
            "INPUT_ID": "_INPUT_ID",
            "REQUEST_INPUT_LEN": "_REQUEST_INPUT_LEN",
            "BAD_WORDS_IDS": "_BAD_WORDS_IDS",
            "STOP_WORDS_IDS": "_STOP_WORDS_IDS",
            "REQUEST_OUTPUT_LEN": "_REQUEST_OUTPUT_LEN",
            "OUT_END_ID": "_PREPROCESSOR_END_ID",
            "OUT_PAD_ID": "_PREPROCESSOR_PAD_ID",
        },
    ),
    Step(
        "tensorrt_llm",
        inputs={
            "input_ids": "_INPUT_ID",
            "input_lengths": "_REQUEST_INPUT_LEN",
            "request_output_len": "_REQUEST_OUTPUT_LEN",
            "bad_words_list": "_BAD_WORDS_IDS",
            "stop_words_list": "_STOP_WORDS_IDS",
            "end_id": "_PREPROCESSOR_END_ID",
            "pad_id": "_PREPROCESSOR_PAD_ID",
            "num_return_sequences": "num_return_sequences",
            "exclude_input_in_output": "exclude_input_in_output",
            "runtime_top_k": "top_k",
            "runtime_top_p": "top_p",
            "temperature": "temperature",
            "repetition_penalty": "repetition_penalty",
            "min_tokens": "min_tokens",
            "presence_penalty": "presence_penalty",
            "frequency_penalty": "frequency_penalty",
            "seed": "seed",
            "return_log_probs": "return_log_probs",
            "beam_width": "beam_width",
            "streaming": "stream",
        },
        outputs={
            "output_ids": "_TOKENS_BATCH",
            "sequence_length": "_SEQUENCE_LENGTH",
            "cum_log_probs": "cum_log_probs",
            "output_log_probs": "output_log_probs",
            "batch_index": "batch_index",
            "sequence_index": "sequence_index",
        },
    ),
    Step(
        "postprocessing",
        inputs={
            "TOKENS_BATCH": "_TOKENS_BATCH",
            "SEQUENCE_LENGTH": "_SEQUENCE_LENGTH",
            "BATCH_INDEX": "batch_index",
            "SEQUENCE_INDEX": "sequence_index",
        },
        outputs={"OUTPUT": "text_output"},
    ),
)


def llm_inputs(*, reference: bool = False, logits_dtype: str = "FP32") -> tuple[Tensor, ...]:
    """Inputs of the `tensorrt_llm` model.

    Args:
        reference: only those that the `reference` runtime has.
        logits_dtype: dtype of the engine's logits, which depends on how it was built.
    """
    return _select(_LLM_INPUTS, reference, logits_dtype)


def llm_outputs(*, reference: bool = False, logits_dtype: str = "FP32") -> tuple[Tensor, ...]:
    """Outputs of the `tensorrt_llm` model; arguments as in `llm_inputs`."""
    return _select(_LLM_OUTPUTS, reference, logits_dtype)


def _select(tensors: tuple[Tensor, ...], reference: bool, logits_dtype: str) -> tuple[Tensor, ...]:
    return tuple(
        replace(tensor, dtype=logits_dtype) if tensor.dtype == "LOGITS" else tensor
        for tensor in tensors
        if tensor.reference or not reference
    )
