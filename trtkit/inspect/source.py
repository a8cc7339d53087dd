"""What is in a source, also in one that trtkit does not convert: a description refuses nothing that it can read."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtkit import architectures, hf
from trtkit.convert.parallelism import valid_ep_sizes, valid_tp_sizes
from trtkit.convert.plan import plan_checkpoint
from trtkit.convert.source import Layout, checkpoint_config, plan_conversion
from trtkit.errors import InputError
from trtkit.hf_config import quantized_in
from trtkit.inspect.headers import DtypeShare, StoredTensor, dtype_shares, stored_tensors
from trtkit.inspect.model import (
    ModelFacts,
    Problem,
    Quantization,
    facts_of_checkpoint,
    facts_of_huggingface,
    quantization_of_source,
)
from trtkit.quantize.importing import import_plan
from trtkit.untrusted import is_name, printable, read_json

EXAMPLE_TP = (1, 2, 4, 8)
MAX_EXPERT_TENSORS = 1_000_000
"""Most layers times experts that a layout is worked out for; the largest known models have 25,000."""

_SOME_GPU = "sm80"
"""Stands for the GPU that users name where weights are laid out for one."""
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_WIDE = 8
_COMPANION = re.compile(
    r"[._](qzeros|scales?|(weight|input|output|[qkv])_scale(_inv|_2)?|(weight_)?(zero_point|shape|g_idx)|SCB"
    r"|pre_quant_scale|weight_format|absmax|quant_map|nested_\w+|quant_state\.\w+)$"
)
"""What quantised weights carry beside them: scales, zero points and notes, which are no parameters of the model."""


@dataclass(frozen=True)
class Layouts:
    """What conversion can make of a source.

    Attributes:
        tp: valid tensor-parallel sizes up to 64, without expert parallelism.
        pp_max: pipeline-parallel sizes go from 1 to this; 1 where TRT-LLM's class has no pipeline.
        ep: valid expert-parallel size above 1 -> valid tensor-parallel sizes with it; empty without experts.
        dtype: what the checkpoint's dtype is unless another one is asked for.
        converts_dtype: some weights are stored in another dtype than that.
        rank_bytes: TP size -> bytes of the largest rank at PP 1 and EP 1.
    """

    tp: tuple[int, ...]
    pp_max: int
    ep: dict[int, tuple[int, ...]]
    dtype: str
    converts_dtype: bool
    rank_bytes: dict[int, int]


@dataclass(frozen=True)
class SourceReport:
    """What is in a source.

    Attributes:
        supported: trtkit has the architecture; `near` names the closest ones where it has not.
        convertible: `trtkit convert` takes this source as it is; `problems` say why not.
        files: safetensors files that are there.
        bytes: of all stored tensors.
        parameters: of the model as it runs: tied embeddings once, packed weights unpacked, no scales. None where no
            weights are there to count.
        active_parameters: those that one token passes through; None for models without experts.
        layouts: of a quantised source those that the unquantised model would have; None where TRT-LLM cannot express
            the model.
        warnings: what is odd, but no obstacle.
    """

    path: str
    origin: str
    architecture: str | None
    supported: bool
    near: tuple[str, ...]
    convertible: bool
    files: int
    tensors: int
    bytes: int
    parameters: int | None
    active_parameters: int | None
    dtypes: list[DtypeShare]
    quantization: Quantization | None
    model: ModelFacts
    layouts: Layouts | None
    warnings: list[str]
    problems: list[Problem]
    kind: str = "source"


def inspect_source(path: Path, origin: str = "") -> SourceReport:
    """Describes a source folder by its config.json and headers.

    Args:
        origin: where the folder is from; by default it is the source itself.

    Raises:
        InputError: config.json is missing or no JSON object, or no header could be read.
    """
    raw = read_json(path / "config.json")
    origin = origin or f"file:{path.absolute()}"
    files, tensors = _stored(path)
    quantization = quantization_of_source(path, raw)
    architecture = _architecture(raw)
    supported = architecture in architectures.FAMILIES
    config, problem = _target(path, raw)
    model = _facts(raw, config)
    counts = _parameters(tensors, config, model, quantization)
    return SourceReport(
        path=str(path),
        origin=origin,
        architecture=architecture,
        supported=supported,
        near=() if supported else tuple(architectures.relatives(architecture or "")),
        convertible=problem is None,
        files=len(files),
        tensors=len(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        parameters=sum(counts.values()) or None,
        active_parameters=_active(counts, model),
        dtypes=dtype_shares(tensors),
        quantization=quantization,
        model=model,
        layouts=None if config is None else _layouts(_bare(path, raw), config, tensors),
        warnings=_warnings(path, raw, files, tensors, quantization),
        problems=[problem] if problem else [],
    )


def _stored(path: Path) -> tuple[list[Path], list[StoredTensor]]:
    """The safetensors files that are there, in transformers' order of preference, and their tensors."""
    files = [path / "model.safetensors"]
    if not files[0].is_file():
        index = path / "model.safetensors.index.json"
        shards = read_json(index).get("weight_map") if index.is_file() else None
        names = set(shards.values()) if isinstance(shards, dict) and _are_names(shards) else set()
        files = [path / name for name in sorted(names) if (path / name).is_file()]
        files = files or sorted(file for file in path.glob("*.safetensors") if file.is_file())
    return files, [tensor for file in files for tensor in stored_tensors(file)]


def _are_names(shards: Mapping[str, Any]) -> bool:
    return all(isinstance(name, str) and is_name(name, 255) and Path(name).name == name for name in shards.values())


def _architecture(raw: Mapping[str, Any]) -> str | None:
    names = raw.get("architectures")
    return printable(names[0]) if isinstance(names, list) and names and isinstance(names[0], str) else None


def _target(path: Path, raw: dict[str, Any]) -> tuple[dict[str, Any] | None, Problem | None]:
    """Config of the checkpoint that a source would become (as if its weights were not quantised), if there is one, and
    what `trtkit convert` would say against it."""
    config = None
    if _architecture(raw) in architectures.FAMILIES:
        with contextlib.suppress(InputError):  # which the judgement says again, with the file's name
            config = checkpoint_config(_bare(path, raw), Layout())
    if config is not None and not _plannable(config):
        return None, Problem(f"{path / 'config.json'}: more layers and experts than any model has", "download it again")
    return config, _judgement(path)


def _bare(path: Path, raw: dict[str, Any]) -> hf.Source:
    """A source without its tensors, for what follows from config.json alone."""
    return hf.Source(path, hf.normalize_config(raw), {})


def _plannable(config: Mapping[str, Any]) -> bool:
    """Whether a plan of this model fits into memory: whoever plans goes through all layers and experts."""
    experts = config["moe"]["num_experts"] if config.get("moe") else 1
    return bool(config["num_hidden_layers"] * experts <= MAX_EXPERT_TENSORS)


def _judgement(path: Path) -> Problem | None:
    """What `trtkit convert` would say: None when it takes the source."""
    try:
        source = hf.open_source(path)
        if quantized_in(path, source.config):
            import_plan(source, Layout(), gpu=_SOME_GPU)
        else:
            plan_conversion(source, Layout())
    except InputError as error:
        return Problem.of(error)
    return None


def _facts(raw: Mapping[str, Any], config: Mapping[str, Any] | None) -> ModelFacts:
    said = facts_of_huggingface(raw)
    if config is None:
        return said
    facts = facts_of_checkpoint(config)
    return facts if facts.tied_embeddings is not None else replace(facts, tied_embeddings=said.tied_embeddings)


def _parameters(
    tensors: list[StoredTensor],
    config: Mapping[str, Any] | None,
    model: ModelFacts,
    quantization: Quantization | None,
) -> dict[str, int]:
    """Source tensor -> parameters: by the family's table where there is one, else by what the headers say."""
    if config is not None and tensors:
        sources = plan_checkpoint(config).sources
        return {name: math.prod(shape) for name, shape in sources.items()}
    counts = {}
    bits = quantization.bits if quantization else None
    for tensor in tensors:
        if quantization and _COMPANION.search(tensor.name):
            continue
        packed = bits is not None and bits < _WIDE and tensor.dtype in ("I32", "I64", "U8")
        counts[tensor.name] = tensor.nbytes * 8 // bits if packed and bits else tensor.elements
    if model.tied_embeddings:
        counts.pop("lm_head.weight", None)
    return counts


def _active(counts: Mapping[str, int], model: ModelFacts) -> int | None:
    if not (counts and model.experts and model.experts_per_token):
        return None
    experts = sum(count for name, count in counts.items() if ".experts." in name)
    return sum(counts.values()) - experts + experts * model.experts_per_token // model.experts


def _layouts(source: hf.Source, config: dict[str, Any], tensors: list[StoredTensor]) -> Layouts:
    tp_sizes = tuple(valid_tp_sizes(config))
    with_ep = {ep: tuple(valid_tp_sizes(config, ep=ep)) for ep in valid_ep_sizes(config) if ep > 1}
    stored = {tensor.dtype for tensor in tensors if tensor.dtype in _DTYPES.values()}
    return Layouts(
        tp=tp_sizes,
        pp_max=config["num_hidden_layers"] if architectures.get(source.architecture).pipeline else 1,
        ep={ep: sizes for ep, sizes in with_ep.items() if sizes},
        dtype=config["dtype"],
        converts_dtype=not stored <= {_DTYPES[config["dtype"]]},
        rank_bytes={tp: _largest_rank(source, tp) for tp in EXAMPLE_TP if tp in tp_sizes},
    )


def _largest_rank(source: hf.Source, tp: int) -> int:
    plan = plan_checkpoint(checkpoint_config(source, Layout(tp=tp)))
    return max(plan.rank_bytes(rank) for rank in range(tp))


def _warnings(
    path: Path,
    raw: Mapping[str, Any],
    files: list[Path],
    tensors: list[StoredTensor],
    quantization: Quantization | None,
) -> list[str]:
    found = []
    said = raw.get("dtype") or raw.get("torch_dtype")
    said = said.removeprefix("torch.") if isinstance(said, str) else None
    plain = sorted({tensor.dtype for tensor in tensors} & set(_DTYPES.values()))
    if quantization is None and len(plain) > 1:
        found.append(f"weights of several dtypes: {', '.join(plain)}")
    elif quantization is None and plain and said in _DTYPES and plain != [_DTYPES[said]]:
        found.append(f"config.json says {said}, the weights are {plain[0]}")
    if raw.get("auto_map"):
        found.append("config.json names code of its own (auto_map), which trtkit does not run")
    other = sorted(file.name for file in path.glob("*.safetensors") if file not in files)
    other = [name for name in other if not name.startswith("consolidated")]  # Mistral's second copy of the weights
    if other:
        found.append(
            f"{printable(other[0])} is no part of the model" + (f", nor are {len(other) - 1} more" if other[1:] else "")
        )
    return found
