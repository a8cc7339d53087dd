"""What is in a TRT-LLM checkpoint, also in an incomplete one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit import architectures
from trtkit.checkpoint import open_checkpoint, rank_file, read_checkpoint_config, read_manifest
from trtkit.convert.plan import plan_checkpoint
from trtkit.errors import InputError
from trtkit.inspect.headers import DtypeShare, StoredTensor, dtype_shares, stored_tensors
from trtkit.inspect.model import ModelFacts, Problem, Quantization, facts_of_checkpoint, quantization_of_checkpoint
from trtkit.untrusted import printable

MAX_RANKS = 4096
"""Ranks that are looked at one by one; no checkpoint has so many."""


@dataclass(frozen=True)
class RankFile:
    """The file of one rank.

    Attributes:
        present: it is there; `problem` says what else is wrong with it.
        tensors: 0 for engines, which do not say.
        bytes: of the whole file.
    """

    file: str
    present: bool
    tensors: int
    bytes: int
    problem: str | None


@dataclass(frozen=True)
class Conversion:
    """What conversion.json says, trtkit's own note of how a checkpoint was made.

    Attributes:
        made_by: program and version.
        origin: where the source was: `hub:owner/name@commit`, an `s3://` or `gs://` address, or `file:/folder`; None
            where it does not say.
        source_digest: SHA-256 of the source's config.json, as hex.
        files: files that it lists.
        checksums: how many of them with a checksum (`trtkit verify` compares those).
    """

    made_by: str | None
    origin: str | None
    source_digest: str | None
    files: int
    checksums: int


@dataclass(frozen=True)
class CheckpointReport:
    """What is in a checkpoint.

    Attributes:
        supported: trtkit has the architecture, so that `trtkit verify` and the reference runtime can read it.
        complete: every rank's file is there, its header fits its size, and its size is that in conversion.json.
        bytes: of all tensors.
        parameters: of the model as it runs; None for architectures that trtkit does not have.
        producer: what config.json says about who made it.
        conversion: None where trtkit did not make it.
    """

    path: str
    architecture: str
    supported: bool
    dtype: str
    tp: int
    pp: int
    ep: int
    complete: bool
    bytes: int
    parameters: int | None
    dtypes: list[DtypeShare]
    quantization: Quantization | None
    model: ModelFacts
    ranks: list[RankFile]
    producer: str | None
    conversion: Conversion | None
    problems: list[Problem]
    kind: str = "checkpoint"


def inspect_checkpoint(path: Path) -> CheckpointReport:
    """Describes a checkpoint folder by its config.json, conversion.json and the headers of its ranks.

    Raises:
        InputError: config.json is not a checkpoint's, or conversion.json is damaged.
    """
    config = read_checkpoint_config(path)
    manifest = read_manifest(path)
    mapping = config["mapping"]
    if mapping["world_size"] > MAX_RANKS:
        raise InputError(
            f"{path / 'config.json'}: {mapping['world_size']} ranks, no checkpoint has so many", "correct it"
        )
    sizes = {name: record["bytes"] for name, record in manifest["files"].items()} if manifest else {}
    ranks, tensors = [], []
    for rank in range(mapping["world_size"]):
        found, held = _rank(path / rank_file(rank), sizes)
        ranks.append(found)
        tensors += held
    problems = _problems(path, ranks)
    return CheckpointReport(
        path=str(path),
        architecture=config["architecture"],
        supported=config["architecture"] in architectures.FAMILIES,
        dtype=config["dtype"],
        tp=mapping["tp_size"],
        pp=mapping["pp_size"],
        ep=mapping.get("moe_ep_size", 1),
        complete=not problems,
        bytes=sum(tensor.nbytes for tensor in tensors),
        parameters=_parameters(config, len(tensors)),
        dtypes=dtype_shares(tensors),
        quantization=quantization_of_checkpoint(config),
        model=facts_of_checkpoint(config),
        ranks=ranks,
        producer=_producer(config.get("producer")),
        conversion=None if manifest is None else _conversion(manifest),
        problems=problems,
    )


def _rank(file: Path, sizes: Mapping[str, int]) -> tuple[RankFile, list[StoredTensor]]:
    if not os.path.lexists(file):
        return RankFile(file.name, False, 0, 0, "missing"), []
    try:
        tensors = stored_tensors(file)
        size = file.stat().st_size
    except InputError as error:
        return RankFile(file.name, True, 0, 0, error.cause), []
    wanted = sizes.get(file.name, size)
    problem = None if size == wanted else f"{size:,} bytes, conversion.json says {wanted:,}"
    return RankFile(file.name, True, len(tensors), size, problem), tensors


def _problems(path: Path, ranks: list[RankFile]) -> list[Problem]:
    """The first thing that keeps the checkpoint from being used, and how many ranks share it."""
    try:
        open_checkpoint(path)
    except InputError as error:
        missing = sum(not rank.present for rank in ranks)
        more = f"; {missing} of {len(ranks)} ranks are missing" if missing > 1 else ""
        return [Problem(error.cause + more, error.fix)]
    return [
        Problem(f"{path / rank.file}: {rank.problem}", "convert again") for rank in ranks if rank.problem is not None
    ]


def _parameters(config: Mapping[str, Any], tensors: int) -> int | None:
    """By the family's table: the ranks hold copies, padding and, when quantised, scales."""
    if config["architecture"] not in architectures.FAMILIES or config["num_hidden_layers"] > tensors:
        return None
    try:
        sources = plan_checkpoint(config).sources
    except (InputError, TypeError, AttributeError):  # a layout of other makers, keys of other types
        return None
    return sum(math.prod(shape) for shape in sources.values())


def _producer(given: Any) -> str | None:
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        return None
    return printable(f"{given['name']} {given.get('version') or ''}".strip(), 80)


def _conversion(manifest: Mapping[str, Any]) -> Conversion:
    source = manifest.get("source")
    source = source if isinstance(source, dict) else {}
    files = manifest["files"]
    origin, digest = source.get("origin"), source.get("config_sha256")
    return Conversion(
        made_by=_producer(manifest.get("producer")),
        origin=printable(origin) if isinstance(origin, str) else None,
        source_digest=printable(digest) if isinstance(digest, str) else None,
        files=len(files),
        checksums=sum(record["blake3"] is not None for record in files.values()),
    )
