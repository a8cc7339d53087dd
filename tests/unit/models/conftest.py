"""Trtkit's one-file models as the server would load them, outside of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_triton
import pytest
from google.protobuf.json_format import MessageToDict

from trtkit import pbtxt
from trtkit.contract_tensors import Tensor

LATER = ("Tensor", "InferenceResponse", "TritonError", "MetricFamily", "Logger")


@dataclass
class Loaded:
    """A model, the module it came from, and the fake of the server's interface that it sees."""

    model: Any
    code: ModuleType
    triton: Any
    outputs: list[str] = field(default_factory=list)

    def request(self, **inputs: Any) -> fake_triton.Request:
        return fake_triton.Request(outputs=self.outputs, **inputs)

    def ask(self, *asked: dict[str, Any]) -> list[Any]:
        """The responses to requests of one batch, in order."""
        answers = self.model.execute([self.request(**inputs) for inputs in asked])
        assert len(answers) == len(asked)
        return list(answers)


@pytest.fixture
def config_of() -> Callable[[str], dict[str, Any]]:
    return _config_of


def _config_of(text: str) -> dict[str, Any]:
    """A config.pbtxt as Triton hands it to a model."""
    message = pbtxt.loads(text)
    given: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    given["parameters"] = {key: {"string_value": item.string_value} for key, item in message.parameters.items()}
    given.setdefault("model_transaction_policy", {"decoupled": False})
    for tensor in [*given["input"], *given["output"]]:
        tensor["dims"] = [int(size) for size in tensor["dims"]]
    return given


def declared(config: dict[str, Any]) -> list[Tensor]:
    """The outputs that a config declares, as the model sees them."""
    return [
        Tensor(item["name"], item["data_type"].removeprefix("TYPE_"), tuple(item["dims"]), scalar="reshape" in item)
        for item in config["output"]
    ]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loaded]]:
    """`load(folder, config)` imports the model.py in a version's folder and initializes it."""
    before = set(sys.modules)
    path = list(sys.path)
    finalize: list[Callable[[], None]] = []

    def make(folder: Path, config: dict[str, Any]) -> Loaded:
        outputs = declared(config)
        triton = fake_triton.module(outputs, batch=None if config["max_batch_size"] else 0)
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
        spec = importlib.util.spec_from_file_location("model_under_test", folder / "model.py")
        assert spec is not None
        assert spec.loader is not None
        code = importlib.util.module_from_spec(spec)
        # The server puts these into the module only after it has imported the model.
        later = {name: vars(triton).pop(name) for name in LATER}
        spec.loader.exec_module(code)
        vars(triton).update(later)
        loaded = Loaded(code.TritonPythonModel(), code, triton, [tensor.name for tensor in outputs])
        args = {"model_name": "m", "model_version": "1", "model_repository": str(folder.parent)}
        loaded.model.initialize({"model_config": json.dumps(config), **args})
        finalize.append(getattr(loaded.model, "finalize", lambda: None))
        return loaded

    yield make
    for end in finalize:
        end()
    sys.path[:] = path
    for name in {"function", "llmapi_model", "helpers"} - before:
        sys.modules.pop(name, None)
