"""Writes a quantised model as a ModelOpt-style Hugging Face checkpoint, for the `llmapi` runtime.

TP does not matter: the runtime splits at load. Format: see `trtkit.quantize.huggingface_layout` and
`trtkit.quantize.huggingface_tensors`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blake3

from trtkit import __version__
from trtkit.checkpoint import MANIFEST
from trtkit.convert.cast import CastReport
from trtkit.convert.conversion import WORK, Options
from trtkit.convert.plan import Plan
from trtkit.errors import InputError
from trtkit.hf import Source
from trtkit.quantize.huggingface_layout import HuggingFaceLayout, quantization_files
from trtkit.quantize.huggingface_tensors import HuggingFaceTensors, Output
from trtkit.quantize.layer_files import layer_entries
from trtkit.safetensors_io import TensorEntry, Writer
from trtkit.store import atomic_dir, atomic_write, check_output, digest
from trtkit.untrusted import read_json

if TYPE_CHECKING:
    from trtkit.quantize.calibration import Calibration
    from trtkit.quantize.fit import Effort
    from trtkit.quantize.quality import LinearQuality

SHARD_BYTES = 5 << 30
"""Size from which on a further file is begun."""
READ_BYTES = 8 << 20
COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template*",
)  # fmt: skip
"""Patterns of the source's files beside its weights that a checkpoint needs."""


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        files: bytes and checksum (blake3, None without) by name.
        report: what a change of dtype did to the tensors that are not quantised.
    """

    files: dict[str, dict[str, Any]]
    report: CastReport


def write_huggingface(
    config: Mapping[str, Any],
    source: Source,
    layers: Mapping[str, TensorEntry],
    folder: Path,
    *,
    options: Options | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Writes a checkpoint into an empty folder that the caller publishes. In memory is one linear at a time.

    Args:
        config: config.json of the TRT-LLM checkpoint that would be made instead, with its `quantization`; its mapping
            does not matter.
        layers: the tensors that quantisation made (`trtkit.quantize.pipeline.layer_entries`): whole linears, TP 1.
        on_progress: called with bytes (done, total).

    Raises:
        InputError: see `HuggingFaceLayout`; or a value that the dtype cannot hold (names the tensor).
    """
    options = options or Options()
    layout = HuggingFaceLayout(config)
    report = CastReport()
    with HuggingFaceTensors(layout, source, layers) as tensors:
        shards = _shards(list(tensors.outputs()), shard_bytes)
        total = sum(output.nbytes for outputs in shards.values() for output in outputs)
        done = 0
        for name, outputs in shards.items():
            writer = Writer(folder / name, [spec for output in outputs for spec in output.specs])
            try:
                for output in outputs:
                    tensors.write(output, writer, report, saturate=options.saturate)
                    done += output.nbytes
                    on_progress(done, total)
                if options.sync:
                    writer.sync()
            finally:
                writer.close()
    _write_index(shards, folder, total)
    _write_configs(layout, source, folder)
    files = {
        file.name: {"bytes": file.stat().st_size, "blake3": _checksum(file) if options.checksum else None}
        for file in sorted(folder.iterdir())
        if file.is_file() and not file.name.startswith(".")
    }
    return Written(files, report)


def _shards(outputs: Sequence[Output], limit: int) -> dict[str, list[Output]]:
    """File name -> what lies in it."""
    groups: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if size and size + output.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{index:05}-of-{len(groups):05}.safetensors": group for index, group in enumerate(groups, 1)}


def _write_index(shards: Mapping[str, Sequence[Output]], folder: Path, total: int) -> None:
    if len(shards) == 1:
        return
    places = {spec.name: file for file, outputs in shards.items() for output in outputs for spec in output.specs}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    atomic_write(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _write_configs(layout: HuggingFaceLayout, source: Source, folder: Path) -> None:
    files = quantization_files(layout)
    model = dict(read_json(source.path / "config.json"))
    for key in {"dtype", "torch_dtype"} & model.keys() or {"torch_dtype"}:
        model[key] = layout.config["dtype"]
    model["quantization_config"] = files.pop("quantization_config")
    for name, content in {"config.json": model, **files}.items():
        atomic_write(folder / name, json.dumps(content, indent=2) + "\n")
    for pattern in COPIED:
        for file in source.path.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _checksum(file: Path) -> str:
    hashed = blake3.blake3()
    with file.open("rb") as opened:  # not mapped: the pages would count as this process's memory
        while block := opened.read(READ_BYTES):
            hashed.update(block)
    return hashed.hexdigest()


@dataclass(frozen=True)
class Exported:
    """What `export` made.

    Attributes:
        quality: how well every linear came out; empty for weight-only formats.
    """

    written: Written
    quality: list[LinearQuality] = field(default_factory=list)


def export(
    plan: Plan,
    source: Source,
    out: Path,
    *,
    calibration: Calibration | None = None,
    effort: Effort | None = None,
    device: str = "cpu",
    options: Options | None = None,
    replace: bool = False,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_written: Callable[[Path], None] = lambda folder: None,
    make: Callable[[Path], None] | None = None,
) -> Exported:
    """Quantises a source into a checkpoint folder for the `llmapi` runtime, all or nothing.

    A run that was killed or interrupted leaves a hidden folder beside `out`; the same call goes on with the first layer
    that was not finished.

    Args:
        plan: of the source, TP 1 (`trtkit.convert.source.plan_conversion`).
        calibration: see `trtkit.quantize.calibration.load_tokens`; weight-only formats need none.
        options: as of `trtkit.convert.conversion.convert`; `quantization` tells what the tensors depend on.
        replace: replace an earlier checkpoint of this function. Any other folder stays as it is.
        on_layer: called with decoder layers (done, total).
        on_written: called with the finished folder before it is published as `out`.
        make: makes the layers' files in a folder, instead of quantising the source.

    Raises:
        InputError: see `write_huggingface`; or `out` may not be written to.
    """
    options = options or Options()
    HuggingFaceLayout(plan.config)
    check_target(out, source, replace=replace)
    key = digest({"runtime": "llmapi", "source": source.identity(), "config": plan.config, "options": asdict(options)})
    with atomic_dir(out, replace=replace, resume=key) as folder:
        exported = export_into(
            plan,
            source,
            folder,
            calibration=calibration,
            effort=effort,
            device=device,
            options=options,
            on_layer=on_layer,
            on_progress=on_progress,
            on_written=on_written,
            make=make,
        )
        check_target(out, source, replace=replace)
    return exported


def export_into(
    plan: Plan,
    source: Source,
    folder: Path,
    *,
    calibration: Calibration | None = None,
    effort: Effort | None = None,
    device: str = "cpu",
    options: Options | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    on_written: Callable[[Path], None] = lambda folder: None,
    make: Callable[[Path], None] | None = None,
) -> Exported:
    """`export` into a folder that the caller publishes, empty or left behind by an interrupted call of this."""
    options = options or Options()
    layout = HuggingFaceLayout(plan.config)
    identity = source.identity()
    for leftover in folder.iterdir():
        if leftover.name != WORK:
            leftover.unlink()
    if make is None:
        layers, quality = _quantized(layout, source, folder / WORK, calibration, effort, device, on_layer)
    else:
        make(folder / WORK)
        layers, quality = layer_entries(folder / WORK), []
    written = write_huggingface(plan.config, source, layers, folder, options=options, on_progress=on_progress)
    if source.identity() != identity:
        raise InputError(f"{source.path} was changed while it was read", "convert it again when it is complete")
    shutil.rmtree(folder / WORK, ignore_errors=True)
    manifest = {
        "producer": {"name": "trtkit", "version": __version__},
        "runtime": "llmapi",
        "source": {"origin": source.origin, **identity},
        "options": {"dtype": plan.config["dtype"], **asdict(options)},
        "report": asdict(written.report),
        "files": written.files,
    }
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    on_written(folder)
    return Exported(written, quality)


def _quantized(
    layout: HuggingFaceLayout,
    source: Source,
    work: Path,
    calibration: Calibration | None,
    effort: Effort | None,
    device: str,
    on_layer: Callable[[int, int], None],
) -> tuple[dict[str, TensorEntry], list[LinearQuality]]:
    if not layout.quantization.makes_tensors:
        return {}, []
    if calibration is None and layout.quantization.needs_calibration:
        raise InputError(f"{layout.quantization.format} needs calibration text", "give some, or leave the built-in one")
    from trtkit.quantize.pipeline import Quantizer  # torch
    from trtkit.quantize.quality import qualities

    tokens = None if calibration is None else calibration.tokens
    quantizer = Quantizer(layout.config, source, tokens, work, effort=effort, device=device)
    quantizer.run(on_layer)
    return layer_entries(work), qualities(work, layout.config["num_hidden_layers"])


def check_target(out: Path, source: Source, *, replace: bool = False) -> None:
    """Whether `export` may write to `out`.

    Raises:
        InputError: `out` is or holds the source or lies in it, exists, or is (with `replace`) no earlier checkpoint of
            this kind.
    """
    target, origin = check_output(out, replace=True), source.path.resolve()
    if target == origin or origin in target.parents or target in origin.parents:
        raise InputError(f"{out} would overwrite its own source {source.path}", "choose another output folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not replace:
        raise InputError(f"{out} exists already", "choose another output folder, or replace it with --force")
    if not is_export(target):
        raise InputError(f"{out} is not an earlier checkpoint", "choose another output folder, or remove it yourself")


def is_export(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of `export` and nothing else that anybody could miss. Never raises."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = {*manifest["files"], MANIFEST, "accuracy.json", "trtkit.json"}
        return manifest["runtime"] == "llmapi" and all(file.name in known for file in folder.iterdir())
    except (OSError, ValueError, KeyError, TypeError):
        return False
