"""Quantised conversion from beginning to end: refuse early, calibrate, convert, measure what it cost.

Joins `trtkit.convert`, `trtkit.quantize` and `trtkit.evaluate` for the command line and for builds.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtkit.convert.conversion import ACCURACY, Conversion, Options, WriteRanks, check_target, convert, write_checkpoint
from trtkit.convert.plan import Plan, checkpoint_quantization
from trtkit.convert.quantization import KVCache, Quantization
from trtkit.convert.source import Layout, plan_conversion
from trtkit.convert.support import Target, check_support, gpu_generation
from trtkit.errors import missing_extra
from trtkit.hf import Source, open_source

if TYPE_CHECKING:
    from trtkit.quantize.calibration import Calibration
    from trtkit.quantize.import_linears import Account
    from trtkit.quantize.importing import Import
    from trtkit.quantize.mixture import Choice

OnStep = Callable[[str, str, int, int], None]
"""Told what is going on, in which unit (`bytes`, `layers`), and how much of it is done of how much."""

EVALUATION_SAMPLES = 64
CHOICE_TOKENS = 4096
"""Held-out tokens that formats are chosen by."""


@dataclass(frozen=True)
class Settings:
    """How a quantised conversion is carried out, beside what its plan says.

    Attributes:
        text, samples, length, seed: the calibration text (see `trtkit.quantize.calibration.load_tokens`).
        device: where layers run.
        accuracy: measure what quantisation cost.
        held_out: text for that; None is the built-in one.
        thorough: let later layers see, and mend, what the quantisation of earlier ones does; it takes twice the time.
    """

    text: str | None = None
    samples: int | None = None
    length: int | None = None
    seed: int = 0
    device: str = "cpu"
    accuracy: bool = True
    held_out: str | None = None
    thorough: bool = False


def check_runs(
    quantization: Quantization,
    architecture: str,
    *,
    runtime: str = "tensorrtllm",
    tensorrt_llm: str | None = None,
    gpu: str | None = None,
) -> None:
    """Whether what is asked for runs where it shall: told before any work.

    Raises:
        InputError: it does not; says what does.
    """
    sm = gpu_generation(gpu) if gpu else None
    check_support(quantization, Target(runtime, architecture, tensorrt_llm, sm))


@dataclass(frozen=True)
class Work:
    """What a quantised conversion needs beside plan and source.

    Attributes:
        write: makes and writes the ranks.
        options: those of the conversion, with what identifies the calibration.
        calibration: the text; None where the format needs none.
        device: where layers run.
        measure: called with the finished folder before it is published.
    """

    write: WriteRanks | None
    options: Options
    calibration: Calibration | None
    device: str
    measure: Callable[[Path], None]


def _check_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise missing_extra("torch", "torch") from None


def _calibration(source: Source, settings: Settings) -> Calibration:
    from trtkit.quantize.calibration import load_tokens

    return load_tokens(source.path, settings.text, samples=settings.samples, length=settings.length, seed=settings.seed)


def prepare(plan: Plan, source: Source, settings: Settings, options: Options, on_step: OnStep) -> Work:
    """Loads the texts, so that one that is too short is told before any work.

    Raises:
        InputError: a text is missing or too short, or the device is none.
        LacksError: torch is not installed.
    """
    quantization = checkpoint_quantization(plan.config)
    _check_torch()
    from trtkit.accuracy import measure
    from trtkit.evaluate.models import usable_device
    from trtkit.quantize.calibration import load_tokens
    from trtkit.quantize.conversion import identity, quantizing
    from trtkit.quantize.fit import Effort

    device = str(usable_device(settings.device))
    write = calibration = None
    if quantization.makes_tensors:
        calibration = _calibration(source, settings) if quantization.needs_calibration else None
        effort = Effort(correct=settings.thorough)
        write = quantizing(
            calibration,
            effort=effort,
            device=device,
            on_layer=lambda done, total: on_step("quantising", "layers", done, total),
        )
        options = dataclasses.replace(options, quantization=identity(calibration, effort))
    held_out = None
    if settings.accuracy:
        held_out = load_tokens(
            source.path,
            settings.held_out,
            samples=None if str(settings.held_out).endswith(".npy") else EVALUATION_SAMPLES,
            held_out=True,
        )

    def measured(folder: Path) -> None:
        if held_out is not None:
            measure(
                source,
                folder,
                held_out,
                device=device,
                on_progress=lambda done, total: on_step("measuring the accuracy", "layers", done, total),
            )

    return Work(write, options, calibration, device, measured)


def convert_quantized(
    plan: Plan,
    source: Source,
    out: Path,
    settings: Settings,
    *,
    options: Options | None = None,
    replace: bool = False,
    on_step: OnStep = lambda what, unit, done, total: None,
) -> tuple[Conversion, dict[str, Any]]:
    """Like `trtkit.convert.conversion.convert`, for a plan with quantisation.

    Returns:
        what the conversion found, and the accuracy report (see `trtkit.accuracy`).
    """
    check_target(out, source, replace=replace)
    work = prepare(plan, source, settings, options or Options(), on_step)
    found = convert(
        plan,
        source,
        out,
        options=work.options,
        replace=replace,
        on_progress=lambda done, total: on_step("writing the ranks", "bytes", done, total) if done else None,
        write=work.write,
        on_written=work.measure,
    )
    return found, _report(out)


def write_quantized(
    plan: Plan,
    source: Source,
    folder: Path,
    settings: Settings,
    *,
    on_step: OnStep = lambda what, unit, done, total: None,
) -> dict[str, Any]:
    """The same into an existing folder that the caller publishes (see `write_checkpoint`); the accuracy report."""
    work = prepare(plan, source, settings, Options(), on_step)
    write_checkpoint(
        plan,
        source,
        folder,
        options=work.options,
        on_progress=lambda done, total: on_step("writing the ranks", "bytes", done, total) if done else None,
        write=work.write,
    )
    work.measure(folder)
    return _report(folder)


def choose_formats(
    source: Source,
    layout: Layout,
    settings: Settings,
    target: Target,
    target_bits: float,
    *,
    kv_cache: KVCache | None = None,
    on_step: OnStep = lambda what, unit, done, total: None,
) -> Choice:
    """Chooses a format for every linear by what it would do to the model's predictions.

    Args:
        layout: without quantisation.
        target: what cannot run there is not chosen.
        target_bits: average bits per weight of the layers' linears, scales included.

    Raises:
        InputError: the bits cannot be reached, or the model or the layout has no mixed precision.
        LacksError: torch is not installed.
    """
    plan = plan_conversion(source, layout)
    _check_torch()
    from trtkit.evaluate.models import usable_device
    from trtkit.quantize.calibration import load_tokens
    from trtkit.quantize.mixture import CANDIDATES, choose

    calibration = _calibration(source, settings)
    # Other windows than those that the accuracy is measured on.
    windows = max(1, CHOICE_TOKENS // calibration.length)
    held_out = load_tokens(
        source.path, samples=windows, length=calibration.length, seed=settings.seed + 1, held_out=True
    )
    with tempfile.TemporaryDirectory(prefix="trtkit-choice-") as folder:
        return choose(
            source,
            plan.config,
            calibration.tokens,
            held_out.tokens,
            CANDIDATES,
            target_bits,
            Path(folder),
            kv_cache=kv_cache,
            target=target,
            device=str(usable_device(settings.device)),
            on_layer=lambda done, total: on_step("trying formats", "layers", done, total),
        )


def export_quantized(
    plan: Plan,
    source: Source,
    out: Path,
    settings: Settings,
    *,
    options: Options | None = None,
    replace: bool = False,
    on_step: OnStep = lambda what, unit, done, total: None,
) -> dict[str, Any]:
    """A checkpoint in the Hugging Face layout for the `llmapi` runtime; the accuracy report, empty where its format is
    one that the runtime quantises itself when it loads."""
    from trtkit.quantize.huggingface import check_target as check_export
    from trtkit.quantize.huggingface import export

    check_export(out, source, replace=replace)
    how = _export_work(plan, source, settings, options or Options(), on_step)
    export(plan, source, out, replace=replace, **how)
    return _report(out)


def write_export(
    plan: Plan,
    source: Source,
    folder: Path,
    settings: Settings,
    *,
    on_step: OnStep = lambda what, unit, done, total: None,
) -> dict[str, Any]:
    """The same into an existing folder that the caller publishes; the accuracy report."""
    from trtkit.quantize.huggingface import export_into

    export_into(plan, source, folder, **_export_work(plan, source, settings, Options(), on_step))
    return _report(folder)


def _export_work(plan: Plan, source: Source, settings: Settings, options: Options, on_step: OnStep) -> dict[str, Any]:
    """Keyword arguments of `trtkit.quantize.huggingface.export_into`."""
    from trtkit.quantize.fit import Effort
    from trtkit.quantize.huggingface_layout import HuggingFaceLayout

    HuggingFaceLayout(plan.config)
    work = prepare(plan, source, settings, options, on_step)
    made = checkpoint_quantization(plan.config).makes_tensors

    def measured(folder: Path) -> None:
        """Measured through the TRT-LLM checkpoint that the written files are equal to."""
        if not (settings.accuracy and made):
            return
        with tempfile.TemporaryDirectory(prefix="accuracy-", dir=folder.parent) as temporary:
            checkpoint = Path(temporary) / "checkpoint"
            import_quantized(open_source(folder), checkpoint, Layout(), options=Options(checksum=False, sync=False))
            work.measure(checkpoint)
            shutil.copyfile(checkpoint / ACCURACY, folder / ACCURACY)

    return {
        "calibration": work.calibration,
        "effort": Effort(correct=settings.thorough),
        "device": work.device,
        "options": work.options,
        "on_layer": lambda done, total: on_step("quantising", "layers", done, total),
        "on_progress": lambda done, total: on_step("writing the files", "bytes", done, total) if done else None,
        "on_written": measured,
    }


def import_export(
    source: Source,
    out: Path,
    layout: Layout,
    *,
    requantize: bool = False,
    options: Options | None = None,
    replace: bool = False,
    on_step: OnStep = lambda what, unit, done, total: None,
) -> tuple[Import, Account]:
    """Like `import_quantized`, to the Hugging Face layout of the `llmapi` runtime."""
    from trtkit.quantize.huggingface import export
    from trtkit.quantize.import_linears import Account
    from trtkit.quantize.importing import identity, import_plan, make_layers

    found, account = import_plan(source, layout, requantize=requantize), Account()
    check_runs(found.quantization, source.architecture, runtime="llmapi")
    export(
        found.plan,
        source,
        out,
        options=dataclasses.replace(options or Options(), quantization=identity(found)),
        replace=replace,
        on_progress=lambda done, total: on_step("writing the files", "bytes", done, total) if done else None,
        make=lambda work: account.add(
            make_layers(
                found,
                source,
                work,
                on_layer=lambda done, total: on_step("reading the quantised weights", "layers", done, total),
            )
        ),
    )
    return found, account


def import_quantized(
    source: Source,
    out: Path,
    layout: Layout,
    *,
    gpu: str | None = None,
    requantize: bool = False,
    options: Options | None = None,
    replace: bool = False,
    on_step: OnStep = lambda what, unit, done, total: None,
) -> tuple[Import, Account]:
    """A checkpoint of a source that somebody else quantised; what was decided, and what of it is not exact.

    Raises:
        InputError: no checkpoint can hold it exactly; says what can be done instead.
    """
    from trtkit.quantize.import_linears import Account
    from trtkit.quantize.importing import identity, import_plan, importing

    found, account = import_plan(source, layout, gpu=gpu, requantize=requantize), Account()
    write = importing(
        found,
        on_layer=lambda done, total: on_step("reading the quantised weights", "layers", done, total),
        on_account=account.add,
    )
    convert(
        found.plan,
        source,
        out,
        options=dataclasses.replace(options or Options(), quantization=identity(found)),
        replace=replace,
        on_progress=lambda done, total: on_step("writing the ranks", "bytes", done, total) if done else None,
        write=write,
    )
    return found, account


def _report(folder: Path) -> dict[str, Any]:
    from trtkit.accuracy import read

    return read(folder)
