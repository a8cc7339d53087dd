"""The model `tensorrt_llm` of the `llmapi` runtime: NVIDIA's own, taken from the container that runs it.

The Triton container for TensorRT-LLM carries the code of its LLM-API model, which changes with every release. So this
file holds none of it: it loads that model.py, which reads the model.yaml beside this file. The folder with it and its
helpers.py stands in container_folder.txt (`serving.llmapi_folder` in the build config).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def _load() -> ModuleType:
    """The module of NVIDIA's model.py, with its helpers.py in reach."""
    folder = Path((Path(__file__).parent / "container_folder.txt").read_text(encoding="utf-8").strip())
    spec = importlib.util.spec_from_file_location("llmapi_model", folder / "model.py")
    if spec is None or spec.loader is None or not (folder / "model.py").is_file():
        raise ImportError(
            f"no model.py in {folder}: set serving.llmapi_folder to where this container has the folder "
            "triton_backend/all_models/llmapi/tensorrt_llm/1 of its TensorRT-LLM, and generate the repository again"
        )
    sys.path.insert(0, str(folder))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in it look themselves up there
    spec.loader.exec_module(module)
    return module


TritonPythonModel = _load().TritonPythonModel
