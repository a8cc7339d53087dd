"""The loader of NVIDIA's LLM-API model: it finds that model's code, or says in one line why there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtkit.repository.models.llmapi import __file__ as package

MODEL = Path(package).parent / "model.py"
CONFIG = {"max_batch_size": 0, "input": [], "output": [], "parameters": {}}

# A stand-in for NVIDIA's model.py, with what the real one has: a sibling, dataclasses, auto-completion.
CONTAINERS = """
from __future__ import annotations
from dataclasses import dataclass
from helpers import answer

@dataclass
class Request:
    name: str

class TritonPythonModel:
    @classmethod
    def auto_complete_config(cls, config):
        return config

    def initialize(self, args):
        self.name = args["model_name"]

    def execute(self, requests):
        return [answer(Request(self.name)) for _ in requests]
"""


@pytest.fixture
def llmapi(tmp_path: Path, load: Callable[..., Any]) -> Callable[..., Any]:
    """`llmapi(code)`: the loader, with this code as the container's model.py; None for none."""

    def make(code: str | None, *, pointer: bool = True) -> Any:
        version, container = tmp_path / "tensorrt_llm/1", tmp_path / "container"
        for folder in (version, container):
            folder.mkdir(parents=True)
        (version / "model.py").write_bytes(MODEL.read_bytes())
        if pointer:
            (version / "container_folder.txt").write_text(f"{container}\n")
        if code is not None:
            (container / "model.py").write_text(code)
            (container / "helpers.py").write_text("def answer(request):\n    return request\n")
        return load(version, CONFIG)

    return make


def test_the_containers_model_is_the_model(llmapi: Any) -> None:
    loaded = llmapi(CONTAINERS)
    (answer,) = loaded.model.execute([None])
    assert (type(answer).__name__, answer.name) == ("Request", "m")
    assert loaded.code.TritonPythonModel.auto_complete_config("config") == "config"


UNLOADABLE: dict[str, str | None] = {
    "no model.py in {container}: set serving.llmapi_folder": None,
    "{container}/model.py cannot be loaded: ModuleNotFoundError: No module named 'tensorrt_lm'": "import tensorrt_lm\n",
    "{container}/model.py cannot be loaded: OSError: libcuda is missing": "raise OSError('libcuda\\nis missing')\n",
    "{container}/model.py cannot be loaded: SyntaxError": "def\n",
    "{container}/model.py has no TritonPythonModel": "x = 1\n",
}


@pytest.mark.parametrize("cause", UNLOADABLE)
def test_code_that_cannot_be_loaded_is_one_clear_line_at_the_start(llmapi: Any, tmp_path: Path, cause: str) -> None:
    with pytest.raises(ImportError) as error:
        llmapi(UNLOADABLE[cause])
    assert str(error.value).startswith(cause.format(container=tmp_path / "container"))
    assert "\n" not in str(error.value)
    # One frame of this file is all that the server's log shows: the error is raised when the model is initialized.
    assert [entry.name for entry in error.traceback if entry.path.name == "model.py"] == ["initialize"]


def test_a_repository_without_the_pointer_is_named(llmapi: Any) -> None:
    with pytest.raises(ImportError, match=r"container_folder\.txt: the file is missing: generate the repository again"):
        llmapi(CONTAINERS, pointer=False)
