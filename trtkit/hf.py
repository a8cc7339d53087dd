"""A source: a Hugging Face checkpoint, opened by its headers. Nothing in it is loaded whole, nothing is executed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit import remote
from trtkit.errors import InputError
from trtkit.hf_config import LAYER_COUNTS, normalize_config, read_config
from trtkit.hub import FILES, NOT_FILES, download
from trtkit.safetensors_io import TensorEntry, header_bytes, read_header
from trtkit.untrusted import is_name, printable, read_json, unreadable

__all__ = ["Source", "eos_token_ids", "is_hub_id", "normalize_config", "open_source", "read_config"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """An opened Hugging Face checkpoint.

    Attributes:
        path: its folder.
        config: config.json in one spelling (see `normalize_config`).
        tensors: every tensor of every shard, by name.
        origin: where it is from: `hub:owner/name@commit` or `file:/absolute/path`.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    origin: str = ""

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    def identity(self) -> dict[str, Any]:
        """What tells this source from another, without reading its weights.

        A commit of the hub and a listing of a bucket are the same everywhere, so a source from there is known by them
        and the files' names and sizes. Of a local folder only the file system knows whether a file is still the one it
        was: two fine-tunes of a model can agree in names, sizes, times and even headers, but not in device, inode and
        ctime.

        Raises:
            InputError: a file is gone or unreadable.
        """
        files = sorted({entry.path for entry in self.tensors.values()})
        named = not self.origin.startswith("file:")
        seen: list[Any] = []
        try:
            config = (self.path / "config.json").read_bytes()
            for file in files:
                stat = file.stat()
                seen.append([file.name, stat.st_size])
                if not named:
                    header = hashlib.sha256(header_bytes(file)[0]).hexdigest()
                    seen[-1] += [stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, header]
        except OSError as error:
            raise unreadable(Path(error.filename or self.path), error) from error
        return {
            **({"origin": self.origin} if named else {}),
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "files_sha256": hashlib.sha256(json.dumps(seen).encode()).hexdigest(),
        }


def open_source(
    source: str | Path, *, revision: str | None = None, on_progress: Callable[[int, int], None] | None = None
) -> Source:
    """Opens a local folder, a hub id or a folder in object storage.

    Args:
        source: folder with config.json and safetensors files, a hub id such as `owner/name`, or
            `s3://bucket/prefix` or `gs://bucket/prefix`.
        revision: commit, tag or branch of a hub id.
        on_progress: bytes (done, total) of a download from object storage.

    Raises:
        InputError: not a usable checkpoint; names the file and tensor.
        LacksError: a hub id that cannot be downloaded and is not in the cache; object storage that cannot be read.
    """
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except OSError as error:
        raise unreadable(Path(printable(source)), error) from error
    except RuntimeError as error:
        raise InputError(f"source '{source}': there is no such user", "give a folder or a hub id") from error
    if exists and revision is not None:
        raise InputError(f"source '{source}' is a local folder, which has no revision '{revision}'", "leave one out")
    if exists:
        origin = f"file:{path.absolute()}"
    elif remote.is_remote(source):
        path, origin = _snapshot(str(source), revision, on_progress)
    elif is_hub_id(str(source)):
        path = download(str(source), revision)
        origin = f"hub:{source}@{path.name}"
    else:
        raise InputError(f"source '{printable(source)}' does not exist", "give a folder or a hub id such as owner/name")
    if not path.is_dir():
        raise InputError(f"source '{source}' is not a folder", "give the folder that holds config.json")
    try:
        config, tensors = read_config(path), _open_tensors(path)
    except OSError as error:  # a folder that may not be searched, a file that vanishes
        raise unreadable(Path(error.filename or path), error) from error
    _check_layer_count(path, config, tensors)
    return Source(path, config, tensors, origin)


def _snapshot(source: str, revision: str | None, on_progress: Callable[[int, int], None] | None) -> tuple[Path, str]:
    """Folder and origin of an `s3://` or `gs://` source."""
    url = remote.parse(source).url
    if revision is not None:
        raise InputError(f"source '{url}' is in object storage, which has no revision '{revision}'", "leave one out")
    path = remote.snapshot(source, patterns=FILES, ignored=NOT_FILES, on_progress=on_progress)
    return path, f"{url}@{path.name}"


def is_hub_id(source: str) -> bool:
    """Whether a source that is not a local folder has the form of a hub id (`name` or `owner/name`)."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source) is not None


def eos_token_ids(path: Path) -> list[int]:
    """All end-of-sequence ids: generation_config.json's list where there is one, else config.json's.

    Raises:
        InputError: a file is malformed, or the ids are no integers.
    """
    for name in ("generation_config.json", "config.json"):
        file = path / name
        value = read_json(file).get("eos_token_id") if file.is_file() else None
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(item) is int and item >= 0 for item in values):
            raise InputError(
                f"{file}: eos_token_id is {printable(repr(value))}, expected token ids", "correct the file"
            )
        if values:
            return values
    return []


def _open_tensors(path: Path) -> dict[str, TensorEntry]:
    # In transformers' order, so that what is converted is what it would load. A broken link counts as being there.
    if os.path.lexists(path / _SINGLE):
        return read_header(path / _SINGLE)
    if os.path.lexists(path / _INDEX):
        return _open_shards(path, path / _INDEX)
    raise _no_weights(path)


def _no_weights(path: Path) -> InputError:
    names = sorted(file.name for file in path.iterdir() if file.name != "training_args.bin")
    pickled = [printable(name) for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        return InputError(
            f"{path} holds pickled weights ({pickled[0]}), which can run any code when they are loaded",
            'if you trust them, rewrite them once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}').save_pretrained('{path}-safetensors')\"",
        )
    cause = f"{path} holds neither {_SINGLE} nor {_INDEX}"
    if "adapter_model.safetensors" in names:
        fix = "merge it into its base model (merge_and_unload of the package peft) and save that"
        return InputError(f"{cause}, only an adapter (adapter_model.safetensors)", fix)
    other = [printable(name) for name in names if name.endswith((".gguf", ".h5", ".msgpack", ".onnx", ".safetensors"))]
    if other:
        return InputError(f"{cause}, only weights in another layout ({other[0]})", "use the Hugging Face checkpoint")
    return InputError(cause, "is the download complete?")


def _open_shards(path: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = _weight_map(index)
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if not os.path.lexists(path / shard):
            tensor = next(name for name, file in weight_map.items() if file == shard)
            raise InputError(
                f"{path / shard} is missing (the index expects tensor '{tensor}' in it)", "finish the download"
            )
        for name, entry in read_header(path / shard).items():
            place = weight_map.get(name, shard)
            if name in tensors or place != shard:
                elsewhere = tensors[name].path.name if name in tensors else place
                raise InputError(
                    f"{path / shard}: tensor '{name}' is in {elsewhere} too, or should be, by the index",
                    "shards and index are not of one download: download them all again",
                )
            tensors[name] = entry
    for name, shard in weight_map.items():
        if name not in tensors:
            raise InputError(
                f"{path / shard}: tensor '{name}' is missing, though the index names it", "download the shard again"
            )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard, every one of them a file name in this folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: key 'weight_map' is missing or not a mapping of names", "download the index again")
    if not weight_map:
        raise InputError(f"{index}: 'weight_map' names no tensor", "download the index again")
    for name, shard in weight_map.items():
        if not is_name(name):
            raise InputError(f"{index}: no tensor can be named '{printable(name)}'", "do not use this checkpoint")
        if not is_name(shard) or len(shard.encode()) > 255:
            raise InputError(f"{index}: no file can be named '{printable(shard)}'", "do not use this checkpoint")
        if shard == ".." or Path(shard).name != shard:
            raise InputError(
                f"{index}: shard name '{printable(shard)}' leaves the folder", "do not use this checkpoint"
            )
    return weight_map


def _check_layer_count(path: Path, config: dict[str, Any], tensors: dict[str, TensorEntry]) -> None:
    """Whoever plans a conversion goes through all layers, so their number must be one that the weights can have."""
    for key in LAYER_COUNTS:
        count = config.get(key)
        if type(count) is int and count > len(tensors):
            raise InputError(
                f"{path / 'config.json'}: {key} is {printable(count, 30)}, the weights are {len(tensors)} tensors",
                "config.json and the weights do not belong together",
            )
