"""Every supported family: a tiny random model made by transformers, converted for many layouts, read back and run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from trtkit import architectures, hf
from trtkit.checkpoint import open_checkpoint
from trtkit.config import CheckpointConfig
from trtkit.convert.conversion import convert
from trtkit.convert.parallelism import valid_tp_sizes
from trtkit.convert.plan import plan_checkpoint
from trtkit.convert.readback import load_transformers_model, read_tensors
from trtkit.convert.source import plan_conversion, source_tensors
from trtkit.convert.verify import verify
from trtkit.errors import InputError


@dataclass(frozen=True)
class Case:
    """A tiny model.

    Attributes:
        model_type: transformers' name.
        settings: arguments of its config class.
        unused: source tensor -> number of leading rows that no checkpoint holds.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)


LLAMA_LIKE = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
WINDOW_EVERY_OTHER = ["sliding_attention", "full_attention"] * 2
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
GPT2_LIKE = {"vocab_size": 131, "n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 65}
FALCON_LIKE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "ffn_hidden_size": 96,
    "max_position_embeddings": 64,
}
FALCON_RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
OPT_LIKE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 65,
}
OPT_UNUSED = {"model.decoder.embed_positions.weight": 2}
BLOOM_LIKE = {"vocab_size": 131, "hidden_size": 64, "n_layer": 4, "n_head": 8}
GPT_NEOX_LIKE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GEMMA_LIKE = {**LLAMA_LIKE, "head_dim": 16}
GEMMA2_LIKE = {**GEMMA_LIKE, "sliding_window": 8, "query_pre_attn_scalar": 24}
GEMMA3_LIKE = {**GEMMA2_LIKE, "sliding_window_pattern": 3}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
PHI_LIKE = {**LLAMA_LIKE, "hidden_size": 64, "num_key_value_heads": 8}
PHI_ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}
PHI3_LIKE = {**LLAMA_LIKE, "hidden_size": 64, "pad_token_id": 0}
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 3.0, 5.0, 7.0],
}  # fmt: skip
CASES: dict[str, Case] = {
    "llama": Case("llama", LLAMA_LIKE),
    "llama-tied": Case("llama", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "llama-biases": Case("llama", {**LLAMA_LIKE, "attention_bias": True, "mlp_bias": True}),
    "llama3": Case("llama", {**LLAMA_LIKE, "rope_parameters": LLAMA3_ROPE}),
    "llama-head-dim": Case("llama", {**LLAMA_LIKE, "head_dim": 16, "num_key_value_heads": 4}),
    "llama-mha": Case("llama", {**LLAMA_LIKE, "num_key_value_heads": 8}),
    "llama-mqa": Case("llama", {**LLAMA_LIKE, "num_key_value_heads": 1}),
    "mistral": Case("mistral", LLAMA_LIKE),
    "mistral-window": Case("mistral", {**LLAMA_LIKE, "sliding_window": 8}),
    "qwen2": Case("qwen2", LLAMA_LIKE),
    "qwen2-tied": Case("qwen2", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen2-mha": Case("qwen2", {**LLAMA_LIKE, "num_key_value_heads": 8}),
    "qwen2-yarn": Case("qwen2", {**LLAMA_LIKE, "rope_parameters": YARN_ROPE}),
    "qwen2-window": Case("qwen2", {**LLAMA_LIKE, **WINDOW, "max_window_layers": 2}),
    "qwen2-window-list": Case("qwen2", {**LLAMA_LIKE, **WINDOW, "layer_types": WINDOW_EVERY_OTHER}),
    "qwen3": Case("qwen3", {**LLAMA_LIKE, "head_dim": 16}),
    "qwen3-default-head-dim": Case("qwen3", {**LLAMA_LIKE, "num_attention_heads": 4}),
    "qwen3-tied": Case("qwen3", {**LLAMA_LIKE, "head_dim": 4, "tie_word_embeddings": True}),
    "qwen3-yarn": Case("qwen3", {**LLAMA_LIKE, "head_dim": 16, "rope_parameters": YARN_ROPE}),
    "qwen3-window": Case("qwen3", {**LLAMA_LIKE, "head_dim": 16, **WINDOW, "max_window_layers": 1}),
    "mixtral": Case("mixtral", {**LLAMA_LIKE, "num_local_experts": 6, "num_experts_per_tok": 3}),
    "mixtral-window": Case("mixtral", {**LLAMA_LIKE, "head_dim": 16, "sliding_window": 8}),
    "mixtral-tied": Case("mixtral", {**LLAMA_LIKE, "num_local_experts": 4, "tie_word_embeddings": True}),
    "qwen2-moe": Case("qwen2_moe", {**LLAMA_LIKE, **EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen2-moe-normed": Case("qwen2_moe", {**LLAMA_LIKE, **EXPERTS, "norm_topk_prob": True}),
    "qwen2-moe-no-biases": Case("qwen2_moe", {**LLAMA_LIKE, **EXPERTS, "qkv_bias": False}),
    "qwen2-moe-window": Case("qwen2_moe", {**LLAMA_LIKE, **EXPERTS, **WINDOW, "max_window_layers": 3}),
    "qwen3-moe": Case("qwen3_moe", {**LLAMA_LIKE, **EXPERTS, "norm_topk_prob": True, "head_dim": 16}),
    "qwen3-moe-not-normed": Case("qwen3_moe", {**LLAMA_LIKE, **EXPERTS}),
    "qwen3-moe-yarn": Case("qwen3_moe", {**LLAMA_LIKE, **EXPERTS, "rope_parameters": YARN_ROPE}),
    "qwen3-moe-window": Case("qwen3_moe", {**LLAMA_LIKE, **EXPERTS, **WINDOW, "tie_word_embeddings": True}),
    "gpt2": Case("gpt2", GPT2_LIKE),
    "gpt2-untied": Case("gpt2", {**GPT2_LIKE, "n_inner": 96, "tie_word_embeddings": False}),
    "gpt2-odd-heads": Case("gpt2", {**GPT2_LIKE, "n_embd": 60, "n_head": 6, "activation_function": "gelu"}),
    "falcon-7b": Case("falcon", FALCON_LIKE),
    "falcon-40b": Case("falcon", {**FALCON_LIKE, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-40b-mha": Case("falcon", {**FALCON_LIKE, "new_decoder_architecture": True, "tie_word_embeddings": False}),
    "falcon-40b-one-kv-head": Case("falcon", {**FALCON_LIKE, "new_decoder_architecture": True, "num_kv_heads": 1}),
    "falcon-40b-even-groups": Case(
        "falcon",
        {
            **FALCON_LIKE,
            "hidden_size": 96,
            "num_attention_heads": 12,
            "new_decoder_architecture": True,
            "num_kv_heads": 4,
        },
    ),
    "falcon2-11b": Case(
        "falcon",
        {
            **FALCON_LIKE,
            "new_decoder_architecture": True,
            "num_kv_heads": 4,
            "num_ln_in_parallel_attn": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500042.0},
            "tie_word_embeddings": False,
        },
    ),
    "falcon-rw": Case("falcon", {**FALCON_LIKE, **FALCON_RW}),
    "falcon-rw-odd-heads": Case("falcon", {**FALCON_LIKE, **FALCON_RW, "hidden_size": 48, "num_attention_heads": 6}),
    "falcon-mha": Case("falcon", {**FALCON_LIKE, "multi_query": False}),
    "falcon-sequential": Case("falcon", {**FALCON_LIKE, "parallel_attn": False, "bias": True}),
    "opt": Case("opt", OPT_LIKE, OPT_UNUSED),
    "opt-post-norm": Case("opt", {**OPT_LIKE, "do_layer_norm_before": False}, OPT_UNUSED),
    "opt-untied": Case("opt", {**OPT_LIKE, "activation_function": "gelu", "tie_word_embeddings": False}, OPT_UNUSED),
    "bloom": Case("bloom", BLOOM_LIKE),
    "bloom-odd-heads": Case("bloom", {**BLOOM_LIKE, "hidden_size": 48, "n_head": 6}),
    "bloom-untied": Case("bloom", {**BLOOM_LIKE, "tie_word_embeddings": False}),
    "gpt-neox": Case("gpt_neox", GPT_NEOX_LIKE),
    "gpt-neox-rotary": Case(
        "gpt_neox",
        {
            **GPT_NEOX_LIKE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt-neox-tied": Case("gpt_neox", {**GPT_NEOX_LIKE, "hidden_act": "gelu_fast", "tie_word_embeddings": True}),
    "starcoder2": Case("starcoder2", LLAMA_LIKE),
    "starcoder2-untied": Case("starcoder2", {**LLAMA_LIKE, "use_bias": False, "tie_word_embeddings": False}),
    "starcoder2-linear-rope": Case(
        "starcoder2", {**LLAMA_LIKE, "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}
    ),
    "starcoder2-window": Case("starcoder2", {**LLAMA_LIKE, "sliding_window": 8, "hidden_act": "gelu"}),
    "gemma": Case("gemma", GEMMA_LIKE),
    "gemma-mqa": Case("gemma", {**GEMMA_LIKE, "num_key_value_heads": 1}),
    "gemma-untied-biases": Case("gemma", {**GEMMA_LIKE, "attention_bias": True, "tie_word_embeddings": False}),
    "gemma2": Case("gemma2", GEMMA2_LIKE),
    "gemma2-no-softcapping": Case(
        "gemma2",
        {**GEMMA2_LIKE, "num_key_value_heads": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2-layer-types": Case(
        "gemma2", {**GEMMA2_LIKE, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}
    ),
    "gemma3": Case("gemma3_text", GEMMA3_LIKE),
    "gemma3-rope": Case("gemma3_text", {**GEMMA3_LIKE, "rope_parameters": GEMMA3_ROPE, "final_logit_softcapping": 2.0}),
    "gemma3-all-sliding": Case("gemma3_text", {**GEMMA3_LIKE, "num_key_value_heads": 1, "sliding_window_pattern": 6}),
    "gemma3-all-full": Case("gemma3_text", {**GEMMA3_LIKE, "sliding_window_pattern": 1}),
    "phi": Case("phi", PHI_LIKE),
    "phi-rotary": Case("phi", {**PHI_LIKE, "rope_parameters": PHI_ROPE, "hidden_act": "relu"}),
    "phi-tied": Case("phi", {**PHI_LIKE, "tie_word_embeddings": True}),
    "phi3": Case("phi3", PHI3_LIKE),
    "phi3-mha-window": Case("phi3", {**PHI3_LIKE, "num_key_value_heads": 8, "sliding_window": 8}),
    "phi3-tied-rotary": Case("phi3", {**PHI3_LIKE, "rope_parameters": PHI_ROPE, "tie_word_embeddings": True}),
    "phi3-long": Case("phi3", {**PHI3_LIKE, "original_max_position_embeddings": 16, "rope_parameters": LONG_ROPE}),
    "phi3-long-unused": Case(
        "phi3", {**PHI3_LIKE, "original_max_position_embeddings": 32, "rope_parameters": LONG_ROPE}
    ),
    "phi3-long-factor": Case(
        "phi3",
        {**PHI3_LIKE, "original_max_position_embeddings": 16, "rope_parameters": {**LONG_ROPE, "factor": 4.0}},
    ),
    "phi3-long-partial": Case(
        "phi3",
        {
            **PHI3_LIKE,
            "num_key_value_heads": 1,
            "hidden_size": 128,
            "original_max_position_embeddings": 16,
            "rope_parameters": {**LONG_ROPE, "partial_rotary_factor": 0.5},
        },
    ),
}
LAYOUTS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 3)]


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a case's source: every parameter random, so that no two tensors can be taken for each other."""

    @cache
    def make(name: str) -> Path:
        case = CASES[name]
        generator = torch.Generator().manual_seed(len(name))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(case.model_type, **case.settings)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp("sources") / name
        model.to(torch.bfloat16).save_pretrained(folder)
        return folder

    return make


def options_of(tp: int, pp: int, dtype: Any = "auto") -> CheckpointConfig:
    return CheckpointConfig(tp=tp, pp=pp, dtype=dtype)


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_every_tensor_comes_back(
    name: str, tp: int, pp: int, make_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = hf.open_source(make_model(name))
    architecture = architectures.get(source.architecture)
    if (pp > 1 and not architecture.pipeline) or tp not in valid_tp_sizes(
        architecture.checkpoint_config(source.config)
    ):
        with pytest.raises(InputError, match=r"does not fit this model|no pipeline parallelism"):
            plan_conversion(source, options_of(tp, pp))
        return
    convert(plan_conversion(source, options_of(tp, pp)), source, tmp_path / "checkpoint")
    checkpoint = open_checkpoint(tmp_path / "checkpoint")

    result = verify(source, checkpoint)
    assert result.passed, result
    unused = sum(rows * source_tensors(source)[tensor].shape[1] for tensor, rows in CASES[name].unused.items())
    assert result.elements == sum(int(np.prod(entry.shape)) for entry in source_tensors(source).values()) - unused

    # The same values, by a reader that is not ours.
    plan = plan_checkpoint(checkpoint.config)
    theirs = safetensors.torch.load_file(source.path / "model.safetensors")
    ours = dict(read_tensors(checkpoint))
    assert set(theirs) == set(ours)
    pieces = [place.piece for _, unit in plan.units() for places in unit.values() for place in places]
    added = {piece.source for piece in pieces if piece.plus}
    for tensor, values in ours.items():
        expected = theirs[tensor].float().numpy()[CASES[name].unused.get(tensor, 0) :]
        found = values.astype(np.float32)[CASES[name].unused.get(tensor, 0) :]
        tolerance = (
            {"rtol": 0.02, "atol": 0.02} if tensor in added else {"rtol": 0, "atol": 0}
        )  # bf16(1 + w) - 1 is not w
        np.testing.assert_allclose(found, expected, err_msg=tensor, **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_the_put_together_model_computes_the_same(name: str, make_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = make_model(name)
    source = hf.open_source(folder)
    model = architectures.get(source.architecture)
    tp = max(tp for tp in (1, 2, 4) if tp in valid_tp_sizes(model.checkpoint_config(source.config)))
    convert(plan_conversion(source, options_of(tp, 3 if model.pipeline else 1, "float32")), source, tmp_path / "out")
    ids = torch.arange(2 * 20).reshape(2, 20) % 131
    with torch.inference_mode():
        original = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected = original(ids).logits
        found = load_transformers_model(tmp_path / "out")(ids).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


DECLARED = json.loads((Path(__file__).parents[2] / "data" / "trtllm_parameters.json").read_text())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("key", DECLARED["architectures"])
def test_matches_what_tensorrt_llm_declares(key: str, tp: int) -> None:
    """Names, shapes and dtypes of rank 0 equal what the model classes of TensorRT-LLM 0.17-dev declare (see `about` in
    the file for how that was found; it is not from 1.2.1)."""
    record = DECLARED["architectures"][key]
    name = re.sub("#.*", "", key)
    config = {
        "attn_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_parallel_embedding": architectures.get(name).split_embedding and tp > 1,
        "embedding_sharding_dim": 0,
        **record["config"],
        "architecture": name,
        "mapping": {"tp_size": tp, "pp_size": 1},
    }
    plan = plan_checkpoint(config)
    dtypes = {"F16": "float16", "F32": "float32"}
    ours = {t.name: (list(t.shape), dtypes[t.dtype]) for t in plan.ranks[0] if ".layers.1." not in t.name}
    theirs = {name: (shape, dtype) for name, shape, dtype in record["parameters"][f"tp{tp}"]}
    assert ours == theirs
