"""Predicted damage, against what the damage is once a model is quantised."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

from trtkit import hf  # noqa: E402
from trtkit.convert.conversion import Options, convert  # noqa: E402
from trtkit.convert.quantization import Quantization, get  # noqa: E402
from trtkit.convert.readback import load_transformers_model  # noqa: E402
from trtkit.convert.source import Layout, plan_conversion  # noqa: E402
from trtkit.errors import InputError  # noqa: E402
from trtkit.evaluate.models import load_source  # noqa: E402
from trtkit.evaluate.scores import score  # noqa: E402
from trtkit.quantize.calibration import Calibration  # noqa: E402
from trtkit.quantize.conversion import quantizing  # noqa: E402
from trtkit.quantize.sensitivity import Damage, blocks, damages  # noqa: E402
from trtkit.quantize.trial import ALONE  # noqa: E402

VOCABULARY = 97
GQA = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**GQA, "attention_bias": True, "mlp_bias": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "phi3": GQA,
    "gemma2": {**GQA, "head_dim": 16, "sliding_window": 16},
}
"""Linears of their own, transposed, with heads one after the other, fused, and with norms behind them."""


def drawn(samples: int, length: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (samples, length))


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], hf.Source]:
    """A random model whose linears matter: what they add is as large as what comes in."""

    @cache
    def make(model_type: str) -> hf.Source:
        config = transformers.AutoConfig.for_model(model_type, **FAMILIES[model_type])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        folder = tmp_path_factory.mktemp("sources") / model_type
        model.to(torch.bfloat16).save_pretrained(folder)
        return hf.open_source(folder)

    return make


def measured(source: hf.Source, quantization: Quantization, tokens: Any, held_out: Any, out: Path) -> float:
    """KL divergence of the checkpoint that is made so."""
    plan = plan_conversion(source, Layout(quantization=quantization))
    calibration = Calibration(tokens, "random", "0" * 64)
    convert(plan, source, out, options=Options(sync=False), write=quantizing(calibration, effort=ALONE))
    return score(load_transformers_model(out), held_out, load_source(source.path)).mean_kl


def predicted(
    source: hf.Source, tokens: Any, held_out: Any, folder: Path, *formats: str, **options: Any
) -> dict[str, dict[str, Damage]]:
    config = plan_conversion(source, Layout()).config
    candidates = {block.name: [get(name) for name in formats] for block in blocks(config)}
    folder.mkdir(exist_ok=True)
    found = damages(source, config, tokens, held_out, candidates, folder, **options)
    assert not list(folder.iterdir())  # what lay on disk is gone
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("form", ["fp8", "int8_sq"])
def test_the_predictions_of_all_linears_add_up_to_the_damage(
    make_model: Callable[[str], hf.Source], tmp_path: Path, model_type: str, form: str
) -> None:
    source = make_model(model_type)
    tokens, held_out = drawn(8, 32, 1), drawn(48, 32, 2)
    found = predicted(source, tokens, held_out, tmp_path / "work", form)
    total = sum(each[form].kl for each in found.values())
    true = measured(source, Quantization(form), tokens, held_out, tmp_path / "out")
    assert all(each[form].kl > 0 and 0 < each[form].error < 0.1 for each in found.values())
    assert total == pytest.approx(true, rel=0.35)


def test_each_linear_has_its_own(make_model: Callable[[str], hf.Source], tmp_path: Path) -> None:
    """The prediction names the linears that matter, over orders of magnitude."""
    source = make_model("llama")
    tokens, held_out = drawn(8, 32, 1), drawn(48, 32, 2)
    found = predicted(source, tokens, held_out, tmp_path / "work", "fp8")
    config = plan_conversion(source, Layout()).config
    every = [linear.name for block in blocks(config) for linear in block.linears]
    for number, block in enumerate(blocks(config)):
        own = [linear.name for linear in block.linears]
        only = Quantization("fp8", exclude=tuple(name for name in every if name not in own))
        true = measured(source, only, tokens, held_out, tmp_path / f"out{number}")
        assert found[block.name]["fp8"].kl == pytest.approx(true, rel=0.35), block.name


def test_what_is_drawn_hardly_matters(make_model: Callable[[str], hf.Source], tmp_path: Path) -> None:
    source = make_model("llama")
    tokens, held_out = drawn(4, 32, 1), drawn(48, 32, 2)
    one, same, other = (
        predicted(source, tokens, held_out, tmp_path / "work", "fp8", seed=seed) for seed in (0, 0, 1)
    )  # fmt: skip
    assert one == same
    assert one != other
    for name, each in one.items():
        assert each["fp8"].kl == pytest.approx(other[name]["fp8"].kl, rel=0.3)
        assert each["fp8"].error == pytest.approx(other[name]["fp8"].error)


def test_texts_of_different_lengths(make_model: Callable[[str], hf.Source], tmp_path: Path) -> None:
    source = make_model("llama")
    long, short = drawn(4, 48, 1), drawn(6, 20, 2)
    found = predicted(source, long, short, tmp_path / "work", "fp8")
    assert found == predicted(source, long[:, :20], short, tmp_path / "work", "fp8")


def test_linears_that_a_kernel_fuses_are_one_block(make_model: Callable[[str], hf.Source]) -> None:
    config = plan_conversion(make_model("llama"), Layout()).config
    found = blocks(config)
    assert [block.name.removeprefix("transformer.layers.") for block in found] == [
        f"{layer}.{kind}"
        for layer in range(2)
        for kind in ("attention.qkv", "attention.dense", "mlp.fc+gate", "mlp.proj")
    ]  # fmt: skip
    assert found[2].weights == 2 * 64 * 96
    assert found[4].layer == 1


def test_progress_covers_all_passes(make_model: Callable[[str], hf.Source], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    predicted(
        make_model("llama"), drawn(2, 8, 1), drawn(2, 8, 2), tmp_path / "work", "fp8",
        on_layer=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(done, 6) for done in range(7)]


def test_activations_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("llama", **GQA)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "source")
    source = hf.open_source(tmp_path / "source")
    with pytest.raises(InputError, match="NaN"):
        predicted(source, drawn(2, 8, 1), drawn(2, 8, 2), tmp_path / "work", "fp8")
