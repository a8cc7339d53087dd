"""Mixed precision from end to end: what is written, how it is read back, and that it computes what was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import MakeSource
from trtkit import hf
from trtkit.checkpoint import config_files, is_checkpoint, open_checkpoint, read_checkpoint_config, read_manifest
from trtkit.convert.conversion import Options, convert
from trtkit.convert.linears import linears
from trtkit.convert.plan import Plan, checkpoint_quantization
from trtkit.convert.quantization import Quantization
from trtkit.convert.source import Layout, plan_conversion
from trtkit.convert.verify import check_files
from trtkit.errors import InputError

torch = pytest.importorskip("torch")

from trtkit.convert.readback import load_transformers_model  # noqa: E402
from trtkit.quantize.calibration import Calibration  # noqa: E402
from trtkit.quantize.conversion import quantizing  # noqa: E402
from trtkit.quantize.fit import Effort  # noqa: E402

LAYERS = 2
SHAPE = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": LAYERS,
}  # fmt: skip
ALONE = Effort(correct=False)
"""No linear sees what became of the others, so linears of uniform checkpoints can be put together."""

MODULES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
"""TRT-LLM's name of a linear -> the modules of transformers' Llama."""


def name(layer: int, kind: str) -> str:
    return f"transformer.layers.{layer}.{kind}"


def tokens(samples: int = 12, length: int = 32) -> Any:
    return np.random.default_rng(3).integers(0, 131, (samples, length))


def write(source: hf.Source, quantization: Quantization, out: Path, tp: int = 1) -> Path:
    plan = plan_conversion(source, Layout(tp=tp, quantization=quantization))
    calibration = Calibration(tokens(), "random", "0" * 64)
    convert(plan, source, out, options=Options(sync=False), write=quantizing(calibration, effort=ALONE))
    return out


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=torch.from_numpy(tokens(4)), use_cache=False).logits


def by_hand(plain: Any, uniform: Mapping[str, Any], formats: Mapping[str, str]) -> Any:
    """The plain model with modules of uniformly quantised ones in the places that `formats` names."""
    for place, form in formats.items():
        layer, kind = place.split(".", 3)[2:]
        for module in MODULES[kind]:
            path = f"model.layers.{layer}.{module}"
            plain.set_submodule(path, uniform[form].get_submodule(path))
    return plain


AWQ_AND_FP8 = Quantization(
    "int4_awq",
    group_size=64,
    overrides={name(1, "mlp.proj"): "fp8", name(1, "attention.qkv"): "fp8", name(1, "attention.dense"): "fp8"},
    exclude=(name(0, "attention.*"),),
)
SMOOTHED = Quantization(
    "int8_sq", overrides={name(0, "mlp.fc"): "int8_wo", name(0, "mlp.gate"): "int8_wo"}, exclude=("*.mlp.proj",)
)
CACHED = Quantization(
    "fp8", group_size=64, overrides={name(0, "mlp.proj"): "int4_awq"}, exclude=("*.1.attention.*",), kv_cache="fp8"
)
UNIFORM = Quantization("int4_awq", group_size=64, exclude=(name(0, "mlp.*"), "*.attention.dense"))


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "asked", [AWQ_AND_FP8, SMOOTHED, CACHED, UNIFORM], ids=["awq and fp8", "int8", "with cache", "only excluded"]
)
def test_a_mixture_computes_what_its_parts_do(make_source: MakeSource, tmp_path: Path, asked: Any, tp: int) -> None:
    source = hf.open_source(make_source(**SHAPE))
    mixed = load_transformers_model(write(source, asked, tmp_path / "mixed", tp))
    uniform = {
        form: load_transformers_model(
            write(source, Quantization(form, group_size=64 if form == "int4_awq" else None), tmp_path / form)
        )
        for form in asked.formats
    }
    write(source, Quantization(), tmp_path / "plain")
    formats = {
        name(layer, kind): form.name
        for layer in range(LAYERS)
        for kind in MODULES
        if (form := asked.format_of(name(layer, kind))) is not None
    }
    assert 0 < len(formats) < LAYERS * len(MODULES)  # something is left out
    plain = load_transformers_model(tmp_path / "plain")
    exact = logits(plain)
    expected = logits(by_hand(plain, uniform, formats))
    assert (expected - exact).abs().max() > 1e-3
    torch.testing.assert_close(logits(mixed), expected, rtol=0, atol=1e-6)


def test_the_files_of_a_mixture(make_source: MakeSource, tmp_path: Path) -> None:
    source = hf.open_source(make_source(**SHAPE))
    out = write(source, AWQ_AND_FP8, tmp_path / "mixed", 2)
    assert sorted(file.name for file in out.iterdir() if file.suffix == ".json" and file.name != "accuracy.json") == [
        "config.json", "conversion.json", "quant_cfg.json",
    ]  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}
    layers = json.loads((out / "quant_cfg.json").read_text())
    assert set(layers) == {"quant_algo", "kv_cache_quant_algo", "quantized_layers"}
    fine = {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": True}
    assert layers["quantized_layers"] == {
        **{name(layer, kind): fine for layer in range(LAYERS) for kind in ("mlp.fc", "mlp.gate")},
        name(0, "mlp.proj"): fine,
        **{name(1, kind): {"quant_algo": "FP8"} for kind in ("attention.qkv", "attention.dense", "mlp.proj")},
    }
    manifest = read_manifest(out)
    assert manifest is not None
    assert set(manifest["files"]) == {"config.json", "quant_cfg.json", "rank0.safetensors", "rank1.safetensors"}
    checked = check_files(open_checkpoint(out))
    assert (checked.files, checked.checksums) == ({}, 4)
    (out / "quant_cfg.json").write_text(json.dumps(layers))
    assert set(check_files(open_checkpoint(out)).files) == {"quant_cfg.json"}


def test_a_mixture_is_read_back_as_it_was_asked_for(make_source: MakeSource, tmp_path: Path) -> None:
    plan = planned(make_source)
    folder = written(plan, tmp_path)
    read = read_checkpoint_config(folder)
    assert read == plan.config
    found = checkpoint_quantization(read)
    for linear in linears(plan.config):
        assert found.format_of(linear.name) == AWQ_AND_FP8.format_of(linear.name)


def test_a_mixture_may_be_replaced(make_source: MakeSource, tmp_path: Path) -> None:
    folder = written(planned(make_source), tmp_path)
    assert is_checkpoint(folder)


def test_the_table_beside_config_json_decides(make_source: MakeSource, tmp_path: Path) -> None:
    folder = written(planned(make_source), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"]["quantized_layers"] = {name(0, "mlp.fc"): {"quant_algo": "FP8"}}
    (folder / "config.json").write_text(json.dumps(config))
    layers = json.loads((folder / "quant_cfg.json").read_text())
    (folder / "quant_cfg.json").write_text(json.dumps(layers | {"kv_cache_quant_algo": "FP8"}))
    found = checkpoint_quantization(read_checkpoint_config(folder))
    assert found.kv_cache == "fp8"
    assert found.format_of(name(0, "attention.qkv")) is None
    assert found.format_of(name(1, "attention.qkv")).name == "fp8"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "quantized_layers"),
        ("[]", "not a JSON object"),
        ("{}", "quantized_layers"),
        ('{"quantized_layers": []}', "quantized_layers"),
        ('{"quantized_layers": {}}', "quantized_layers"),
        ('{"quantized_layers": {"a": 1}}', "quantized_layers"),
    ],
)
def test_a_damaged_table_is_refused(make_source: MakeSource, tmp_path: Path, content: str | None, words: str) -> None:
    folder = written(planned(make_source), tmp_path)
    (folder / "quant_cfg.json").unlink()
    if content is not None:
        (folder / "quant_cfg.json").write_text(content)
    with pytest.raises(InputError, match=words):
        checkpoint_quantization(read_checkpoint_config(folder))


def test_a_uniform_checkpoint_ignores_a_table(make_source: MakeSource, tmp_path: Path) -> None:
    source = hf.open_source(make_source(**SHAPE))
    plan = plan_conversion(source, Layout(quantization=Quantization("fp8")))
    folder = written(plan, tmp_path)
    assert not (folder / "quant_cfg.json").exists()
    (folder / "quant_cfg.json").write_text('{"quantized_layers": {}}')
    assert read_checkpoint_config(folder) == plan.config


def planned(make_source: MakeSource) -> Plan:
    return plan_conversion(hf.open_source(make_source(**SHAPE)), Layout(quantization=AWQ_AND_FP8))


def written(plan: Plan, parent: Path) -> Path:
    """A folder with the configs of a plan's checkpoint."""
    folder = parent / "checkpoint"
    folder.mkdir()
    for file, content in config_files(plan.config).items():
        (folder / file).write_text(json.dumps(content))
    return folder
