"""A conversion from beginning to end: checks, resuming what was interrupted, the manifest, publishing.

The manifest `conversion.json` lies beside config.json and says what the checkpoint was made of and how, and the size
and checksum of every file. While a conversion runs, `progress.json` in its unpublished folder says how far it came.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import blake3

from trtkit import __version__
from trtkit.checkpoint import MANIFEST, config_files, is_checkpoint, rank_file, read_manifest
from trtkit.convert.cast import CastReport
from trtkit.convert.follow import FileRecord, NonFinite
from trtkit.convert.plan import Plan
from trtkit.convert.progress import PROGRESS, Progress, has_size
from trtkit.convert.source import source_tensors
from trtkit.convert.stream import write_ranks
from trtkit.errors import InputError, LacksError, TrtkitError
from trtkit.hf import Source
from trtkit.safetensors_io import TensorEntry
from trtkit.store import atomic_dir, atomic_write, check_output, digest

WORK = "quantized"
"""Folder of what quantisation has made so far, which a resumed run goes on with; removed in the end."""
ACCURACY = "accuracy.json"
"""What quantisation cost (see `trtkit.accuracy`)."""
PROGRESS_BYTES = 256 << 20
"""How much may be written before the next note of how far the conversion came."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """How a conversion is carried out.

    Attributes:
        checksum: digest every file and look for NaN and infinity, both beside the copying.
        saturate: values beyond the range of the dtype become its largest instead of an error.
        sync: wait until every file is on the disk before it counts as finished.
        quantization: what beside the source determines quantised tensors; goes into the manifest.
    """

    checksum: bool = True
    saturate: bool = False
    sync: bool = True
    quantization: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """What a conversion found.

    Attributes:
        report: what the change of dtype did to the values.
        non_finite: source tensors that hold a NaN or an infinity, each with the first index.
        resumed_bytes: bytes of the ranks that an interrupted run had finished.
    """

    report: CastReport
    non_finite: list[NonFinite]
    resumed_bytes: int


def convert(
    plan: Plan,
    source: Source,
    out: Path,
    *,
    options: Options | None = None,
    replace: bool = False,
    on_progress: OnProgress = lambda done, total: None,
    write: WriteRanks | None = None,
    on_written: Callable[[Path], None] = lambda folder: None,
) -> Conversion:
    """Writes the checkpoint folder, all or nothing.

    A run that was killed or interrupted leaves a hidden folder beside `out`; the same call goes on from there.

    Args:
        replace: replace an earlier checkpoint. Any other folder stays as it is.
        on_progress: called with bytes (done, total) of the checkpoint.
        write: writes the missing ranks (default: `write_here`).
        on_written: called with the finished folder before it is published as `out`.

    Raises:
        InputError: `out` may not be written to, or a value cannot be represented in the checkpoint's dtype (names the
            tensor).
        LacksError: the disk is full.
    """
    options = options or Options()
    check_target(out, source, replace=replace)
    with atomic_dir(out, replace=replace, resume=resume_key(plan, source, options)) as folder:
        result = write_checkpoint(plan, source, folder, options=options, on_progress=on_progress, write=write)
        on_written(folder)
        check_target(out, source, replace=replace)  # somebody may have put something there meanwhile
    return result


def resume_key(plan: Plan, source: Source, options: Options) -> str:
    """Digest of all that determines the bytes of a checkpoint, so that only the same conversion goes on with it."""
    return digest(
        {
            "source": source.identity(),
            "config": plan.config,
            "options": _manifest_options(plan, options),
            "sync": options.sync,
        }
    )


def check_target(out: Path, source: Source, *, replace: bool = False) -> None:
    """Whether a checkpoint of `source` may be written to `out`.

    Raises:
        InputError: `out` is or holds the source or lies in it, exists, or is (with `replace`) no earlier checkpoint.
    """
    target = check_output(out, replace=True)
    origin = source.path.resolve()
    if target == origin or origin in target.parents or target in origin.parents:
        raise InputError(f"{out} would overwrite its own source {source.path}", "choose another output folder")
    if target.is_dir() and any(target.iterdir()):
        earlier = is_checkpoint(target)
        if not replace:
            hint = ", or replace the checkpoint there with --force" if earlier else ""
            raise InputError(f"{out} exists already", f"choose another output folder{hint}")
        if not earlier:
            raise InputError(
                f"{out} is not an earlier checkpoint", "choose another output folder, or remove it yourself"
            )


def write_checkpoint(
    plan: Plan,
    source: Source,
    folder: Path,
    *,
    options: Options | None = None,
    on_progress: OnProgress = lambda done, total: None,
    write: WriteRanks | None = None,
) -> Conversion:
    """Like `convert`, into an existing folder that the caller publishes. What an interrupted call of the same plan,
    source and options left there is kept."""
    options = options or Options()
    identity = source.identity()
    if earlier := _finished(plan, source, folder, options):
        return earlier
    _clean(folder)
    progress = Progress.read(folder)
    done = sum(plan.rank_bytes(rank) for rank in progress.finished)
    total = sum(plan.rank_bytes(rank) for rank in range(len(plan.ranks)))
    resumed = done
    _check_space(folder, total)
    on_progress(done, total)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, total)

    try:
        (write or write_here)(plan, source, folder, options, progress, advance)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LacksError(f"{folder.parent}: the disk is full", f"{_gigabytes(total)} are needed there") from error
        raise
    on_progress(total, total)
    if source.identity() != identity:
        raise InputError(f"{source.path} was changed while it was read", "convert it again when it is complete")
    _finish(plan, source, folder, options, progress)
    return Conversion(progress.report, progress.non_finite, resumed)


WriteRanks = Callable[[Plan, Source, Path, Options, Progress, Callable[[int], None]], None]
"""Writes the ranks that the progress does not call finished, notes them there, and tells the bytes it wrote."""


def write_here(
    plan: Plan,
    source: Source,
    folder: Path,
    options: Options,
    progress: Progress,
    advance: Callable[[int], None],
    *,
    made: Mapping[str, TensorEntry] | None = None,
) -> None:
    """A `WriteRanks` that works in this process, one pipeline stage after the other.

    Args:
        made: tensors that the plan reads beside the source's, by name.
    """
    tensors = source_tensors(source) | dict(made or {})
    for stage, ranks in enumerate(plan.stages()):
        if not progress.finished.keys() >= set(ranks):
            _write_stage(plan, tensors, folder, stage, options, progress, advance)


def _write_stage(
    plan: Plan,
    tensors: Mapping[str, TensorEntry],
    folder: Path,
    stage: int,
    options: Options,
    progress: Progress,
    advance: Callable[[int], None],
) -> None:
    ranks = [rank for rank in plan.stages()[stage] if rank not in progress.finished]
    done, report = progress.start(stage)
    if not all((folder / rank_file(rank)).is_file() for rank in ranks):
        done, report = -1, CastReport()
    since_note = 0

    def count(nbytes: int) -> None:
        nonlocal since_note
        since_note += nbytes
        advance(nbytes)

    def note(unit: int, report: CastReport) -> None:
        nonlocal since_note
        if since_note >= PROGRESS_BYTES:
            since_note = 0
            progress.note(stage, unit, report)

    written = write_ranks(
        plan,
        tensors,
        folder,
        ranks,
        checksum=options.checksum,
        saturate=options.saturate,
        sync=options.sync,
        done_units=done,
        report=report,
        on_unit=note,
        on_progress=count,
    )
    progress.finish(written, sync=options.sync)


def _finished(plan: Plan, source: Source, folder: Path, options: Options) -> Conversion | None:
    """What an earlier call found, if it finished this very checkpoint here and was stopped before it was published."""
    try:
        manifest = read_manifest(folder)
        expected = config_files(plan.config)
        found = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in expected}
    except (TrtkitError, OSError, ValueError):
        return None
    if (
        manifest is None
        or found != expected
        or manifest.get("source") != {"origin": source.origin, **source.identity()}
        or manifest.get("options") != _manifest_options(plan, options)
        or not all(has_size(folder / name, record["bytes"]) for name, record in manifest["files"].items())
    ):
        return None
    wrong = [NonFinite(each["tensor"], tuple(each["index"]), each["value"]) for each in manifest["non_finite"] or []]
    (folder / PROGRESS).unlink(missing_ok=True)
    return Conversion(CastReport(**manifest["report"]), wrong, sum(map(plan.rank_bytes, range(len(plan.ranks)))))


def _clean(folder: Path) -> None:
    """Removes what no run can go on with: half-written notes, and everything where there are none."""
    noted = (folder / PROGRESS).is_file()
    for leftover in folder.iterdir():
        if leftover.name != WORK and (not noted or leftover.name.startswith(".")):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _finish(plan: Plan, source: Source, folder: Path, options: Options, progress: Progress) -> None:
    """Writes config.json, with mixed precision quant_cfg.json too, and the manifest."""
    files: dict[str, FileRecord] = {}
    for name, content in config_files(plan.config).items():
        data = (json.dumps(content, indent=2) + "\n").encode()
        atomic_write(folder / name, data)
        files[name] = FileRecord(len(data), blake3.blake3(data).hexdigest() if options.checksum else None)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    files |= {rank_file(rank): progress.finished[rank] for rank in sorted(progress.finished)}
    manifest = {
        "producer": {"name": "trtkit", "version": __version__},
        "source": {"origin": source.origin, **source.identity()},
        "options": _manifest_options(plan, options),
        "report": asdict(progress.report),
        "non_finite": [asdict(found) for found in progress.non_finite] if options.checksum else None,
        "files": {name: asdict(record) for name, record in files.items()},
    }
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    (folder / PROGRESS).unlink(missing_ok=True)


def _manifest_options(plan: Plan, options: Options) -> dict[str, Any]:
    """All options that determine the bytes of the checkpoint and its manifest."""
    config = plan.config
    sharding = ("vocab", "hidden")[config["embedding_sharding_dim"]] if config["use_parallel_embedding"] else "none"
    return {
        "dtype": config["dtype"],
        "tp": config["mapping"]["tp_size"],
        "pp": config["mapping"]["pp_size"],
        "ep": config["mapping"].get("moe_ep_size", 1),
        "parallel_embedding": sharding,
        "saturate": options.saturate,
        "checksum": options.checksum,
        **({"quantization": dict(options.quantization)} if options.quantization else {}),
    }


def _check_space(folder: Path, total: int) -> None:
    have = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if total - have > free:
        raise LacksError(
            f"{folder.parent}: {_gigabytes(free)} are free, the checkpoint takes {_gigabytes(total)}",
            "free some space, or choose a folder on another disk",
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count:,} bytes"
