"""A TRT-LLM checkpoint: `config.json` and one `rank{R}.safetensors` per rank, R = pp_rank * tp_size + tp_rank.

Where linears have different formats (mixed precision), `quant_cfg.json` beside it says which has which. In memory that
table is a part of the config: its `quantization.quantized_layers`.

Format: TensorRT-LLM, docs/source/legacy/architecture/checkpoint.md and tensorrt_llm/models/modeling_utils.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.errors import InputError
from trtkit.safetensors_io import TensorEntry, read_header
from trtkit.untrusted import is_name, printable, read_json

MANIFEST = "conversion.json"
"""What a checkpoint that trtkit made was made of, and the checksums of its files."""

CONFIG = "config.json"
LAYERS_CONFIG = "quant_cfg.json"
MIXED_PRECISION = "MIXED_PRECISION"
"""What `quantization.quant_algo` of config.json says where quant_cfg.json says the rest."""

REQUIRED_KEYS = (
    "architecture", "dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_size", "intermediate_size", "max_position_embeddings", "mapping",
)  # fmt: skip
MAX_LAYERS = 100_000
MAX_COUNT = 2**40
_TEXTS = ("architecture", "dtype")
_FLAGS = ("use_parallel_embedding", "tie_word_embeddings", "attn_bias", "mlp_bias")
_MAPPING_KEYS = ("world_size", "tp_size", "pp_size", "cp_size", "moe_tp_size", "moe_ep_size")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: its folder.
        config: config.json.
        ranks: the tensors of each rank's file.
    """

    path: Path
    config: dict[str, Any]
    ranks: list[dict[str, TensorEntry]]

    @property
    def tp(self) -> int:
        return int(self.config["mapping"]["tp_size"])

    @property
    def pp(self) -> int:
        return int(self.config["mapping"]["pp_size"])

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for rank in self.ranks for entry in rank.values())


def rank_file(rank: int) -> str:
    return f"rank{rank}.safetensors"


def stage_layers(layers: int, pp: int) -> list[range]:
    """The layers of each pipeline stage: as even as possible, the first stages one longer (tensorrt_llm/mapping.py)."""
    base, extra = divmod(layers, pp)
    starts = [stage * base + min(stage, extra) for stage in range(pp + 1)]
    return [range(starts[stage], starts[stage + 1]) for stage in range(pp)]


def read_checkpoint_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, with the keys every use needs, of the types they must have. Of mixed
    precision, `quantization` holds the table of quant_cfg.json, if there is one.

    What TensorRT-LLM leaves out or adds is fine: unknown keys stay, and where it has a default for a missing key
    (tensorrt_llm/models/modeling_utils.py, PretrainedConfig) that is filled in. `mapping` holds world_size, tp_size and
    pp_size, and moe_tp_size and moe_ep_size if either is given.

    Raises:
        InputError: the file is missing or is not a checkpoint's; names the key.
    """
    file = Path(path) / CONFIG
    config = _with_layers(read_json(file, "a TRT-LLM checkpoint"), file.with_name(LAYERS_CONFIG))
    for key, default in _defaults(config).items():
        if config.get(key) is None:
            config[key] = default
    missing = [key for key in REQUIRED_KEYS if key not in config]
    if missing:
        raise InputError(
            f"{file}: not a TRT-LLM checkpoint's config (no '{missing[0]}')", "see `trtkit convert --help`"
        )
    for key in REQUIRED_KEYS:
        if key in _TEXTS:
            _check(file, key, config[key], isinstance(config[key], str) and is_name(config[key], 100), "a name")
        elif key != "mapping":
            limit = MAX_LAYERS if key == "num_hidden_layers" else MAX_COUNT
            _check(file, key, config[key], _is_count(config[key], limit), f"a positive integer up to {limit}")
    for key in _FLAGS:
        _check(file, key, config.get(key, False), isinstance(config.get(key, False), bool), "true or false")
    axis = config["embedding_sharding_dim"]
    _check(file, "embedding_sharding_dim", axis, type(axis) is int and axis in (0, 1), "0 or 1")
    return {**config, "mapping": _read_mapping(file, config["mapping"])}


def config_files(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of a checkpoint that a config is written to, by name: what `read_checkpoint_config` reads."""
    quantization = config.get("quantization") or {}
    if "quantized_layers" not in quantization:
        return {CONFIG: dict(config)}
    plain = {key: value for key, value in quantization.items() if key != "quantized_layers"}
    return {CONFIG: {**config, "quantization": plain}, LAYERS_CONFIG: dict(quantization)}


def _with_layers(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The config with the table of quant_cfg.json, which TensorRT-LLM believes where the two differ
    (tensorrt_llm/models/modeling_utils.py, to_layer_quant_config)."""
    quantization = config.get("quantization")
    if not isinstance(quantization, dict) or quantization.get("quant_algo") != MIXED_PRECISION:
        return config
    if not os.path.lexists(file):
        return config
    layers = read_json(file, "a TRT-LLM checkpoint")
    table = layers.get("quantized_layers")
    _check(file, "quantized_layers", "of another form", isinstance(table, dict), "formats by name of the linear")
    decided = {key: layers[key] for key in ("kv_cache_quant_algo", "quantized_layers") if key in layers}
    return {**config, "quantization": {**quantization, **decided}}


def _defaults(config: dict[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"use_parallel_embedding": False, "embedding_sharding_dim": 0, "mapping": {}}
    hidden, heads = config.get("hidden_size", 0), config.get("num_attention_heads", 0)
    if _is_count(heads):
        defaults["num_key_value_heads"] = heads
        if _is_count(hidden) and heads <= hidden:
            defaults["head_size"] = hidden // heads
    return defaults


def _read_mapping(file: Path, given: Any) -> dict[str, int]:
    _check(file, "mapping", given, isinstance(given, dict), "a mapping")
    # TensorRT-LLM writes -1 for what follows from the rest (tensorrt_llm/mapping.py).
    sizes = {key: value for key, value in given.items() if key in _MAPPING_KEYS and value not in (None, -1)}
    for key, value in sizes.items():
        _check(file, f"mapping.{key}", value, _is_count(value), "a positive integer")
    if sizes.get("cp_size", 1) != 1:
        raise InputError(f"{file}: cp_size {sizes['cp_size']}: trtkit reads no context-parallel checkpoints", "use 1")
    tp, pp = sizes.get("tp_size", 1), sizes.get("pp_size", 1)
    if sizes.get("world_size", tp * pp) != tp * pp:
        raise InputError(
            f"{file}: world_size {sizes['world_size']} is not tp_size {tp} x pp_size {pp}", "convert again"
        )
    mapping = {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}
    if "moe_tp_size" in sizes or "moe_ep_size" in sizes:
        moe_ep = sizes.get("moe_ep_size", max(1, tp // sizes.get("moe_tp_size", tp)))
        moe_tp = sizes.get("moe_tp_size", max(1, tp // moe_ep))
        if moe_tp * moe_ep != tp:
            raise InputError(
                f"{file}: moe_tp_size {moe_tp} x moe_ep_size {moe_ep} is not tp_size {tp}", "convert again"
            )
        mapping |= {"moe_tp_size": moe_tp, "moe_ep_size": moe_ep}
    return mapping


def _is_count(value: Any, limit: int = MAX_COUNT) -> bool:
    return type(value) is int and 0 < value <= limit


def _check(file: Path, key: str, value: Any, good: bool, wanted: str) -> None:
    if not good:
        raise InputError(f"{file}: {key} is {printable(repr(value))}, expected {wanted}", "convert again")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What a checkpoint was made of (see `MANIFEST`), or None where trtkit did not make it.

    Raises:
        InputError: the file is damaged.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        return None
    manifest = read_json(file, "a checkpoint")
    files = manifest.get("files")
    good = isinstance(files, dict) and all(
        is_name(name, 100)
        and Path(name).name == name
        and isinstance(record, dict)
        and _is_count(record.get("bytes"))
        and "blake3" in record
        for name, record in files.items()
    )
    _check(file, "files", "of another form", good, "sizes and checksums by file name")
    return manifest


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds a checkpoint, whole or not, and nothing else that anybody could miss. Never raises."""
    try:
        read_checkpoint_config(path)
        files = list(Path(path).iterdir())
    except (InputError, OSError):
        return False
    ours = re.compile(r"config\.json|quant_cfg\.json|conversion\.json|accuracy\.json|trtkit\.json|rank\d+\.safetensors")
    return all(ours.fullmatch(file.name) and not file.is_dir() for file in files)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint by the headers of its rank files.

    Raises:
        InputError: a file is missing, truncated or corrupt; names it.
    """
    path = Path(path)
    config = read_checkpoint_config(path)
    ranks, world = [], config["mapping"]["world_size"]
    for rank in range(world):
        file = path / rank_file(rank)
        if not os.path.lexists(file):
            raise InputError(f"{file} is missing (config.json: {world} ranks)", "convert again")
        ranks.append(read_header(file))
    surplus = sorted(
        {file.name for file in path.glob("rank*.safetensors")} - {rank_file(rank) for rank in range(world)}
    )
    if surplus:
        raise InputError(f"{path / surplus[0]} does not belong here (config.json: {world} ranks)", "convert again")
    # Whoever plans with this config goes through all layers, so their number must be one that the files can hold.
    layers, tensors = config["num_hidden_layers"], sum(map(len, ranks))
    if layers > tensors:
        raise InputError(
            f"{path / 'config.json'}: num_hidden_layers is {layers}, the ranks hold {tensors} tensors", "convert again"
        )
    return Checkpoint(path, config, ranks)
