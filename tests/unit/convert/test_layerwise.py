"""One decoder layer at a time gives the same as all of them, for every family."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trtkit import hf
from trtkit.convert.layerwise import LayerwiseModel, batches
from trtkit.convert.source import Layout, plan_conversion
from trtkit.convert.whole import SourceReader

sys.path.insert(0, str(Path(__file__).parent))
families = importlib.import_module("test_families")
make_model = families.make_model


@pytest.mark.parametrize("name", families.CASES)
def test_layer_by_layer_gives_the_same_logits(name: str, make_model: Callable[[str], Path]) -> None:
    folder = make_model(name)
    source = hf.open_source(folder)
    config = plan_conversion(source, Layout(dtype="float32")).config
    tokens = torch.arange(2 * 20).reshape(2, 20) % 131
    with SourceReader(source, config) as weights, torch.inference_mode():
        model = LayerwiseModel(config, weights.tensors)
        hidden = model.embed(tokens)
        model.release()
        for layer in range(model.layers):
            model.load(layer)
            hidden = model.run(layer, hidden)
            model.unload(layer)
        found = model.logits(hidden)
        original: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = original.eval()(tokens).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_unloaded_layers_hold_nothing(make_model: Callable[[str], Path]) -> None:
    source = hf.open_source(make_model("llama"))
    config = plan_conversion(source, Layout()).config
    with SourceReader(source, config) as weights, torch.inference_mode():
        model = LayerwiseModel(config, weights.tensors)
        model.load(0)
        assert sum(parameter.numel() for parameter in model.module(0).parameters()) > 1000
        model.unload(0)
        assert sum(parameter.numel() for parameter in model.module(0).parameters()) == 0


@pytest.mark.parametrize(("count", "size"), [(1, 1), (7, 3), (8, 4), (2, 5)])
def test_batches_cover_everything_once(count: int, size: int) -> None:
    found = [index for where in batches(count, size) for index in range(where.start, where.stop)]
    assert found == list(range(count))
