"""What runs where: formats, GPU generations, runtimes, TensorRT-LLM releases and model families, told before any work.

Only what some source says to work is in the table; the rest is refused, with what does work. Sources, by the letters
used below (all of NVIDIA/TensorRT-LLM unless said otherwise):

- B: tensorrt_llm/builder.py of 0.19 to 1.0 (`build`): SM100 to SM119 raise RuntimeError for INT8/INT4 weights (AWQ and
  GPTQ count as such: quantization/mode.py, from_quant_algo), INT8 KV cache, SmoothQuant, and scales per channel or
  token, so FP8 rowwise. Issue 5594 meets it in 0.19.
- D: docs/source/features/quantization.md of 1.0 to 1.2, "Hardware Support Matrix" and "Model Supported Matrix", which
  speak of the PyTorch backend.
- M: the same file on main in 2026: AWQ on SM100 and SM103 as well (pull request 10190).
- P: docs/source/reference/precision.md, "Support matrix", which speaks of engines.
- Q: tensorrt_llm/quantization/quantize.py, which modules each algorithm swaps.
- R: docs/source/release-notes.md, the version that is named.
- S: docs/source/reference/support-matrix.md, "Hardware".
- V: vllm-project/vllm, docs/features/quantization/modelopt.md (which formats of ModelOpt it reads) and README.md there
  (which GPUs).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from trtkit import architectures, releases
from trtkit.convert.quantization import FORMATS, Quantization, get
from trtkit.errors import InputError
from trtkit.untrusted import printable

ENGINE, LLMAPI, VLLM, REFERENCE = "tensorrtllm", "llmapi", "vllm", "reference"
RUNTIMES = (ENGINE, LLMAPI, VLLM, REFERENCE)
"""Runtimes that take a quantised checkpoint of ours. `reference` runs all of them, on a CPU."""

Version = tuple[int, int]
_NEVER: Version = (99, 0)
_NEWEST: Version = (98, 0)
"""Stands for an unnamed release in what ended with some release."""
_INT8_KV, _FP8_KV = "INT8 KV cache", "FP8 KV cache"
_NO_ENGINES: Version = (1, 3)
"""The first release without trtllm-build (R 1.3; `releases.Release.has_engine_builder`)."""


class Row(NamedTuple):
    """Some formats and KV caches run on some GPU generations (SM numbers) of the releases from `since` to `before`."""

    runtime: str
    names: tuple[str, ...]
    sms: tuple[int, ...]
    since: Version = (0, 0)
    before: Version = _NEVER


_AMPERE, _ADA, _HOPPER = (80, 86), (89,), (90,)
_PLAIN = ("int8_wo", "int4_wo", "int8_sq_plugin", _INT8_KV)
_FP8 = ("fp8", _FP8_KV)
ROWS = (
    # S of 0.9: Turing has INT8, INT4 and SmoothQuant; issue 2620: T4 is out since 0.14; issue 1182: no AWQ, no GPTQ.
    Row(ENGINE, _PLAIN, (75,), before=(0, 14)),
    # S: Ampere, Ada and Hopper have INT8 and INT4; P.
    Row(ENGINE, (*_PLAIN, "int4_awq", "int4_gptq"), (*_AMPERE, *_ADA, *_HOPPER)),
    Row(ENGINE, ("int8_sq",), (*_AMPERE, *_ADA, *_HOPPER), (0, 15)),  # R 0.15: "native support for INT8 Smooth [...]"
    Row(ENGINE, _FP8, (*_ADA, *_HOPPER)),  # S: FP8 from Ada on
    Row(ENGINE, ("w4a8_awq",), _ADA, (0, 10)),  # R 0.10; weightOnlyGroupwiseQuantMatmulPlugin.cpp: from SM89 on
    Row(ENGINE, ("w4a8_awq",), _HOPPER, (0, 9)),  # issue 1312: 0.8 fails
    Row(ENGINE, ("fp8_rowwise",), _ADA, (0, 15)),  # R 0.15: "row-wise FP8 on Ada"
    Row(ENGINE, ("fp8_rowwise",), _HOPPER, (0, 13)),  # issue 2229 of September 2024: there, and on SM90 only
    Row(ENGINE, _FP8, (100,), (0, 17)),  # R 0.17: B200; nothing else: B
    Row(ENGINE, _FP8, (103,), (1, 1)),  # R 1.1: B300; B
    # R 0.19: "FP8 support for SM120"; S: Blackwell has INT8 and INT4; B refuses nothing there. Not AWQ: pull request
    # 11561 of 2026, later than 1.2, mends weights laid out wrongly on SM120 and SM121.
    Row(ENGINE, (*_FP8, "int8_sq", *_PLAIN), (120,), (0, 19)),
    Row(ENGINE, (*_FP8, "int8_sq", *_PLAIN), (121,), (1, 0)),  # R 1.0: "support for sm121"
    Row(LLMAPI, ("fp8",), (*_ADA, *_HOPPER, 100), (0, 17)),  # R 0.17; D
    Row(LLMAPI, ("fp8",), (103,), (1, 1)),  # R 1.1; D
    Row(LLMAPI, ("fp8",), (120,), (0, 19)),  # R 0.19; D
    Row(LLMAPI, ("fp8",), (121,), (1, 0)),  # R 1.0
    Row(LLMAPI, ("int4_awq",), (*_AMPERE, *_ADA, *_HOPPER), (0, 19)),  # R 0.19: "AWQ [...] ModelOpt checkpoints"; D
    Row(LLMAPI, ("w4a8_awq",), (*_ADA, *_HOPPER), (1, 0)),  # D
    Row(LLMAPI, ("int4_awq", "w4a8_awq"), (100, 103), (1, 3)),  # M
    Row(LLMAPI, ("fp8_rowwise",), _HOPPER, (0, 21)),  # R 0.21; D
    Row(LLMAPI, ("int8_wo", "int4_wo"), (*_AMPERE, *_ADA, *_HOPPER), (1, 0)),  # R 1.0: "Weight-Only-Quantization [...]"
    Row(VLLM, _FP8, (*_ADA, *_HOPPER, 100, 103, 120, 121)),  # V
    Row(LLMAPI, (_FP8_KV,), (*_AMPERE, *_ADA, *_HOPPER, 100, 103, 120, 121), (0, 17)),  # R 0.17; D: every generation
)


class Limit(NamedTuple):
    """Formats that a runtime lacks for models with experts, or, where `families` are given, for all but these."""

    runtime: str
    names: tuple[str, ...]
    why: str
    families: tuple[str, ...] = ()
    before: Version = _NEVER


_MIXED = "mixed precision"
_LLAMAS = ("LlamaForCausalLM", "MistralForCausalLM")
_SMOOTHED = (
    *_LLAMAS, "Qwen2ForCausalLM", "GemmaForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM", "Starcoder2ForCausalLM",
)  # fmt: skip
LIMITS = (
    # Issues 1241 and 1542, P (Mixtral).
    Limit(ENGINE, ("int8_sq", "int8_sq_plugin"), "TensorRT-LLM has no SmoothQuant for experts"),
    # Q: it swaps attention, MLPs and norms; a norm that quantises its output would feed experts that are not swapped.
    Limit(ENGINE, ("fp8_rowwise",), "TensorRT-LLM has no FP8 rowwise for experts"),
    Limit(ENGINE, ("int4_gptq",), "TensorRT-LLM reads no GPTQ for experts"),  # P (Mixtral)
    # R 0.19: "INT4-AWQ support for MoE models"; layers/moe.py has use_w4a8_awq.
    Limit(ENGINE, ("int4_awq", "w4a8_awq"), "TensorRT-LLM has no AWQ for experts before 0.19", before=(0, 19)),
    Limit(ENGINE, ("fp8",), "TensorRT-LLM has no FP8 for experts before 0.10", before=(0, 10)),  # R 0.10
    Limit(ENGINE, (_MIXED,), "no engine is known to have experts in mixed precision"),
    Limit(
        LLMAPI,
        ("int4_awq", "w4a8_awq", "fp8_rowwise", "int8_wo", "int4_wo"),
        "of these formats TensorRT-LLM's PyTorch backend has only FP8 for experts",
    ),  # D (Mixtral)
    # P. Q swaps every norm, also those that feed no linear (Qwen 3's of queries and keys, Gemma 2's behind a block).
    Limit(ENGINE, ("int8_sq_plugin",), "TensorRT-LLM's SmoothQuant plugins do not know this family", _SMOOTHED),
    # D; only examples/models/core/llama/convert_checkpoint.py is known to have --use_fp8_rowwise.
    Limit(ENGINE, ("fp8_rowwise",), "TensorRT-LLM has FP8 rowwise for Llama-like models only", _LLAMAS),
)

GPUS = {
    70: r"V100",
    75: r"T4|RTX 20\d\d|TITAN RTX|QUADRO RTX \d+",
    80: r"A100|A800|A30",
    86: r"A10|A16|A2|A40|RTX A\d+|RTX 30\d\d",
    87: r"ORIN",
    89: r"L4|L20|L40|RTX 40\d\d|RTX \d000 ADA",
    90: r"H100|H200|H20|H800|GH200",
    100: r"B100|B200|GB200",
    103: r"B300|GB300",
    110: r"THOR",
    120: r"RTX 50\d\d|RTX PRO",
    121: r"GB10|DGX SPARK",
}
"""SM number (compute capability x 10) -> pattern of GPU names (NVIDIA, "CUDA GPU Compute Capability")."""


@dataclass(frozen=True)
class Target:
    """Where a checkpoint shall run. What is None is not asked about.

    Attributes:
        runtime: one of RUNTIMES.
        architecture: class name of the model, such as `MixtralForCausalLM`.
        tensorrt_llm: version, such as `1.2.1`.
        sm: GPU generation, such as 90 (see `gpu_generation`).
    """

    runtime: str
    architecture: str | None = None
    tensorrt_llm: str | None = None
    sm: int | None = None


@dataclass(frozen=True)
class Refusal:
    """Why something does not run, and what does: each alternative is a request and a target that is not refused."""

    cause: str
    fix: str
    alternatives: tuple[tuple[Quantization, Target], ...]


def gpu_generation(text: str) -> int:
    """The SM number of a GPU: from a name such as `H100` or `NVIDIA A100-SXM4-80GB`, or from `sm90`, `9.0` or `90`.

    Raises:
        InputError: no known GPU.
    """
    plain = " ".join(re.findall(r"[A-Z0-9.]+", text.upper()))
    number = re.fullmatch(r"(?:SM ?)?(\d{1,2})\.?(\d)A?", plain)
    if number and int(number[1] + number[2]) >= min(GPUS):
        return int(number[1] + number[2])
    # The longest name decides: `RTX 5000 Ada` and `Quadro RTX 5000` are no RTX 50.
    found = [(len(match[0]), sm) for sm, names in GPUS.items() if (match := re.search(rf"\b(?:{names})(?!\d)", plain))]
    if not found:
        raise InputError(f"no known GPU '{printable(text)}'", "give its compute capability, such as sm90 or 9.0")
    return max(found)[1]


def check_support(q: Quantization, target: Target) -> None:
    """Whether a request runs on a target.

    Raises:
        InputError: it does not, or nothing says so; the fix names what does.
    """
    if found := refusal(q, target):
        raise InputError(found.cause, found.fix)


def refusal(q: Quantization, target: Target) -> Refusal | None:
    """Why a request does not run on a target, with what does; None if it runs.

    Raises:
        InputError: the runtime takes no quantised checkpoint, or no family has that class name.
    """
    if target.runtime not in RUNTIMES:
        cause = f"runtime '{printable(target.runtime)}' takes no quantised checkpoint of trtkit's"
        raise InputError(cause, f"use {_or(RUNTIMES)}")
    cause = _problem(q, target)
    if not cause:
        return None
    found = _alternatives(q, target)
    fix = "; or ".join(found)
    return Refusal(cause, f"use {fix}", tuple(each for group in found.values() for each in group))


def supported(q: Quantization, target: Target) -> bool:
    """Whether `check_support` lets it through."""
    return refusal(q, target) is None


def describe() -> list[dict[str, str]]:
    """A row per format, for a table: what it is, and where it runs since which TensorRT-LLM."""
    return [
        {
            "format": form.name,
            "algorithm": form.quant_algo,
            "weights": form.weights,
            "inputs": form.inputs,
            "calibration": "yes" if form.calibrated else "no",
            **{runtime: _where(form.name, runtime) for runtime in (ENGINE, LLMAPI)},
            REFERENCE: "CPU",
        }
        for form in FORMATS.values()
    ]


def _where(name: str, runtime: str) -> str:
    rows = sorted(
        (row for row in ROWS if row.runtime == runtime and name in row.names and row.before == _NEVER),
        key=lambda row: row.sms,
    )
    places = []
    for row in rows:
        sms = ", ".join(f"SM{sm}" for sm in row.sms)
        places.append(f"{sms} (from {_text(row.since)})" if row.since > (0, 0) else sms)
    return "; ".join(places) or "no"


def _problem(q: Quantization, target: Target) -> str:
    """Why it does not run; empty if it does."""
    version = _version(target.tensorrt_llm)
    if target.runtime == REFERENCE or not (q.format or q.kv_cache):
        return ""
    if target.runtime == ENGINE and version and version >= _NO_ENGINES:
        return f"TensorRT-LLM {target.tensorrt_llm} builds no engines"
    names = [*q.formats, *([f"{q.kv_cache.upper()} KV cache"] if q.kv_cache else [])]
    problems = [_row_problem(name, target, version) for name in names]
    if q.mixed:
        problems.append(_mixed_problem(q, target, version))
        names.append(_MIXED)
    problems += [_limit_problem(name, target, version) for name in names]
    return next(filter(None, problems), "")


def _row_problem(name: str, target: Target, version: Version | None) -> str:
    rows = [row for row in ROWS if row.runtime == target.runtime and name in row.names]
    if not rows:
        return f"runtime {target.runtime} has no {name}"
    rows = [row for row in rows if target.sm is None or target.sm in row.sms]
    if not rows:
        return f"{name} does not run on SM{target.sm} with runtime {target.runtime}"
    if version is None or any(row.since <= version < row.before for row in rows):
        return ""
    since = min(row.since for row in rows)
    limit = f"needs {_text(since)} or newer" if version < since else f"ended before {_text(rows[-1].before)}"
    on = f" on SM{target.sm}" if target.sm else ""
    return f"{name}{on} with runtime {target.runtime} {limit}, but this is TensorRT-LLM {target.tensorrt_llm}"


def _mixed_problem(q: Quantization, target: Target, version: Version | None) -> str:
    if target.runtime == VLLM:
        return "vLLM reads no mixed precision of ModelOpt's"
    # R 0.15: "AutoQ (mixed precision)"; R 0.19: "mixed precision quantization support" of the PyTorch workflow.
    since = (0, 15) if target.runtime == ENGINE else (0, 19)
    if version and version < since:
        return f"mixed precision needs {_text(since)}, but this is {target.tensorrt_llm}"
    forms = [get(name) for name in q.formats]
    if target.runtime == ENGINE and any(form.weight_only for form in forms) and any(form.group_sizes for form in forms):
        # B: it switches on the plugin for groups or the one for output channels, never both.
        return f"one engine cannot hold weights with groups beside weights without: {', '.join(q.formats)}"
    return ""


def _limit_problem(name: str, target: Target, version: Version | None) -> str:
    for limit in LIMITS:
        if limit.runtime != target.runtime or name not in limit.names or target.architecture is None:
            continue
        experts = architectures.get(target.architecture).has_experts
        applies = target.architecture not in limit.families if limit.families else experts
        if applies and (version or _NEWEST) < limit.before:
            return f"{name} for {target.architecture}: {limit.why}"
    return ""


Alternatives = dict[str, list[tuple[Quantization, Target]]]
"""What to use instead, in words -> the requests and targets that these words stand for."""


def _alternatives(q: Quantization, target: Target) -> Alternatives:
    """What runs instead: other formats or KV caches there, another release or GPU; another runtime if none of these."""
    found: Alternatives = {}

    def offer(words: str, runs: list[tuple[Quantization, Target]]) -> None:
        if runs:
            found[words] = runs

    bits = FORMATS[q.format].bits if q.format else 16
    near = sorted(FORMATS.values(), key=lambda form: abs(form.bits - bits))
    formats = [Quantization(form.name, kv_cache=q.kv_cache) for form in near if not form.import_only and q.format]
    formats = [other for other in formats if other != q and not _problem(other, target)]
    offer(_or([str(other.format) for other in formats]), [(other, target) for other in formats])
    for kv_cache, words in (("fp8", "an FP8 KV cache"), (None, "a KV cache in the model's dtype")):
        other = replace(q, kv_cache=kv_cache)  # type: ignore[arg-type]
        if q.kv_cache and other != q and not _problem(other, target):
            offer(words, [(other, target)])
    if target.tensorrt_llm:
        for release in releases.load():
            there = replace(target, tensorrt_llm=release.tensorrt_llm)
            if not _problem(q, there):
                offer(f"release {release.tag} (TensorRT-LLM {release.tensorrt_llm})", [(q, there)])
                break
    if target.sm:
        gpus = [there for sm in GPUS if not _problem(q, there := replace(target, sm=sm))]
        offer(f"a GPU of {_or([f'SM{there.sm}' for there in gpus])}", [(q, there) for there in gpus])
    for runtime in RUNTIMES:
        there = replace(target, runtime=runtime)
        if not found and not _problem(q, there):
            offer(f"runtime {runtime}", [(q, there)])
    return found


def _or(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def _version(text: str | None) -> Version | None:
    numbers = re.match(r"(\d+)\.(\d+)", text or "")
    if text and not numbers:
        raise InputError(f"'{printable(text)}' is no version of TensorRT-LLM", "give one such as 1.2.1")
    return (int(numbers[1]), int(numbers[2])) if numbers else None


def _text(version: Version) -> str:
    return f"TensorRT-LLM {version[0]}.{version[1]}"
