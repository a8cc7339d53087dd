"""ModelOpt-style Hugging Face checkpoints: written, read back by the importer, and run."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from trtkit import hf
from trtkit.convert import conversion
from trtkit.convert.dequantize import built_codes, dequantize, input_rounding
from trtkit.convert.linears import linears
from trtkit.convert.number_formats import Float8Weight, IntegerWeight, unpack_int4
from trtkit.convert.plan import Plan
from trtkit.convert.quantization import FORMATS, Quantization
from trtkit.convert.readback import load_transformers_model, unfilled_model
from trtkit.convert.simulate import round_inputs
from trtkit.convert.source import Layout, plan_conversion, source_tensors
from trtkit.convert.whole import gather, scatter, whole_tensors
from trtkit.errors import InputError
from trtkit.quantize import imports
from trtkit.quantize.calibration import Calibration
from trtkit.quantize.huggingface import check_target, export, is_export, write_huggingface
from trtkit.quantize.huggingface_layout import HuggingFaceLayout, quantization_files
from trtkit.quantize.importing import import_plan, importing
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

    places = itertools.count()

    def make(
        architecture: str,
        form: str,
        dtype: str = "float32",
        group: int | None = None,
        kv_cache: str | None = None,
        overrides: tuple[tuple[str, str], ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> Made:
        return made(architecture, form, dtype, group, kv_cache, overrides, exclude)

    @functools.cache
    def made(
        architecture: str,
        form: str,
        dtype: str,
        group: int | None,
        kv_cache: str | None,
        overrides: tuple[tuple[str, str], ...],
        exclude: tuple[str, ...],
    ) -> Made:
        source = source_of(architecture, dtype)
        asked = Quantization(
            form, group_size=group, kv_cache=kv_cache, overrides=dict(overrides), exclude=exclude,  # type: ignore[arg-type]
        )  # fmt: skip
        plan = plan_conversion(source, Layout(dtype=dtype, quantization=asked))
        place = root / str(next(places))
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
    ("Phi3ForCausalLM", "int4_awq", "float32", 64, None),
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
                scales = parts["per_channel_scale" if form == "fp8_rowwise" else "weights_scaling_factor"]
                columns = scales[..., None] if scales.size > 1 else scales
                values = parts["weight"].astype(np.float32) * columns
            for name, part in scatter(whole[f"{own}weight"], values, shapes):
                module = name.removesuffix(".weight")
                found[module] = found[module] + part if module in found else part
    return found


@pytest.mark.parametrize(
    ("architecture", "form", "dtype", "group", "kv_cache"),
    [case for case in CASES if case[0] != "MixtralForCausalLM"],  # whose experts round their inputs within one module
)
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
    """The model of a Hugging Face checkpoint, its modules where transformers has them by their names."""
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
    """Puts tensors into a model: one for every parameter."""
    places = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in state.items():
            places[name].copy_(values)
    assert len(state) == len(places)


@pytest.mark.parametrize(
    ("architecture", "form", "dtype", "kv_cache", "changed"),
    [
        ("LlamaForCausalLM", "fp8", "bfloat16", "fp8", ()),
        ("LlamaForCausalLM", "int4_awq", "float16", "fp8", ("layernorm.weight", "prequant_scaling_factor")),
        ("LlamaForCausalLM", "w4a8_awq", "float16", None, ("layernorm.weight", "prequant_scaling_factor")),
    ],
)
def test_it_converts_to_the_checkpoint_that_was_made_beside_it(
    architecture: str, form: str, dtype: str, kv_cache: str | None, changed: tuple[str, ...], make: Make, tmp_path: Path
) -> None:
    """Of AWQ the factors have moved into norms."""
    made = make(architecture, form, dtype, None, kv_cache)
    source = hf.open_source(made.folder)
    found = import_plan(source, Layout())
    conversion.convert(
        found.plan, source, tmp_path / "out", write=importing(found), options=conversion.Options(sync=False)
    )
    expected, imported = (read_header(folder / "rank0.safetensors") for folder in (made.checkpoint, tmp_path / "out"))
    assert expected.keys() == imported.keys()
    with Reader() as reader:
        other = {
            name
            for name in expected
            if reader.tensor(expected[name]).tobytes() != reader.tensor(imported[name]).tobytes()
        }
    assert all(name.endswith(changed) for name in other)
    assert bool(other) == bool(changed)


def test_files(make: Make) -> None:
    made = make("LlamaForCausalLM", "int4_awq", "float16", None, "fp8")
    assert {file.name for file in made.folder.iterdir()} == {
        "config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors", "tokenizer_config.json",
    }  # fmt: skip
    quantization = {
        "quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": "FP8", "group_size": 128, "has_zero_point": False,
        "pre_quant_scale": True, "exclude_modules": ["lm_head"],
    }  # fmt: skip
    described = json.loads((made.folder / "hf_quant_config.json").read_text())
    assert described["quantization"] == quantization
    config = json.loads((made.folder / "config.json").read_text())
    inline = config.pop("quantization_config")
    assert config == json.loads((made.source.path / "config.json").read_text())
    assert inline == {
        "quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "ignore": ["lm_head"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}, "producer": described["producer"],
    }  # fmt: skip


def test_tensors_have_the_names_shapes_and_dtypes_of_the_format(make: Make) -> None:
    found = entries(make("LlamaForCausalLM", "int4_awq", "float16", None, "fp8").folder)
    attention = {
        name.removeprefix("model.layers.1."): (entry.dtype.name, entry.shape)
        for name, entry in found.items()
        if name.startswith("model.layers.1.")
    }
    half, full = "uint8", "float32"
    assert attention == {
        "input_layernorm.weight": ("float16", (128,)),
        "post_attention_layernorm.weight": ("float16", (128,)),
        "self_attn.q_proj.weight": (half, (64, 128)), "self_attn.q_proj.weight_scale": (full, (128, 1)),
        "self_attn.k_proj.weight": (half, (32, 128)), "self_attn.k_proj.weight_scale": (full, (64, 1)),
        "self_attn.v_proj.weight": (half, (32, 128)), "self_attn.v_proj.weight_scale": (full, (64, 1)),
        "self_attn.o_proj.weight": (half, (64, 128)), "self_attn.o_proj.weight_scale": (full, (128, 1)),
        "self_attn.o_proj.pre_quant_scale": ("float16", (128,)),
        "self_attn.k_proj.k_scale": (full, ()), "self_attn.v_proj.v_scale": (full, ()),
        "mlp.gate_proj.weight": (half, (128, 128)), "mlp.gate_proj.weight_scale": (full, (256, 1)),
        "mlp.up_proj.weight": (half, (128, 128)), "mlp.up_proj.weight_scale": (full, (256, 1)),
        "mlp.down_proj.weight": (half, (64, 256)), "mlp.down_proj.weight_scale": (full, (128, 2)),
        "mlp.down_proj.pre_quant_scale": ("float16", (256,)),
    }  # fmt: skip
    assert {name for name in found if ".layers." not in name} == {
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "norm", "linear", "plus"),
    [
        ("LlamaForCausalLM", "input_layernorm", "attention.qkv", 0),
        ("LlamaForCausalLM", "post_attention_layernorm", "mlp.fc", 0),
        ("Gemma2ForCausalLM", "input_layernorm", "attention.qkv", 1),
        ("Gemma2ForCausalLM", "pre_feedforward_layernorm", "mlp.gate", 1),
        ("Starcoder2ForCausalLM", "input_layernorm", "attention.qkv", 0),
    ],
)
def test_norms_take_the_factors(architecture: str, norm: str, linear: str, plus: int, make: Make) -> None:
    made = make(architecture, "int4_awq")
    stored = entries(made.folder)
    with Reader() as reader:
        factors = reader.tensor(made.layers[f"transformer.layers.1.{linear}.prequant_scaling_factor"])
        assert np.unique(factors).size > 10
        for part in ("weight", "bias"):
            name = f"model.layers.1.{norm}.{part}"
            if name in made.source.tensors:
                before, after = reader.tensor(made.source.tensors[name]), reader.tensor(stored[name])
                np.testing.assert_allclose(after + plus, (before + plus) * factors, rtol=1e-6)


def test_norms_that_feed_no_quantised_linear_stay(make: Make) -> None:
    made = make("Gemma2ForCausalLM", "int4_awq")
    stored = entries(made.folder)
    with Reader() as reader:
        for name in ("model.layers.0.post_attention_layernorm.weight", "model.norm.weight"):
            before, after = reader.tensor(made.source.tensors[name]), reader.tensor(stored[name])
            assert before.tobytes() == after.tobytes()


@pytest.mark.parametrize(
    ("architecture", "module", "linear"),
    [
        ("LlamaForCausalLM", "self_attn.o_proj", "attention.dense"),
        ("LlamaForCausalLM", "mlp.down_proj", "mlp.proj"),
        ("LlamaForCausalLM", "self_attn.q_proj", None),
        ("LlamaForCausalLM", "mlp.up_proj", None),
        ("Starcoder2ForCausalLM", "mlp.c_fc", "mlp.fc"),
        ("Starcoder2ForCausalLM", "mlp.c_proj", "mlp.proj"),
        ("Phi3ForCausalLM", "self_attn.qkv_proj", "ones"),
        ("Phi3ForCausalLM", "mlp.gate_up_proj", "ones"),
        ("Phi3ForCausalLM", "mlp.down_proj", "mlp.proj"),
    ],
)
def test_modules_that_no_norm_serves_have_their_own_factors(
    architecture: str, module: str, linear: str | None, make: Make
) -> None:
    made = (
        make(architecture, "int4_awq", "float32", 64, "fp8")
        if "Phi3" in architecture
        else make(architecture, "int4_awq")
    )
    stored = entries(made.folder)
    name = f"model.layers.0.{module}.pre_quant_scale"
    if linear is None:
        assert name not in stored
        return
    with Reader() as reader:
        vector = reader.tensor(stored[name])
        if linear == "ones":
            assert (vector == 1).all()
        else:
            expected = reader.tensor(made.layers[f"transformer.layers.0.{linear}.prequant_scaling_factor"])
            assert vector.tobytes() == expected.tobytes()


def test_weights_of_four_bits_without_groups_are_those_of_an_engine(make: Make) -> None:
    made = make("LlamaForCausalLM", "int4_wo")
    stored = entries(made.folder)
    name = "model.layers.1.mlp.down_proj"
    with Reader() as reader:
        codes = unpack_int4(reader.tensor(stored[f"{name}.weight"])).astype(np.float32)
        values = codes * reader.tensor(stored[f"{name}.weight_scale"])[:, None]
    model = load_transformers_model(made.checkpoint)
    assert np.array_equal(values, model.get_submodule(name).weight.detach().numpy())


MIXED = (
    ("transformer.layers.0.mlp.proj", "fp8"), ("transformer.layers.1.attention.qkv", "fp8"),
    ("transformer.layers.1.mlp.fc", "w4a8_awq"), ("transformer.layers.1.mlp.gate", "w4a8_awq"),
)  # fmt: skip


def test_mixed_precision_names_every_module(make: Make) -> None:
    made = make("LlamaForCausalLM", "int4_awq", overrides=MIXED, exclude=("*layers.0.attention.dense",))
    described = json.loads((made.folder / "hf_quant_config.json").read_text())["quantization"]
    assert described["quant_algo"] == "MIXED_PRECISION"
    assert described["exclude_modules"] == ["lm_head", "model.layers.0.self_attn.o_proj"]
    layers = described["quantized_layers"]
    assert json.loads((made.folder / "quant_cfg.json").read_text()) == {
        "quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers,
    }  # fmt: skip
    four = {"quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False, "pre_quant_scale": True}
    assert layers["model.layers.0.self_attn.v_proj"] == four
    assert layers["model.layers.0.mlp.down_proj"] == {"quant_algo": "FP8"}
    assert layers["model.layers.1.self_attn.k_proj"] == {"quant_algo": "FP8"}
    assert layers["model.layers.1.mlp.up_proj"] == four | {"quant_algo": "W4A8_AWQ"}
    assert len(layers) == 13
    scheme = imports.detect(json.loads((made.folder / "config.json").read_text()), made.folder)
    assert scheme is not None
    assert {module for module, _ in read_weights(made.folder)} == layers.keys()


def test_excluded_modules_are_named_as_in_the_source(make: Make) -> None:
    made = make("LlamaForCausalLM", "fp8", exclude=("*layers.1.attention.qkv", "*mlp.proj"))
    layout = HuggingFaceLayout(made.plan.config)
    assert layout.excluded == [
        "lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
    ]  # fmt: skip
    assert quantization_files(layout)["quantization_config"]["ignore"] == layout.excluded
    stored, source = entries(made.folder), made.source.tensors
    assert stored["model.layers.1.self_attn.q_proj.weight"].dtype == source["lm_head.weight"].dtype


def test_routers_are_excluded(make: Make) -> None:
    layout = HuggingFaceLayout(make("MixtralForCausalLM", "fp8").plan.config)
    assert layout.excluded == ["lm_head", *(f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(2))]


def test_shards_hold_the_same(make: Make, tmp_path: Path) -> None:
    made = make("LlamaForCausalLM", "int4_awq")
    seen: list[tuple[int, int]] = []
    write_huggingface(
        made.plan.config,
        made.source,
        made.layers,
        tmp_path,
        shard_bytes=100_000,
        on_progress=lambda *now: seen.append(now),
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored, expected = entries(tmp_path), entries(made.folder)
    assert {name: entry.path.name for name, entry in stored.items()} == index["weight_map"]
    assert (
        index["metadata"]["total_size"]
        == sum(entry.nbytes for entry in expected.values())
        == seen[-1][0]
        == seen[-1][1]
    )
    assert len({entry.path for entry in stored.values()}) > 3
    assert "model-00001-of-" in min(index["weight_map"].values())
    with Reader() as reader:
        for name, entry in expected.items():
            assert reader.tensor(stored[name]).tobytes() == reader.tensor(entry).tobytes(), name


def test_plain_tensors_are_cast(make: Make, tmp_path: Path) -> None:
    made = make("LlamaForCausalLM", "fp8")
    config = {**made.plan.config, "dtype": "bfloat16"}
    written = write_huggingface(config, made.source, made.layers, tmp_path)
    assert {entry.dtype.name for name, entry in entries(tmp_path).items() if "norm" in name} == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert written.report.rounded > 1000


REFUSED = [
    ("LlamaForCausalLM", {"format": "int8_sq"}, "int8_sq"),
    ("LlamaForCausalLM", {"format": "fp8", "kv_cache": "int8"}, "INT8 KV cache"),
    ("LlamaForCausalLM", {"kv_cache": "fp8"}, "only the KV cache"),
    ("LlamaForCausalLM", {"format": "int4_awq", "zero_point": True}, "zero points"),
    ("LlamaForCausalLM", {"format": "fp8_rowwise", "clamp": (-1.0, 1.0)}, "clamped"),
    ("LlamaForCausalLM", {"format": "int4_awq", "exclude": ("*mlp.gate",)}, "different formats"),
    ("Qwen2ForCausalLM", {"format": "int8_wo"}, "'model.layers.0.self_attn.q_proj' has a bias"),
    ("PhiForCausalLM", {"format": "int4_awq"}, "the same norm 'model.layers.0.input_layernorm.weight'"),
    ("GPT2LMHeadModel", {"format": "fp8"}, "inputs first"),
    ("MixtralForCausalLM", {"format": "int4_awq"}, "for experts"),
]


@pytest.mark.parametrize(("architecture", "asked", "cause"), REFUSED)
def test_what_the_runtime_lacks_is_refused(
    architecture: str, asked: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    source = make_source(tmp_path / "source", architecture, "bfloat16")
    plan = plan_conversion(source, Layout(quantization=Quantization(**asked)))
    with pytest.raises(InputError, match=re.escape(cause)):
        HuggingFaceLayout(plan.config)


def test_a_norm_that_two_linears_share_takes_no_different_factors(make: Make, tmp_path: Path) -> None:
    made = make("LlamaForCausalLM", "int4_awq")
    other = made.layers["transformer.layers.0.attention.qkv.prequant_scaling_factor"]
    layers = made.layers | {"transformer.layers.0.mlp.gate.prequant_scaling_factor": other}
    with pytest.raises(
        InputError, match=r"'transformer.layers.0.mlp.fc' and 'transformer.layers.0.mlp.gate' have diff"
    ):
        write_huggingface(made.plan.config, made.source, layers, tmp_path)


class TestExport:
    """From source to published folder."""

    def plan(self, folder: Path, form: str = "int4_awq") -> tuple[hf.Source, Plan]:
        source = make_source(folder / "source", "LlamaForCausalLM", "bfloat16")
        return source, plan_conversion(source, Layout(quantization=Quantization(form)))

    def test_goes_on_with_the_layer_it_was_at(self, tmp_path: Path) -> None:
        source, plan = self.plan(tmp_path)
        out, whole = tmp_path / "out", tmp_path / "whole"
        exported = export(plan, source, whole, calibration=CALIBRATION)
        assert len(exported.quality) == 10

        def stop(done: int, total: int) -> None:
            if done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export(plan, source, out, calibration=CALIBRATION, on_layer=stop)
        assert not out.exists()
        (partial,) = tmp_path.glob(".out.partial-*")
        first = layer_file(partial / conversion.WORK, 0).stat()
        seen: list[int] = []
        inodes: list[int] = []

        def note(done: int, total: int) -> None:
            seen.append(done)
            inodes.append(layer_file(partial / conversion.WORK, 0).stat().st_ino)

        export(plan, source, out, calibration=CALIBRATION, on_layer=note)
        assert seen[0] == 1
        assert set(inodes) == {first.st_ino}
        assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}
        for file in out.iterdir():
            assert file.read_bytes() == (whole / file.name).read_bytes(), file.name

    def test_replaces_its_own_only(self, tmp_path: Path) -> None:
        source, plan = self.plan(tmp_path, "int8_wo")
        out = tmp_path / "out"
        written = export(plan, source, out).written
        assert is_export(out)
        manifest = json.loads((out / "conversion.json").read_text())
        assert manifest["files"] == written.files
        assert manifest["files"]["model.safetensors"]["bytes"] == (out / "model.safetensors").stat().st_size
        with pytest.raises(InputError, match="exists already"):
            export(plan, source, out)
        export(plan, source, out, replace=True)
        (out / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match="not an earlier checkpoint"):
            export(plan, source, out, replace=True)
        assert (out / "notes.txt").exists()
        with pytest.raises(InputError, match="overwrite its own source"):
            check_target(source.path / "inside", source)

    def test_calibration_is_asked_for_before_anything_is_written(self, tmp_path: Path) -> None:
        source, plan = self.plan(tmp_path)
        with pytest.raises(InputError, match="needs calibration text"):
            export(plan, source, tmp_path / "out")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["source"]
