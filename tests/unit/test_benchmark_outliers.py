"""The outlier variant that benchmarks/quantize.py compares on: another model of the same function."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 120, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 128,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "multi-head": {"num_key_value_heads": 6},
    "grouped": {"num_key_value_heads": 2},
    "one kv head": {"num_key_value_heads": 1, "head_dim": 16},
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
}


@pytest.fixture(scope="module")
def outliers() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(BENCHMARKS))
    import outliers

    yield outliers
    sys.path.remove(str(BENCHMARKS))
    torch.set_num_threads(threads)


def _save(folder: Path, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """A random model whose norms and biases are not the trivial ones."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.ndim == 1))
    model.to(dtype).save_pretrained(folder)
    return folder


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def _logits_and_inputs(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits on fixed tokens, and the largest magnitude of each input channel of each linear."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    largest: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(
                lambda _, arguments, name=name: largest.update({name: arguments[0].abs().amax((0, 1))})
            )
    with torch.inference_mode():
        return model(torch.arange(60).reshape(2, 30), use_cache=False).logits, largest


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays_and_the_activations_do_not(outliers: ModuleType, tmp_path: Path, name: str) -> None:
    source = _save(tmp_path / "source", **CASES[name])
    outliers.write_outlier_variant(source, tmp_path / "out", seed=3)
    before, inputs_before = _logits_and_inputs(source)
    after, inputs_after = _logits_and_inputs(tmp_path / "out")
    assert (before - after).abs().max() <= 1e-4 * before.abs().max()
    for linear, channels in inputs_before.items():
        factors = inputs_after[linear] / channels
        changed = (factors - 1).abs() > 0.5
        assert 0 < changed.sum() < len(factors) / 5, linear
        assert factors[changed].min() > 15, linear


def test_the_same_residual_channels_in_every_layer(outliers: ModuleType, tmp_path: Path) -> None:
    source = _save(tmp_path / "source", **CASES["grouped"])
    outliers.write_outlier_variant(source, tmp_path / "out")
    before, after = _tensors(source), _tensors(tmp_path / "out")
    factors = [after[n].float() / before[n].float() for n in before if "layernorm" in n]
    assert len(factors) == 4
    assert all(torch.equal(factor, factors[0]) for factor in factors)
    assert set(factors[0].tolist()) <= {1.0, *outliers.FACTORS}
    assert (factors[0] > 1).sum() == max(1, round(0.03 * 48))


def test_weights_change_by_powers_of_two_alone(outliers: ModuleType, tmp_path: Path) -> None:
    source = _save(tmp_path / "source", **CASES["biases"])
    outliers.write_outlier_variant(source, tmp_path / "out", seed=5)
    before, after = _tensors(source), _tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        mantissas = [torch.frexp(t.float())[0] for t in (tensor, after[name])]
        assert torch.equal(*mantissas), name
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 10


def test_other_files_are_copied_and_the_seed_decides(outliers: ModuleType, tmp_path: Path) -> None:
    source = _save(tmp_path / "source", **CASES["grouped"])
    (source / "tokenizer.json").write_text("{}")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        outliers.write_outlier_variant(source, tmp_path / name, seed=seed)
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_dtype_that_would_round_is_refused(outliers: ModuleType, tmp_path: Path) -> None:
    source = _save(tmp_path / "source", dtype=torch.float16, num_key_value_heads=2)
    tensors = _tensors(source)
    tensors["model.layers.0.self_attn.q_proj.weight"][:] = 3 * 2.0**-24  # float16 has no smaller odd multiple
    safetensors.torch.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="q_proj"):
        outliers.write_outlier_variant(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused(outliers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="gpt2"):
        outliers.write_outlier_variant(tmp_path, tmp_path / "out")
