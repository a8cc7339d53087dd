"""What is made of each decoder layer on the way to a quantised checkpoint: one safetensors file and some notes.

The tensors are those of a TP 1 checkpoint, whole, with the layer's number in the whole model in their names. A layer
counts as made once its file is there, so a run that was killed goes on with the first that has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtkit.convert.cast import Array
from trtkit.safetensors_io import TensorEntry, TensorSpec, Writer, read_header
from trtkit.store import atomic_write


def layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer}.safetensors"


def write_layer(folder: Path, layer: int, tensors: Mapping[str, Array], notes: Any) -> None:
    """Writes a layer's file, whole or not at all.

    Args:
        notes: goes into a JSON file beside it (see `read_notes`).
    """
    file = layer_file(folder, layer)
    partial = file.with_name(f".{file.name}")
    partial.unlink(missing_ok=True)
    writer = Writer(partial, [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()])
    try:
        for name, array in tensors.items():
            writer.write(name, 0, array)
        writer.sync()
    finally:
        writer.close()
    atomic_write(file.with_suffix(".json"), json.dumps(notes))
    partial.replace(file)


def read_notes(folder: Path, layer: int) -> Any:
    """What was noted beside a layer's file."""
    return json.loads(layer_file(folder, layer).with_suffix(".json").read_text(encoding="utf-8"))


def layer_entries(folder: Path) -> dict[str, TensorEntry]:
    """The tensors of all layers' files, by name."""
    found: dict[str, TensorEntry] = {}
    for file in folder.glob("layer-*.safetensors"):
        found |= read_header(file)
    return found
