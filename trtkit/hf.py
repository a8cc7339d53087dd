"""A source: a Hugging Face checkpoint, opened by its headers. Nothing in it is loaded whole, nothing is executed."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit import architectures
from trtkit.errors import InputError, LacksError
from trtkit.safetensors_io import TensorEntry, read_header

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
"""What is downloaded from the hub: no pickle files, no code."""


@dataclass(frozen=True)
class Source:
    """An opened Hugging Face checkpoint.

    Attributes:
        path: its folder.
        config: config.json in one spelling (see `normalize_config`).
        tensors: every tensor of every shard, by name.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @property
    def architecture(self) -> str:
        return str(self.config["architectures"][0])

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.tensors.values())

    def identity(self) -> dict[str, Any]:
        """What tells this source from another: digests of config.json and of the files' names, sizes and times."""
        files = sorted({entry.path for entry in self.tensors.values()})
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        config = (self.path / "config.json").read_bytes()
        return {
            "config_sha256": hashlib.sha256(config).hexdigest(),
            "files_sha256": hashlib.sha256(json.dumps(stats).encode()).hexdigest(),
        }


def open_source(source: str | Path, *, revision: str | None = None) -> Source:
    """Opens a local folder or a hub id.

    Args:
        source: folder with config.json and safetensors files, or a hub id such as `owner/name`.
        revision: commit, tag or branch of a hub id.

    Raises:
        InputError: not a usable checkpoint; names the file and tensor.
        LacksError: a hub id that cannot be downloaded and is not in the cache.
    """
    path = Path(source).expanduser()
    if path.exists() and revision is not None:
        raise InputError(f"source '{source}' is a local folder, which has no revision '{revision}'", "leave one out")
    if not path.exists():
        if not is_hub_id(str(source)):
            raise InputError(f"source '{source}' does not exist", "give a folder or a hub id such as owner/name")
        path = _download(str(source), revision)
    if not path.is_dir():
        raise InputError(f"source '{source}' is not a folder", "give the folder that holds config.json")
    config = read_config(path)
    return Source(path, config, _open_tensors(path))


def is_hub_id(source: str) -> bool:
    """Whether a source that is not a local folder has the form of a hub id (`name` or `owner/name`)."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", source) is not None


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a source folder, normalised."""
    raw = _read_json(path / "config.json")
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputError(f"{path / 'config.json'}: key 'architectures' is missing", "add the model's class name")
    architectures.get(names[0])
    if (quantized := raw.get("quantization_config")) is not None:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise InputError(
            f"{path / 'config.json'}: the weights are quantised already ({method})", "use the original model"
        )
    return normalize_config(raw)


def normalize_config(raw: dict[str, Any]) -> dict[str, Any]:
    """A Hugging Face config with one spelling for what transformers 4 and 5 spell differently.

    `dtype` (4: torch_dtype), `rope_theta` and `rope_scaling` (5: both inside rope_parameters). `rope_scaling` is None
    when nothing is scaled (5 writes `rope_type: default`), else it carries both `type` and `rope_type`.
    """
    config = dict(raw)
    config["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"config.json: rope parameters are {rope!r}, expected a mapping", "download the file again")
    rope = dict(rope)
    theta = rope.pop("rope_theta", None)
    config["rope_theta"] = theta if theta is not None else raw.get("rope_theta", 10000.0)
    kind = rope.get("rope_type", rope.get("type"))
    if kind in (None, "default"):
        config["rope_scaling"] = None
    else:
        config["rope_scaling"] = {**rope, "type": kind, "rope_type": kind}
    return config


def eos_token_ids(path: Path) -> list[int]:
    """All end-of-sequence ids: generation_config.json's list where there is one, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        file = path / name
        value = _read_json(file).get("eos_token_id") if file.is_file() else None
        if isinstance(value, int):
            return [value]
        if isinstance(value, list) and value:
            return [int(item) for item in value]
    return []


def _open_tensors(path: Path) -> dict[str, TensorEntry]:
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if index.is_file():
        return _open_shards(path, index)
    if single.is_file():
        return read_header(single)
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise InputError(
            f"{path} holds pickled weights ({pickled[0]}), which can run any code when they are loaded",
            'if you trust them, rewrite them once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}').save_pretrained('{path}-safetensors')\"",
        )
    raise InputError(
        f"{path} holds neither model.safetensors nor model.safetensors.index.json", "is the download complete?"
    )


def _open_shards(path: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: key 'weight_map' is missing or not a mapping of names", "download the index again")
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise InputError(f"{index}: shard name '{shard}' leaves the folder", "do not use this checkpoint")
        if not (path / shard).is_file():
            tensor = next(name for name, file in weight_map.items() if file == shard)
            raise InputError(
                f"{path / shard} is missing (the index expects tensor '{tensor}' in it)", "finish the download"
            )
        for name, entry in read_header(path / shard).items():
            if weight_map.get(name) == shard:
                tensors[name] = entry
    for name, shard in weight_map.items():
        if name not in tensors:
            raise InputError(
                f"{path / shard}: tensor '{name}' is missing, though the index names it", "download the shard again"
            )
    return tensors


def _download(repo: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    offline = "run once with a connection, or copy the checkpoint here and give its folder"
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except GatedRepoError as error:
        fix = f"accept its licence at the hub's page of {repo}, then set HF_TOKEN"
        raise LacksError(f"'{repo}' is gated and this machine has no access to it", fix) from error
    except RevisionNotFoundError as error:
        raise InputError(f"'{repo}' has no revision '{revision}'", "give an existing commit, tag or branch") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"'{repo}' is neither a local folder nor a model on the hub", "check the name; private ones need HF_TOKEN"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        at = f" at revision '{revision}'" if revision else ""
        cause = f"cannot reach the hub, and '{repo}'{at} is neither a folder here nor in the hub's local cache"
        raise LacksError(cause, offline) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", "is this the folder of a Hugging Face checkpoint?"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})", "download the file again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a JSON object", "download the file again")
    return data


def is_ignored(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a source tensor matches one of an architecture's `ignored` patterns."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)
