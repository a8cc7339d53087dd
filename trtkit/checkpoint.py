"""A TRT-LLM checkpoint: `config.json` and one `rank{R}.safetensors` per rank, R = pp_rank * tp_size + tp_rank.

Format: TensorRT-LLM, docs/source/legacy/architecture/checkpoint.md and tensorrt_llm/models/modeling_utils.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.errors import InputError
from trtkit.safetensors_io import TensorEntry, read_header

REQUIRED_KEYS = (
    "architecture", "dtype", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_size", "intermediate_size", "max_position_embeddings", "mapping",
)  # fmt: skip


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
    """config.json of a checkpoint folder, with the keys every use needs.

    Raises:
        InputError: the file is missing or is not a checkpoint's.
    """
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}", "is this the folder of a TRT-LLM checkpoint?") from error
    missing = [key for key in REQUIRED_KEYS if key not in config] if isinstance(config, dict) else list(REQUIRED_KEYS)
    if missing:
        raise InputError(
            f"{file}: not a TRT-LLM checkpoint's config (no '{missing[0]}')", "see `trtkit convert --help`"
        )
    mapping: Mapping[str, Any] = config["mapping"]
    tp, pp = mapping.get("tp_size", 1), mapping.get("pp_size", 1)
    if mapping.get("world_size", tp * pp) != tp * pp:
        raise InputError(
            f"{file}: world_size {mapping['world_size']} is not tp_size {tp} x pp_size {pp}", "convert again"
        )
    return {**config, "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}}


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds a checkpoint, whole or not, and nothing else that anybody could miss."""
    try:
        read_checkpoint_config(path)
    except InputError:
        return False
    return all(re.fullmatch(r"config\.json|trtkit\.json|rank\d+\.safetensors", file.name) for file in path.iterdir())


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
        if not file.is_file():
            raise InputError(f"{file} is missing (config.json: {world} ranks)", "convert again")
        ranks.append(read_header(file))
    surplus = sorted(
        {file.name for file in path.glob("rank*.safetensors")} - {rank_file(rank) for rank in range(world)}
    )
    if surplus:
        raise InputError(f"{path / surplus[0]} does not belong here (config.json: {world} ranks)", "convert again")
    return Checkpoint(path, config, ranks)
