"""Quantised conversion, layer by layer, of every family in every format that it may have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from trtkit import hf
from trtkit.checkpoint import open_checkpoint
from trtkit.convert.conversion import WORK, Options, convert
from trtkit.convert.quantization import Quantization
from trtkit.convert.readback import CheckpointReader, load_transformers_model, read_tensors
from trtkit.convert.source import Layout, plan_conversion
from trtkit.convert.support import Target, supported
from trtkit.convert.verify import check_files
from trtkit.errors import InputError
from trtkit.quantize.calibration import Calibration
from trtkit.quantize.conversion import identity, quantizing
from trtkit.quantize.fit import Effort
from trtkit.quantize.layer_files import layer_file
from trtkit.quantize.pipeline import Quantizer

LIKE_LLAMA = {
    "vocab_size": 131, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
WIDE = {key: value for key, value in LIKE_LLAMA.items() if key not in ("head_dim", "num_key_value_heads")}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LIKE_LLAMA),
    "mistral": ("mistral", LIKE_LLAMA),
    "mixtral": ("mixtral", {**LIKE_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", LIKE_LLAMA),
    "qwen2-moe": ("qwen2_moe", {**LIKE_LLAMA, **EXPERTS, "shared_expert_intermediate_size": 128}),
    "qwen3": ("qwen3", LIKE_LLAMA),
    "qwen3-moe": ("qwen3_moe", {**LIKE_LLAMA, **EXPERTS, "norm_topk_prob": True}),
    "gemma": ("gemma", LIKE_LLAMA),
    "gemma2": ("gemma2", {**LIKE_LLAMA, "sliding_window": 8}),
    "gemma3": ("gemma3_text", {**LIKE_LLAMA, "sliding_window": 8, "sliding_window_pattern": 2}),
    "phi": ("phi", {**WIDE, "num_key_value_heads": 4}),
    "phi3": ("phi3", {**WIDE, "num_key_value_heads": 2, "pad_token_id": 0}),
    "gpt2": ("gpt2", {"vocab_size": 131, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "falcon": ("falcon", {**WIDE, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "opt": ("opt", {**WIDE, "ffn_dim": 256}),
    "bloom": ("bloom", {"vocab_size": 131, "hidden_size": 128, "n_layer": 3, "n_head": 4}),
    "gpt-neox": ("gpt_neox", {**WIDE, "intermediate_size": 512}),
    "starcoder2": ("starcoder2", {**WIDE, "num_key_value_heads": 2}),
}
LIMITS = {"int4_awq": 0.45, "w4a8_awq": 0.45, "int8_sq": 0.2, "int8_sq_plugin": 0.1, "fp8": 0.2, "fp8_rowwise": 0.15,
          "int8_wo": 0.1, "int4_wo": 0.6}  # fmt: skip
"""Largest relative error of the logits (in the 2-norm; 1.4 between unrelated models) of a random model, which is harder
than a trained one."""
GROUP = {"int4_awq": 64}


def runs(name: str, form: str) -> bool:
    """Whether TensorRT-LLM has a format for a family."""
    config = transformers.AutoConfig.for_model(MODELS[name][0])
    model_class: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    asked = Quantization(form, group_size=GROUP.get(form))
    return supported(asked, Target("tensorrtllm", model_class.__name__))


@pytest.fixture(scope="module")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], hf.Source]:
    @cache
    def make(name: str) -> hf.Source:
        model_type, settings = MODELS[name]
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            config = transformers.AutoConfig.for_model(model_type, **settings)
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape))
        folder = tmp_path_factory.mktemp("sources") / name
        model.to(torch.bfloat16).save_pretrained(folder)
        return hf.open_source(folder)

    return make


def calibration(samples: int = 16, length: int = 32) -> Calibration:
    tokens = np.random.default_rng(0).integers(0, 131, (samples, length))
    return Calibration(tokens, "random tokens", "0" * 64)


def quantize(source: hf.Source, out: Path, form: str, tp: int = 1, pp: int = 1, **more: Any) -> None:
    asked = Quantization(form, group_size=GROUP.get(form), **more)
    plan = plan_conversion(source, Layout(tp=tp, pp=pp, quantization=asked))
    seen = calibration()
    weight_only = form in ("int8_wo", "int4_wo")
    write = None if weight_only else quantizing(seen)
    convert(plan, source, out, write=write, options=Options(sync=False, quantization=identity(seen)))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        tokens = torch.from_numpy(calibration(2, 24).tokens)
        return model(input_ids=tokens, use_cache=False).logits.float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / (expected - expected.mean()).norm())


COMBINATIONS = [(name, form) for name in MODELS for form in LIMITS if runs(name, form)]


def test_most_combinations_run() -> None:
    assert len(COMBINATIONS) > 100
    assert {name for name, _ in COMBINATIONS} == set(MODELS)


@pytest.mark.parametrize(("name", "form"), COMBINATIONS)
def test_what_is_read_back_computes_nearly_the_same(
    name: str, form: str, make_source: Callable[[str], hf.Source], tmp_path: Path
) -> None:
    source = make_source(name)
    quantize(source, tmp_path / "out", form)
    assert check_files(open_checkpoint(tmp_path / "out")).passed
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    expected = logits(original.eval())
    found = logits(load_transformers_model(tmp_path / "out"))
    error = relative(found, expected)
    assert 0 < error < LIMITS[form], error


@pytest.mark.parametrize(("name", "form", "tp", "pp"), [
    ("llama", "int4_awq", 2, 1), ("llama", "fp8", 2, 3), ("llama", "int8_sq", 4, 1), ("llama", "int8_sq_plugin", 2, 1),
    ("llama", "fp8_rowwise", 2, 1), ("mixtral", "int4_awq", 2, 1), ("mixtral", "fp8", 2, 1), ("phi3", "int8_sq", 2, 1),
    ("gpt2", "int4_awq", 2, 1), ("bloom", "fp8", 2, 1), ("gpt-neox", "int8_sq", 2, 1), ("qwen2-moe", "fp8", 2, 1),
])  # fmt: skip
def test_splitting_changes_no_value(
    name: str, form: str, tp: int, pp: int, make_source: Callable[[str], hf.Source], tmp_path: Path
) -> None:
    source = make_source(name)
    quantize(source, tmp_path / "one", form)
    quantize(source, tmp_path / "many", form, tp=tp, pp=pp)
    one = dict(read_tensors(open_checkpoint(tmp_path / "one")))
    many = dict(read_tensors(open_checkpoint(tmp_path / "many")))
    assert one.keys() == many.keys()
    for tensor, values in one.items():
        assert np.array_equal(values, many[tensor]), tensor


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantised_cache_gets_a_scale_per_layer(
    kind: str, make_source: Callable[[str], hf.Source], tmp_path: Path
) -> None:
    quantize(make_source("llama"), tmp_path / "out", "fp8", tp=2, kv_cache=kind)
    checkpoint = open_checkpoint(tmp_path / "out")
    names = [name for name in checkpoint.ranks[1] if name.endswith("kv_cache_scaling_factor")]
    assert names == [f"transformer.layers.{layer}.attention.kv_cache_scaling_factor" for layer in range(3)]
    assert checkpoint.config["quantization"]["kv_cache_quant_algo"] == kind.upper()
    assert all(checkpoint.ranks[1][name].shape == (1,) for name in names)


@pytest.mark.parametrize("name", [name for name in MODELS if runs(name, "fp8")])
def test_the_scale_of_a_cache_comes_from_its_keys_and_values(
    name: str, make_source: Callable[[str], hf.Source], tmp_path: Path
) -> None:
    """By transformers' own cache, filled by the unquantised model."""
    source = make_source(name)
    quantize(source, tmp_path / "out", "fp8", kv_cache="int8")
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    with torch.inference_mode():
        cache = original.eval()(torch.from_numpy(calibration().tokens), use_cache=True).past_key_values
    with CheckpointReader(open_checkpoint(tmp_path / "out")) as reader:
        for layer in range(3):
            largest = max(float(each.abs().max()) for each in (cache.layers[layer].keys, cache.layers[layer].values))
            # A sliding window's cache keeps its last tokens only.
            found = (reader.cache_scale(layer) or 0) * 127
            assert found == pytest.approx(largest, rel=1e-3) or ("window" in str(MODELS[name]) and found > largest)


class KilledError(BaseException):
    """Stands for a signal: no `except Exception` sees it."""


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("dies_in", [0, 1, 2])
def test_a_killed_run_goes_on_with_the_layer_it_was_at(
    dies_in: int,
    correct: bool,
    make_source: Callable[[str], hf.Source],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, seen, effort = make_source("llama"), calibration(), Effort(correct=correct)
    asked = Quantization("int4_awq", group_size=64)
    plan = plan_conversion(source, Layout(quantization=asked))
    options = Options(sync=False, quantization=identity(seen, effort))
    convert(plan, source, tmp_path / "whole", write=quantizing(seen, effort=effort), options=options)

    began: list[int] = []
    run = Quantizer._layer

    def dying(self: Quantizer, layer: int) -> None:
        began.append(layer)
        if layer == dies_in and len(began) == dies_in + 1:
            raise KilledError
        run(self, layer)

    monkeypatch.setattr(Quantizer, "_layer", dying)
    with pytest.raises(KilledError):
        convert(plan, source, tmp_path / "out", write=quantizing(seen, effort=effort), options=options)
    partial = next(tmp_path.glob(".out.partial-*"))
    kept = {layer: layer_file(partial / WORK, layer).stat().st_mtime_ns for layer in range(dies_in)}
    assert len(kept) == dies_in
    assert not (tmp_path / "out").exists()
    convert(plan, source, tmp_path / "out", write=quantizing(seen, effort=effort), options=options)
    assert began[dies_in + 1 :] == list(range(dies_in, 3))
    for file in ("rank0.safetensors", "config.json", "accuracy.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "accuracy.json", "config.json", "conversion.json", "rank0.safetensors"
    ]  # fmt: skip
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("correct", [True, False])
def test_lost_hidden_states_are_computed_anew(
    correct: bool, make_source: Callable[[str], hf.Source], tmp_path: Path
) -> None:
    """After a loss of power only what was synced is sure to be there: the layers' files."""
    source, seen = make_source("llama"), calibration()
    plan = plan_conversion(source, Layout(quantization=Quantization("int4_awq", group_size=64)))
    effort = Effort(correct=correct)
    Quantizer(plan.config, source, seen.tokens, tmp_path / "whole", effort=effort).run()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    layer_file(tmp_path / "part", 2).unlink()
    Quantizer(plan.config, source, seen.tokens, tmp_path / "part", effort=effort).run()
    assert layer_file(tmp_path / "part", 2).read_bytes() == layer_file(tmp_path / "whole", 2).read_bytes()


def test_nan_in_activations_names_the_layer(make_source: Callable[[str], hf.Source], tmp_path: Path) -> None:
    source = make_source("llama")
    folder = tmp_path / "source"
    shutil.copytree(source.path, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"layer 1: calibration gives NaN"):
        quantize(hf.open_source(folder), tmp_path / "out", "int4_awq")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "falcon", "bloom", "phi3", "gemma2"])
def test_thorough_is_near_too_and_leaves_the_module_as_it_was(
    name: str, make_source: Callable[[str], hf.Source], tmp_path: Path
) -> None:
    source, seen, effort = make_source(name), calibration(), Effort(correct=True)
    plan = plan_conversion(source, Layout(quantization=Quantization("int4_awq", group_size=64)))
    options = Options(sync=False, quantization=identity(seen, effort))
    convert(plan, source, tmp_path / "out", write=quantizing(seen, effort=effort), options=options)
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    assert relative(logits(load_transformers_model(tmp_path / "out")), logits(original.eval())) < LIMITS["int4_awq"]


def test_quality_is_noted_for_every_linear(make_source: Callable[[str], hf.Source], tmp_path: Path) -> None:
    quantize(make_source("llama"), tmp_path / "out", "int4_awq")
    noted = json.loads((tmp_path / "out" / "accuracy.json").read_text())["linears"]
    assert len(noted) == 3 * 5
    assert all(each["format"] == "int4_awq" and 10 < each["snr"] < 60 for each in noted)
