"""The tensors of the four models in an LLM repository, as data: what the generator writes, clients send, the
`reference` runtime reads and the validator looks for.

Names, types and shapes are those of NVIDIA's inflight_batcher_llm repository (tensorrtllm_backend v0.20,
`all_models/inflight_batcher_llm/*/config.pbtxt`), so clients written for it work unchanged. Text only: the multimodal,
encoder-decoder, LoRA and guided-decoding tensors of preprocessing and of the ensemble are left out; the `tensorrt_llm`
model has them all, because the C++ backend looks for them by name.

Which release has which tensor was read off the same files at the tags v0.9.0 to v0.19.0 of tensorrtllm_backend and, for
later ones, in TensorRT-LLM's triton_backend/; optional tensors of the reference runtime are those of the newest.

Two tensors are additions: postprocessing takes `BATCH_INDEX` and `SEQUENCE_INDEX`, which tell apart the sequences of
one request whose pieces arrive one by one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from trtkit.contract_tensors import Step, Tensor, in_range, may, need, ragged_, scalar_

__all__ = ["Step", "Tensor", "in_range"]  # besides the tables and functions below

PREPROCESSING_INPUTS = (
    need("QUERY", "STRING"),
    need("REQUEST_OUTPUT_LEN", "INT32"),
    may("BAD_WORDS_DICT", "STRING", -1),
    may("STOP_WORDS_DICT", "STRING", -1),
    may("END_ID", "INT32"),
    may("PAD_ID", "INT32"),
)
PREPROCESSING_OUTPUTS = (
    need("INPUT_ID", "INT32", -1),
    need("REQUEST_INPUT_LEN", "INT32"),
    need("BAD_WORDS_IDS", "INT32", 2, -1),
    need("STOP_WORDS_IDS", "INT32", 2, -1),
    need("REQUEST_OUTPUT_LEN", "INT32", -1),
    need("OUT_END_ID", "INT32"),
    need("OUT_PAD_ID", "INT32"),
)

POSTPROCESSING_INPUTS = (
    need("TOKENS_BATCH", "INT32", -1, -1),
    need("SEQUENCE_LENGTH", "INT32", -1),
    may("BATCH_INDEX", "INT32"),
    may("SEQUENCE_INDEX", "INT32"),
)
POSTPROCESSING_OUTPUTS = (need("OUTPUT", "STRING", -1),)

_LLM_INPUTS = (
    Tensor("input_ids", "INT32", (-1,), ragged=True, until="0.15"),
    ragged_("input_ids", "INT32", -1, reference=True, since="0.15"),
    ragged_("encoder_input_features", "FP16", -1, -1, since="0.15"),
    scalar_("encoder_output_lengths", "INT32", since="0.15"),
    Tensor("input_lengths", "INT32", scalar=True, reference=True),
    Tensor("request_output_len", "INT32", until="0.12"),
    Tensor("request_output_len", "INT32", scalar=True, reference=True, since="0.12"),
    scalar_("num_return_sequences", "INT32", reference=True, since="0.14"),
    ragged_("draft_input_ids", "INT32", -1),
    ragged_("decoder_input_ids", "INT32", -1, since="0.11"),
    scalar_("decoder_input_lengths", "INT32", since="0.11"),
    ragged_("draft_logits", "LOGITS", -1, -1),
    scalar_("draft_acceptance_threshold", "FP32", since="0.10"),
    scalar_("end_id", "INT32", reference=True),
    scalar_("pad_id", "INT32", reference=True),
    ragged_("stop_words_list", "INT32", 2, -1, reference=True),
    ragged_("bad_words_list", "INT32", 2, -1, reference=True),
    ragged_("embedding_bias", "FP32", -1),
    scalar_("beam_width", "INT32", reference=True),
    scalar_("temperature", "FP32", reference=True),
    scalar_("runtime_top_k", "INT32", reference=True),
    scalar_("runtime_top_p", "FP32", reference=True),
    scalar_("runtime_top_p_min", "FP32", since="0.10"),
    scalar_("runtime_top_p_decay", "FP32", since="0.10"),
    scalar_("runtime_top_p_reset_ids", "INT32", since="0.10"),
    scalar_("len_penalty", "FP32"),
    scalar_("early_stopping", "BOOL", since="0.10"),
    scalar_("repetition_penalty", "FP32", reference=True),
    scalar_("min_length", "INT32", until="0.20"),
    scalar_("min_tokens", "INT32", reference=True, since="0.20"),
    scalar_("beam_search_diversity_rate", "FP32", since="0.10"),
    scalar_("presence_penalty", "FP32", reference=True),
    scalar_("frequency_penalty", "FP32", reference=True),
    scalar_("random_seed", "UINT64", until="0.20"),
    scalar_("seed", "UINT64", reference=True, since="0.20"),
    scalar_("return_log_probs", "BOOL", reference=True),
    scalar_("return_context_logits", "BOOL"),
    scalar_("return_generation_logits", "BOOL"),
    scalar_("return_perf_metrics", "BOOL", since="0.19"),
    scalar_("return_kv_cache_reuse_stats", "BOOL", since="0.16", until="0.19"),
    scalar_("return_num_input_tokens", "BOOL", since="1.0"),
    scalar_("return_num_output_tokens", "BOOL", since="1.0"),
    scalar_("exclude_input_in_output", "BOOL", reference=True, since="0.14"),
    may("stop", "BOOL", until="0.12"),
    may("streaming", "BOOL", until="0.12"),
    scalar_("stop", "BOOL", reference=True, since="0.12"),
    scalar_("streaming", "BOOL", reference=True, since="0.12"),
    ragged_("prompt_embedding_table", "FP16", -1, -1),
    ragged_("prompt_table_extra_ids", "UINT64", -1, since="0.13"),
    scalar_("prompt_vocab_size", "INT32"),
    ragged_("cross_attention_mask", "BOOL", -1, -1, since="0.15"),
    may("mrope_rotary_cos_sin", "FP32", -1, since="0.19"),
    may("mrope_position_deltas", "INT64", since="0.19"),
    scalar_("lora_task_id", "UINT64"),
    ragged_("lora_weights", "FP16", -1, -1),
    ragged_("lora_config", "INT32", -1, 3),
    ragged_("context_phase_params", "UINT8", -1, since="0.14"),
    ragged_("skip_cross_attn_blocks", "BOOL", since="0.16"),
    ragged_("retention_token_range_starts", "INT32", -1, since="0.17"),
    ragged_("retention_token_range_ends", "INT32", -1, since="0.17"),
    ragged_("retention_token_range_priorities", "INT32", -1, since="0.17"),
    ragged_("retention_token_range_durations_ms", "INT32", -1, since="0.17"),
    ragged_("retention_decode_priority", "INT32", since="0.17"),
    ragged_("retention_decode_duration_ms", "INT32", since="0.17"),
    ragged_("guided_decoding_guide_type", "STRING", since="0.19"),
    ragged_("guided_decoding_guide", "STRING", since="0.19"),
    ragged_("lookahead_window_size", "INT32", since="0.19"),
    ragged_("lookahead_ngram_size", "INT32", since="0.19"),
    ragged_("lookahead_verification_set_size", "INT32", since="0.19"),
)
_LLM_OUTPUTS = (
    need("output_ids", "INT32", -1, -1, reference=True),
    need("sequence_length", "INT32", -1, reference=True),
    need("cum_log_probs", "FP32", -1, reference=True),
    need("output_log_probs", "FP32", -1, -1, reference=True),
    need("context_logits", "LOGITS", -1, -1),
    need("generation_logits", "LOGITS", -1, -1, -1),
    need("batch_index", "INT32", reference=True, since="0.12"),
    need("sequence_index", "INT32", reference=True, since="0.14"),
    need("context_phase_params", "UINT8", -1, since="0.14"),
    need("kv_cache_alloc_new_blocks", "INT32", since="0.16"),
    need("kv_cache_reused_blocks", "INT32", since="0.16"),
    need("kv_cache_alloc_total_blocks", "INT32", since="0.16"),
    need("arrival_time_ns", "INT64", since="0.19"),
    need("first_scheduled_time_ns", "INT64", since="0.19"),
    need("first_token_time_ns", "INT64", since="0.19"),
    need("last_token_time_ns", "INT64", since="0.19"),
    need("acceptance_rate", "FP32", since="0.19"),
    need("total_accepted_draft_tokens", "INT32", since="0.19"),
    need("total_draft_tokens", "INT32", since="0.19"),
    need("num_input_tokens", "INT32", since="1.0"),
    need("num_output_tokens", "INT32", since="1.0"),
)

ENSEMBLE_INPUTS = (
    need("text_input", "STRING"),
    need("max_tokens", "INT32"),
    may("num_return_sequences", "INT32"),
    may("bad_words", "STRING", -1),
    may("stop_words", "STRING", -1),
    may("exclude_input_in_output", "BOOL"),
    may("end_id", "INT32"),
    may("pad_id", "INT32"),
    may("top_k", "INT32"),
    may("top_p", "FP32"),
    may("temperature", "FP32"),
    may("repetition_penalty", "FP32"),
    may("min_tokens", "INT32"),
    may("presence_penalty", "FP32"),
    may("frequency_penalty", "FP32"),
    may("seed", "UINT64"),
    may("return_log_probs", "BOOL"),
    may("beam_width", "INT32"),
    may("stream", "BOOL"),
)
ENSEMBLE_OUTPUTS = (
    need("text_output", "STRING", -1),
    need("cum_log_probs", "FP32", -1),
    need("output_log_probs", "FP32", -1, -1),
    need("batch_index", "INT32"),
    need("sequence_index", "INT32"),
)
EXTRA_OUTPUTS = ("cum_log_probs", "output_log_probs", "batch_index", "sequence_index")
"""Outputs of NVIDIA's ensemble that cost about 20 us of CPU each per token, asked for or not."""

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


def llm_inputs(
    *, reference: bool = False, logits_dtype: str = "FP32", version: str | None = None
) -> tuple[Tensor, ...]:
    """Inputs of the `tensorrt_llm` model.

    Args:
        reference: only those that the `reference` runtime has.
        logits_dtype: dtype of the engine's logits, which depends on how it was built.
        version: of TensorRT-LLM, whose C++ backend looks for its own set of tensors; None is the newest.
    """
    return _select(_LLM_INPUTS, reference, logits_dtype, version)


def llm_outputs(
    *, reference: bool = False, logits_dtype: str = "FP32", version: str | None = None
) -> tuple[Tensor, ...]:
    """Outputs of the `tensorrt_llm` model; arguments as in `llm_inputs`."""
    return _select(_LLM_OUTPUTS, reference, logits_dtype, version)


def ensemble_steps(version: str | None = None, extra: Collection[str] = EXTRA_OUTPUTS) -> tuple[Step, ...]:
    """The steps of the ensemble around the `tensorrt_llm` model of a TensorRT-LLM version: what its model does not
    have is not mapped, and what it calls otherwise is mapped by that name.

    Args:
        extra: which of `EXTRA_OUTPUTS` the ensemble has.
    """
    inputs = {tensor.name for tensor in llm_inputs(version=version)}
    outputs = {tensor.name for tensor in llm_outputs(version=version)}
    before, llm, after = ENSEMBLE_STEPS
    renamed = {(name if name in inputs else _OLD_NAMES.get(name, name)): value for name, value in llm.inputs.items()}
    llm = Step(
        llm.model,
        inputs={name: value for name, value in renamed.items() if name in inputs},
        outputs={
            name: value
            for name, value in llm.outputs.items()
            if name in outputs and (value not in EXTRA_OUTPUTS or value in extra)
        },
    )
    if "sequence_index" not in extra:  # nobody could tell several answers apart
        llm.inputs.pop("num_return_sequences", None)
    made = {*before.outputs.values(), *llm.outputs.values()}
    after = replace(after, inputs={name: value for name, value in after.inputs.items() if value in made})
    return before, llm, after


def ensemble_inputs(version: str | None = None, extra: Collection[str] = EXTRA_OUTPUTS) -> tuple[Tensor, ...]:
    """Inputs of the ensemble that some step of `ensemble_steps` consumes."""
    used = {value for step in ensemble_steps(version, extra) for value in step.inputs.values()}
    return tuple(tensor for tensor in ENSEMBLE_INPUTS if tensor.name in used)


def ensemble_outputs(version: str | None = None, extra: Collection[str] = EXTRA_OUTPUTS) -> tuple[Tensor, ...]:
    """Outputs of the ensemble that some step of `ensemble_steps` produces."""
    made = {value for step in ensemble_steps(version, extra) for value in step.outputs.values()}
    return tuple(tensor for tensor in ENSEMBLE_OUTPUTS if tensor.name in made)


_OLD_NAMES = {"min_tokens": "min_length", "seed": "random_seed"}
"""Inputs of the `tensorrt_llm` model that had another name before TensorRT-LLM 0.20."""


def _select(tensors: tuple[Tensor, ...], reference: bool, logits_dtype: str, version: str | None) -> tuple[Tensor, ...]:
    return tuple(
        replace(tensor, dtype=logits_dtype) if tensor.dtype == "LOGITS" else tensor
        for tensor in tensors
        if tensor.known_to(version) and (tensor.reference or not reference)
    )
