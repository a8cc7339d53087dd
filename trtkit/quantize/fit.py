"""From a weight and what is known of its inputs to the tensors that stand for it in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trtkit.convert.cast import Array
from trtkit.convert.linears import SMOOTHERS, Linear
from trtkit.convert.number_formats import FLOAT8, FLOAT8_MAX, pack_int4
from trtkit.convert.quantization import Format
from trtkit.quantize import awq, smoothquant
from trtkit.quantize.statistics import InputStatistics

FLOAT8_FLOOR = 1 / (FLOAT8_MAX * 512)
"""Smallest scale of FP8 rowwise (tensorrt_llm/models/llama/convert.py, fp8_per_channel_quant_weight_gpu)."""


@dataclass(frozen=True)
class Effort:
    """How weights are fitted.

    Attributes:
        factors: search factors per input (AWQ formats; SmoothQuant always does).
        compensate: compensate the error of rounding.
        correct: let later layers see what the quantised earlier ones give them, and aim at the outputs of the
            unquantised model all the same. It takes twice the time.
    """

    factors: bool = True
    compensate: bool = True
    correct: bool = False


def needs_gram(form: Format) -> bool:
    return form.bits == 4 or form.name.startswith("int8_sq")


def quantize_linears(
    form: Format,
    group: int | None,
    linears: Sequence[Linear],
    weights: Sequence[torch.Tensor],
    statistics: InputStatistics | None,
    dtype: torch.dtype,
    effort: Effort,
) -> list[dict[str, Array]]:
    """The tensors of linears that share their inputs, and with them factors and scales where the layout or a kernel
    that fuses them wants one.

    Args:
        weights: (N, K) or (experts, N, K) float32, of each linear.
        statistics: of their inputs; None for formats that need none.
        dtype: that of the model.

    Returns:
        Suffix -> tensor, for each linear.
    """
    rows = [weight.reshape(-1, weight.shape[-1]) for weight in weights]  # experts: all rows together
    joined = torch.cat(rows) if len(rows) > 1 else rows[0]
    if form.name == "fp8_rowwise":
        made = _rowwise(joined)
    elif statistics is None:
        raise ValueError(f"{form.name} needs statistics of the inputs")
    elif form.name in ("int4_awq", "w4a8_awq"):
        made = _int4(form, group or 128, joined, statistics, dtype, effort)
    elif form.name in ("int8_sq", "int8_sq_plugin"):
        made = _int8(form, linears[0].kind, joined, statistics, dtype, effort)
    else:
        made = _float8(joined, statistics, linears[0].experts)
    if linears[0].experts:
        return [_by_expert(made, linears[0].experts)]
    sizes = [linear.rows for linear in linears]
    return [_rows(form, made, start, size) for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False)]


def _int4(
    form: Format, group: int, weight: torch.Tensor, statistics: InputStatistics, dtype: torch.dtype, effort: Effort
) -> dict[str, Array]:
    fitted = awq.fit(
        weight,
        statistics.gram,
        statistics.mean_magnitude,
        group,
        dtype,
        cross=statistics.cross if effort.correct else None,
        factors=effort.factors,
        compensate=effort.compensate,
    )
    prequant = _prequant(fitted.factors, dtype)
    made = {
        "weight": pack_int4(fitted.codes.cpu().numpy()),
        "weights_scaling_factor": fitted.scales.cpu().numpy(),
        "prequant_scaling_factor": prequant.cpu().numpy(),
    }
    if form.name == "w4a8_awq":
        made["activation_scaling_factor"] = _scale(statistics.largest * prequant, FLOAT8_MAX)
        made["weights_scaling_factor_2"] = _scale(fitted.weight() * fitted.factors, FLOAT8_MAX)
    return made


def _int8(
    form: Format, kind: str, weight: torch.Tensor, statistics: InputStatistics, dtype: torch.dtype, effort: Effort
) -> dict[str, Array]:
    plugin = form.name == "int8_sq_plugin"
    factors = smoothquant.smoothing(weight, statistics, dtype=dtype, per_token=plugin)
    scaled = weight * factors
    scales = smoothquant.row_scales(scaled)
    if effort.compensate:
        rounding = awq.Compensation(statistics.gram, factors, -128, 127)
        codes = rounding.codes(scaled, scales[:, None])
    else:
        codes = smoothquant.row_codes(scaled, scales)
    made = {"weight": np.ascontiguousarray(codes.cpu().numpy())}
    if not plugin:
        made["weights_scaling_factor"] = scales.cpu().numpy()
        made["prequant_scaling_factor"] = _prequant(factors, dtype).cpu().numpy()
        made["activation_scaling_factor"] = _scale(statistics.largest / factors, smoothquant.LEVELS)
        return made
    made["per_channel_scale"] = scales.cpu().numpy()
    # Where a norm stands in front it takes the factors, elsewhere the network divides by them.
    made["smoother" if kind in SMOOTHERS else "_norm"] = factors.cpu().numpy()[None]
    return made


def _rowwise(weight: torch.Tensor) -> dict[str, Array]:
    scales = (weight.abs().amax(1) / FLOAT8_MAX).clamp_min(FLOAT8_FLOOR)
    return {"weight": to_float8(weight / scales[:, None]), "per_channel_scale": scales.cpu().numpy()}


def _float8(weight: torch.Tensor, statistics: InputStatistics, experts: int) -> dict[str, Array]:
    # A scale per expert, or one for all linears that a kernel fuses.
    parts = weight.chunk(experts) if experts else [weight]
    scales = [_scale(part, FLOAT8_MAX) for part in parts]
    return {
        "weight": np.concatenate(
            [to_float8(part / float(scale[0])) for part, scale in zip(parts, scales, strict=True)]
        ),
        "weights_scaling_factor": np.concatenate(scales),
        "activation_scaling_factor": _scale(statistics.largest, FLOAT8_MAX),
    }


def _prequant(factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of factors as the file will hold it (they were chosen so that it can), float32."""
    return (1 / factors).to(dtype).float()


def to_float8(values: torch.Tensor) -> Array:
    """float8 e4m3, to nearest; beyond its range its largest value."""
    rounded = values.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
    bits: Array = rounded.view(torch.uint8).cpu().numpy()
    return bits.view(FLOAT8)


def _scale(values: torch.Tensor, largest: float) -> Array:
    """What the largest magnitude is divided by to become `largest`: float32 (1,); 1 where all is zero."""
    found = float(values.abs().max())
    return np.array([found / largest if found > 0 else 1.0], np.float32)


def _by_expert(made: dict[str, Array], experts: int) -> dict[str, Array]:
    """Tensors of all experts' rows, stacked by expert."""
    shared = ("prequant_scaling_factor", "activation_scaling_factor", "weights_scaling_factor_2")
    return {
        suffix: values if suffix in shared else values.reshape(experts, len(values) // experts, *values.shape[1:])
        for suffix, values in made.items()
    }


def _rows(form: Format, made: dict[str, Array], start: int, size: int) -> dict[str, Array]:
    """The part of one linear out of tensors of several."""
    own = {}
    for suffix, values in made.items():
        step = 2 if suffix == "weight" and form.bits == 4 else 1
        along_rows = suffix in ("weight", "per_channel_scale") or (
            suffix == "weights_scaling_factor" and values.size > 1
        )
        own[suffix] = np.ascontiguousarray(values[start // step : (start + size) // step]) if along_rows else values
    if form.name == "int8_sq_plugin":
        own["per_channel_scale"] = own["per_channel_scale"][None]
    return own
