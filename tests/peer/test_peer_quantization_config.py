"""The `quantization` dict of config.json against the one that NVIDIA's exporter makes."""

from __future__ import annotations

import pytest

from trtkit.convert.quantization import FORMATS, Quantization, layers_config, quantization_config, read_quantization

MODULES = [
    f"transformer.layers.{layer}.{kind}"
    for layer in range(3)
    for kind in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
]


@pytest.mark.peer
@pytest.mark.parametrize("name", ["int8_wo", "int4_awq", "w4a8_awq", "int8_sq", "fp8"])
def test_config_equals_that_of_model_optimizer(name: str) -> None:
    export = pytest.importorskip("modelopt.torch.export.quant_utils")
    theirs: dict[str, object] = {f"{module}.quantization": name for module in MODULES}
    theirs["lm_head.quantization"] = None
    theirs |= {f"{module}.awq_block_size": 128 for module in MODULES if FORMATS[name].group_sizes}
    expected = export.process_layer_quant_config(theirs)
    assert expected.pop("exclude_modules") == ["lm_head"]
    assert quantization_config(Quantization(name)) == expected
    assert read_quantization({**expected, "exclude_modules": ["lm_head"]}) == Quantization(name)


@pytest.mark.peer
def test_layers_equal_those_of_model_optimizer() -> None:
    export = pytest.importorskip("modelopt.torch.export.quant_utils")
    q = Quantization("int4_awq", overrides={MODULES[4]: "fp8", MODULES[9]: "int8_sq"})
    formats = {module: form.name for module in MODULES if (form := q.format_of(module))}
    theirs: dict[str, object] = {f"{module}.quantization": name for module, name in formats.items()}
    theirs |= {f"{module}.awq_block_size": 128 for module in MODULES}
    assert layers_config(q, MODULES) == export.process_layer_quant_config(theirs)
