"""ModelOpt-style Hugging Face checkpoints: written, read back by the importer, and run."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from trtkit import hf
from trtkit.convert import conversion
from trtkit.convert.dequantize import built_codes, dequantize, input_rounding
from trtkit.convert.layerwise import LayerwiseModel
from trtkit.convert.linears import linears
from trtkit.convert.number_formats import Float8Weight, IntegerWeight, unpack_int4
from trtkit.convert.plan import Plan
from trtkit.convert.quantization import FORMATS, Quantization
from trtkit.convert.readback import load_transformers_model, unfilled_model
from trtkit.convert.simulate import round_inputs
from trtkit.convert.source import Layout, plan_conversion
from trtkit.errors import InputError
from trtkit.quantize import imports
from trtkit.quantize.calibration import Calibration
from trtkit.quantize.huggingface import check_target, export, is_export, write_huggingface
from trtkit.quantize.huggingface_layout import HuggingFaceLayout, quantization_files
from trtkit.quantize.layer_files import layer_entries, layer_file
from trtkit.quantize.pipeline import Quantizer
from trtkit.safetensors_io import Reader, TensorEntry, read_header

TOKENS = np.random.default_rng(0).integers(0, 131, (8, 16))
CALIBRATION = Calibration(TOKENS, "random", "0" * 64)
COMMON = {
    "vocab_size": 131, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Phi3ForCausalLM": {},
    "Gemma2ForCausalLM": {
        "head_dim": 32, "tie_word_embeddings": True, "query_pre_attn_scalar": 32, "sliding_window": 32,
    },
    "Starcoder2ForCausalLM": {"use_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "PhiForCausalLM": {"num_key_value_heads": 4, "hidden_act": "gelu_new"},
    "GPT2LMHeadModel": {},
}  # fmt: skip


def make_source(folder: Path, architecture: str, dtype: str) -> hf.Source:
    model_class = getattr(transformers, architecture)
    settings = COMMON | MODELS[architecture]
    if architecture == "GPT2LMHeadModel":
        settings = {"vocab_size": 131, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = model_class(model_class.config_class(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + (parameter.ndim == 1 and "Gemma" not in architecture))
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):  # a few loud channels give AWQ something to scale
                parameter[::17] *= 8
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return hf.open_source(folder)


@dataclass(frozen=True)
class Made:
    """A source quantised once, as both kinds of checkpoint."""

    source: hf.Source
    plan: Plan
    layers: dict[str, TensorEntry]
    checkpoint: Path
    folder: Path


Make = Callable[..., Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("huggingface")

    @functools.cache
    def source_of(architecture: str, dtype: str) -> hf.Source:
        return make_source(root / f"{architecture}-{dtype}", architecture, dtype)

    @functools.cache
    def make(
        architecture: str,
        form: str,
        dtype: str = "float32",
        group: int | None = None,
        kv_cache: str | None = None,
        overrides: tuple[tuple[str, str], ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> Made:
        source = source_of(architecture, dtype)
        asked = Quantization(
            form, group_size=group, kv_cache=kv_cache, overrides=dict(overrides), exclude=exclude,  # type: ignore[arg-type]
        )  # fmt: skip
        plan = plan_conversion(source, Layout(dtype=dtype, quantization=asked))
        place = root / f"{architecture}-{form}-{dtype}-{group}-{kv_cache}-{len(overrides)}-{len(exclude)}"
        layers: dict[str, TensorEntry] = {}
        if not FORMATS[form].weight_only:
            Quantizer(plan.config, source, TOKENS, place / "layers").run()
            layers = layer_entries(place / "layers")
        write = functools.partial(conversion.write_here, made=layers)
        conversion.convert(plan, source, place / "checkpoint", write=write, options=conversion.Options(sync=False))
        (place / "folder").mkdir()
        write_huggingface(plan.config, source, layers, place / "folder", options=conversion.Options(sync=False))
        return Made(source, plan, layers, place / "checkpoint", place / "folder")

    return make


def entries(folder: Path) -> dict[str, TensorEntry]:
    found: dict[str, TensorEntry] = {}
    for file in folder.glob("*.safetensors"):
        found |= read_header(file)
    return found


def read_weights(folder: Path) -> Iterator[tuple[str, IntegerWeight | Float8Weight]]:
    """What the importer makes of every quantised module."""
    scheme = imports.detect(json.loads((folder / "config.json").read_text()), folder)
    assert scheme is not None
    found = entries(folder)
    modules = [name.removesuffix(".weight_scale") for name in found if name.endswith(".weight_scale")]
    assert not imports.leftovers(scheme, found, modules)
    with Reader() as reader:
        for module in modules:
            weight = imports.read(module, scheme, found, reader)
            assert weight is not None
            yield module, weight


CASES = [
    ("LlamaForCausalLM", "int4_awq", "bfloat16", 64, None),
    ("LlamaForCausalLM", "int4_awq", "float32", 128, None),
    ("LlamaForCausalLM", "int4_awq", "float16", None, "fp8"),
    ("LlamaForCausalLM", "w4a8_awq", "float32", None, "fp8"),
    ("LlamaForCausalLM", "fp8", "bfloat16", None, "fp8"),
    ("LlamaForCausalLM", "fp8", "float32", None, None),
    ("LlamaForCausalLM", "fp8_rowwise", "float32", None, None),
    ("LlamaForCausalLM", "int8_wo", "float32", None, None),
    ("Qwen2ForCausalLM", "int4_awq", "float32", None, None),
    ("Phi3ForCausalLM", "int4_awq", "float32", 64, "fp8"),
    ("Phi3ForCausalLM", "fp8", "float32", None, None),
    ("Gemma2ForCausalLM", "int4_awq", "float32", None, None),
    ("Gemma2ForCausalLM", "w4a8_awq", "float32", None, None),
    ("Starcoder2ForCausalLM", "int4_awq", "float32", None, None),
    ("MixtralForCausalLM", "fp8", "float32", None, None),
]


@pytest.mark.parametrize(("architecture", "form", "dtype", "group", "kv_cache"), CASES)
def test_values_are_those_of_the_layers(
    architecture: str, form: str, dtype: str, group: int | None, kv_cache: str | None, make: Make
) -> None:
    """Codes and scales, module by module, against the same rows of what quantisation made: bit for bit."""
    made = make(architecture, form, dtype, group, kv_cache)
    expected = expected_values(made, form)
    seen = set()
    for module, weight in read_weights(made.folder):
        values = weight.dequantize()
        assert values.tobytes() == np.ascontiguousarray(expected[module]).tobytes(), module
        seen.add(module)
    assert seen == expected.keys()


def expected_values(made: Made, form: str) -> dict[str, Any]:
    """Module -> code * scale of what lies in the layers' files, put in place by `scatter` of the conversion's plan."""
    from trtkit.convert.whole import gather, scatter, whole_tensors
    from trtkit.convert.source import source_tensors

    whole, shapes = whole_tensors(made.plan.config)
    tensors = source_tensors(made.source)
    found: dict[str, Any] = {}
    with Reader() as reader:
        for linear in linears(made.plan.config):
            own = f"{linear.name}."
            parts = {
                name.removeprefix(own): reader.tensor(entry)
                for name, entry in made.layers.items()
                if name.startswith(own)
            }
            if FORMATS[form].weight_only:
                plain = gather(whole[f"{own}weight"], lambda name: reader.tensor(tensors[name]))
                codes, scales = built_codes(FORMATS[form], plain)
                values = codes.astype(np.int8).astype(np.float32) * scales
            elif FORMATS[form].bits == 4:
                scales = parts["weights_scaling_factor"]
                codes = unpack_int4(parts["weight"]).astype(np.float32)
                values = codes * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)
            else:
                scales = parts.get("weights_scaling_factor", parts.get("per_channel_scale"))
                assert scales is not None
                columns = scales[..., None] if scales.size > 1 else scales
                values = parts["weight"].astype(np.float32) * columns
            for name, part in scatter(whole[f"{own}weight"], values, shapes):
                module = name.removesuffix(".weight")
                found[module] = found[module] + part if module in found else part
    return found


@pytest.mark.parametrize(("architecture", "form", "dtype", "group", "kv_cache"), CASES)
def test_the_model_computes_what_the_trtllm_checkpoint_does(
    architecture: str, form: str, dtype: str, group: int | None, kv_cache: str | None, make: Make
) -> None:
    made = make(architecture, form, dtype, group, kv_cache)
    ours = load(made.folder, made.plan.config)
    theirs = load_transformers_model(made.checkpoint)
    tokens = torch.from_numpy(TOKENS[:4])
    with torch.inference_mode():
        found, expected = (model(input_ids=tokens, use_cache=False).logits for model in (ours, theirs))
    # Norms that took factors are rounded to the model's dtype once more.
    largest = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}[dtype]
    if FORMATS[form].inputs != "16 bits":  # an input that is rounded the other way moves by a step of float8
        largest = max(largest, 2e-2)
    assert float((found - expected).abs().max()) <= largest * float(expected.abs().max())
    assert float(expected.std()) > 0.05  # or anything would pass


def load(folder: Path, config: Mapping[str, Any]) -> Any:
    """The model of a Hugging Face checkpoint: formulas of the formats written out, names and places transformers' own."""
    from trtkit.convert.layerwise import LayerwiseModel  # noqa: F401

    model = unfilled_model(config)
    scheme_weights = dict(read_weights(folder))
    found = entries(folder)
    state: dict[str, torch.Tensor] = {}
    roundings: dict[str, Any] = {}
    with Reader() as reader:
        plain = {
            name: reader.tensor(entry)
            for name, entry in found.items()
            if not name.endswith(("_scale", "_scale_2")) and name.removesuffix(".weight") not in scheme_weights
        }
        raw = {name: reader.tensor(entry) for name, entry in found.items() if name not in plain}
    for name, values in plain.items():
        state[name] = torch.from_numpy(values.astype(np.float32))
    for module, weight in scheme_weights.items():
        tensors = {
            "weights_scaling_factor": raw[f"{module}.weight_scale"].reshape(-1)
            if weight_is_tensorwise(weight)
            else raw[f"{module}.weight_scale"],
        }
        form = form_of(weight, f"{module}.weight_scale_2" in raw)
        if form.name == "fp8_rowwise":
            tensors["per_channel_scale"] = tensors.pop("weights_scaling_factor")
        stored = raw[f"{module}.weight"]
        tensors["weight"] = stored.view(np.int8) if stored.dtype == np.uint8 else stored
        if f"{module}.weight_scale_2" in raw:
            tensors["weights_scaling_factor_2"] = raw[f"{module}.weight_scale_2"].reshape(1)
        if f"{module}.input_scale" in raw:
            tensors["activation_scaling_factor"] = raw[f"{module}.input_scale"].reshape(1)
        if f"{module}.pre_quant_scale" in raw:
            tensors["prequant_scaling_factor"] = raw[f"{module}.pre_quant_scale"]
        if form.weight_only:
            values = weight.dequantize()
        else:
            values = dequantize(form, tensors, np.dtype(np.float32))
        state[f"{module}.weight"] = torch.from_numpy(values)
        if not form.weight_only and (rounding := input_rounding(form, tensors)) is not None:
            roundings[module] = rounding
    fill(model, state)
    for name, part in model.named_modules():
        if name in roundings:
            round_inputs(part, roundings[name])
    return model.eval()


def weight_is_tensorwise(weight: IntegerWeight | Float8Weight) -> bool:
    return isinstance(weight, Float8Weight) and weight.scales.size == 1


def form_of(weight: IntegerWeight | Float8Weight, second: bool) -> Any:
    if isinstance(weight, Float8Weight):
        return FORMATS["fp8" if weight.scales.size == 1 else "fp8_rowwise"]
    if weight.bits == 8:
        return FORMATS["int8_wo"]
    return FORMATS["w4a8_awq" if second else "int4_awq"]


def fill(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Puts tensors into a model; Mixtral's experts go into one tensor."""
    places = dict(model.named_parameters())
    stacked = [name for name in places if ".experts." in name]
    with torch.no_grad():
        for name in stacked:
            prefix = name.rsplit(".experts.", 1)[0].replace(".mlp", ".block_sparse_moe")
            for expert in range(len(places[name])):
                names = ("w1", "w3") if "gate_up" in name else ("w2",)
                parts = [state.pop(f"{prefix}.experts.{expert}.{which}.weight") for which in names]
                places[name][expert] = torch.cat(parts)
        for name, values in state.items():
            name = name.replace(".block_sparse_moe.gate.", ".mlp.gate.")
            places[name].copy_(values)
    assert len(state) + len(stacked) == len(places)
