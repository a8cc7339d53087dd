"""The model `tensorrt_llm` of the `llmapi` runtime: NVIDIA's own, taken from the container that runs it.

The Triton container for TensorRT-LLM carries the code of its LLM-API model, which changes with every release. So this
file holds none of it: it loads that model.py, which reads the model.yaml beside this file. The folder with it and its
helpers.py stands in container_folder.txt (`serving.llmapi_folder` in the build config).
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

POINTER = Path(__file__).parent / "container_folder.txt"


def _load() -> Any:
    """The TritonPythonModel of NVIDIA's model.py, with its helpers.py in reach."""
    if not POINTER.is_file():
        raise ImportError(f"{POINTER}: the file is missing: generate the repository again")
    folder = Path(POINTER.read_text(encoding="utf-8").strip())
    file = folder / "model.py"
    spec = importlib.util.spec_from_file_location("llmapi_model", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ImportError(
            f"no model.py in {folder}: set serving.llmapi_folder to where this container has the folder "
            "triton_backend/all_models/llmapi/tensorrt_llm/1 of its TensorRT-LLM, and generate the repository again"
        )
    sys.path.insert(0, str(folder))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in it look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ImportError(f"{file} cannot be loaded: {type(error).__name__}: {reason}") from error
    if not hasattr(module, "TritonPythonModel"):
        raise ImportError(f"{file} has no TritonPythonModel: serving.llmapi_folder names another model's folder")
    return module.TritonPythonModel


class Unloadable:
    """In place of a model that cannot be loaded, to say why when the server starts it.

    An error that leaves a module while it is imported would come with every frame of Python's import system.
    """

    reason = ""
    traceback = ""

    def initialize(self, args: dict[str, str]) -> None:
        if self.traceback:
            pb_utils.Logger.log_info(self.traceback)
        raise ImportError(self.reason)


try:
    TritonPythonModel = _load()
except ImportError as error:
    Unloadable.reason = str(error)
    if error.__cause__ is not None:
        # Kept until the server can write it: it has no Logger yet.
        Unloadable.traceback = "".join(traceback.format_exception(error.__cause__))
    TritonPythonModel = Unloadable
