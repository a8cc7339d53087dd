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
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
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
    if (pp > 1 and not architecture.pipeline) or tp not in valid_tp_sizes(architecture.checkpoint_config(source.config)):
        with pytest.raises(InputError, match="does not fit this model|no pipeline parallelism"):
            plan_conversion(source, options_of(tp, pp))
        return
    convert(plan_conversion(source, options_of(tp, pp)), source, tmp_path / "checkpoint")
    checkpoint = open_checkpoint(tmp_path / "checkpoint")

    result = verify(source, checkpoint)
    assert result.passed, result
    unused = sum(
        rows * source_tensors(source)[tensor].shape[1] for tensor, rows in CASES[name].unused.items()
    )
    assert result.elements == sum(int(np.prod(entry.shape)) for entry in source_tensors(source).values()) - unused

    # The same values, by a reader that is not ours.
    plan = plan_checkpoint(checkpoint.config)
    theirs = safetensors.torch.load_file(source.path / "model.safetensors")
    ours = dict(read_tensors(checkpoint, plan))
    assert set(theirs) == set(ours)
    for tensor, values in ours.items():
        expected = theirs[tensor].float().numpy()[CASES[name].unused.get(tensor, 0) :]
        found = values.astype(np.float32)[CASES[name].unused.get(tensor, 0) :]
        added = any(place.piece.plus for _, unit in plan.units([0]) for place in unit.get(tensor, []))
        tolerance = {"rtol": 0.02, "atol": 0.02} if added else {"rtol": 0, "atol": 0}  # bf16(1 + w) - 1 is not w
        np.testing.assert_allclose(found, expected, err_msg=tensor, **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_the_put_together_model_computes_the_same(
    name: str, make_model: Callable[[str], Path], tmp_path: Path
) -> None:
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
    config = {
        "attn_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        **record["config"],
        "architecture": re.sub("#.*", "", key),
        "mapping": {"tp_size": tp, "pp_size": 1},
    }
    plan = plan_checkpoint(config)
    dtypes = {"F16": "float16", "F32": "float32"}
    ours = {t.name: (list(t.shape), dtypes[t.dtype]) for t in plan.ranks[0] if ".layers.1." not in t.name}
    theirs = {name: (shape, dtype) for name, shape, dtype in record["parameters"][f"tp{tp}"]}
    assert ours == theirs
