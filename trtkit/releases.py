"""Releases: Triton's containers and what is in them.

The table is `releases.yaml`, from the "trtllm" rows of Triton's public compatibility matrix
(triton-inference-server/server, docs/introduction/compatibility.md).
"""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import yaml

from trtkit.errors import InputError

IMAGES = {
    "trtllm": "nvcr.io/nvidia/tritonserver:{tag}-trtllm-python-py3",
    "vllm": "nvcr.io/nvidia/tritonserver:{tag}-vllm-python-py3",
    "plain": "nvcr.io/nvidia/tritonserver:{tag}-py3",
}
"""Kind of container -> its image in NVIDIA's registry. The first two have the backend of their name and python; the
plain one has python and those for ONNX, PyTorch and TensorRT models. Sources: triton-inference-server/server,
docs/customization_guide/compose.md; vllm_backend, README.md."""
KINDS = {"tensorrtllm": "trtllm", "llmapi": "trtllm", "vllm": "vllm", "onnxruntime": "plain", "python": "plain"}
"""Runtime -> the kind of container that has it."""


@dataclass(frozen=True)
class Release:
    """One container and the versions in it.

    Attributes:
        tag: `YY.MM`.
        tensorrt_llm, tensorrt, cuda, python: versions in the container. An engine runs only with the very
            TensorRT-LLM that built it.
        driver: NVIDIA driver that the matrix names; data-centre GPUs also run older branches through CUDA's forward
            compatibility package.
        image: reference of the container image for TensorRT-LLM; `image_of` gives those for other runtimes.
    """

    tag: str
    tensorrt_llm: str
    tensorrt: str
    cuda: str
    driver: str
    python: str
    image: str

    @property
    def has_engine_builder(self) -> bool:
        """Whether it still compiles engines: TensorRT-LLM 1.3 removed trtllm-build and the C++ backend."""
        major, minor = (int(part) for part in re.findall(r"\d+", self.tensorrt_llm)[:2])
        return (major, minor) < (1, 3)

    def image_of(self, runtime: str) -> str:
        """The image that has a runtime, one of `KINDS`."""
        return IMAGES[KINDS[runtime]].format(tag=self.tag)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"has_engine_builder": self.has_engine_builder}


def load() -> tuple[Release, ...]:
    """Every known release, the newest first."""
    return tuple(_table().values())


def get(tag: str) -> Release:
    """The release of a tag such as `26.07`.

    Raises:
        InputError: unknown; the fix names near ones.
    """
    table = _table()
    if tag not in table:
        near = difflib.get_close_matches(tag, table, n=3, cutoff=0.6)
        listed = f"near ones: {', '.join(near)}; " if near else ""
        raise InputError(f"no release '{tag}' in the table", f"{listed}`trtkit releases` lists all")
    return table[tag]


@functools.cache
def _table() -> dict[str, Release]:
    text = resources.files("trtkit").joinpath("releases.yaml").read_text(encoding="utf-8")
    found = {}
    for row in yaml.safe_load(text)["releases"]:
        for tag in row.pop("tags"):
            found[tag] = Release(tag=tag, image=IMAGES["trtllm"].format(tag=tag), **row)
    return dict(sorted(found.items(), reverse=True))
