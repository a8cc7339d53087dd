"""Quantised checkpoints of ours with the scales of NVIDIA ModelOpt's, which then must not differ from its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from trtkit import hf
from trtkit.convert.linears import linears
from trtkit.convert.number_formats import pack_int4
from trtkit.convert.plan import checkpoint_quantization
from trtkit.convert.quantization import Format
from trtkit.convert.whole import SourceReader, gather
from trtkit.quantize import awq, smoothquant
from trtkit.quantize.fit import to_float8
from trtkit.quantize.layer_files import layer_entries, write_layer
from trtkit.safetensors_io import TensorEntry

Array = npt.NDArray[Any]
ABSENT, ANY = "absent", "any value"

CONFIGS = {
    "int4_awq": "INT4_AWQ_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_rowwise": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
}
"""Our format -> ModelOpt's configuration."""

DECODER_TYPES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen", "GemmaForCausalLM": "gemma"}
"""Hugging Face class name -> ModelOpt's name for the family."""


@dataclass(frozen=True)
class Case:
    """One model, quantised once.

    Attributes:
        kv_cache: `FP8` or `INT8`.
        dtype: of the saved model.
    """

    architecture: str
    form: str
    group: int | None = None
    kv_cache: str | None = None
    dtype: str = "float32"

    def __str__(self) -> str:
        parts = (
            self.architecture.removesuffix("ForCausalLM").lower(),
            self.form,
            self.group,
            self.kv_cache,
            self.dtype,
        )
        return "-".join(str(part) for part in parts if part)

    @property
    def source(self) -> str:
        """Name of the folder of the model."""
        return f"{self.architecture}-{self.dtype}"

    @property
    def factors(self) -> bool:
        """Whether inputs are multiplied with something."""
        return self.form != "fp8"


@dataclass(frozen=True)
class Allowed:
    """A difference that is meant to be, in the spelling of `differing`; placeholders stand for each rank and layer."""

    key: str
    ours: Any
    theirs: Any
    reason: str
    when: Callable[[Case], bool] = field(default=lambda case: True)


def with_scales(form: Format, weight: torch.Tensor, scales: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors of a linear whose scales are known, each value rounded to its nearest.

    Args:
        weight: (N, K) float32.
        scales: all tensors of the linear but its weight, by suffix, float32.

    Returns:
        Suffix -> tensor, as of `quantize_linears`.
    """
    factors = scales.get("prequant_scaling_factor")
    scaled = weight if factors is None else weight * (1 / torch.from_numpy(factors))
    steps = torch.from_numpy(scales.get("weights_scaling_factor", scales.get("per_channel_scale")))
    if form.bits == 4:
        codes = pack_int4(awq.nearest_codes(scaled, steps).to(torch.int8).numpy())
    elif form.name == "int8_sq":
        codes = smoothquant.row_codes(scaled, steps).numpy()
    else:
        codes = to_float8(scaled / steps.view(-1, 1))
    return {"weight": codes, **scales}


def settings(architecture: str) -> dict[str, Any]:
    return {
        "architecture": architecture,
        "vocab_size": 192,  # a multiple of 64, to which ModelOpt pads others
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def run_modelopt(
    folder: Path, cases: list[Case], *, layouts: Mapping[int, str], huggingface: bool, one_scale: bool = False
) -> None:
    """Fills a folder with sources (see `Case.source`) and for each case `{case}-tp{n}`, `{case}-hf`, and
    `{case}.vectors`.

    Args:
        layouts: TP sizes of TRT-LLM exports -> dtype.
        one_scale: give modules that runtimes fuse the largest of their scales before the Hugging Face export.
    """
    jobs = [
        {
            "source": str(folder / source),
            "model": settings(source.split("-")[0]),
            "dtype": source.split("-")[1],
            "decoder_type": DECODER_TYPES[source.split("-")[0]],
            "quantizations": [
                {
                    "config": CONFIGS[case.form],
                    "group": case.group,
                    "kv_cache": case.kv_cache,
                    "one_scale": one_scale,
                    "trtllm": [
                        {"out": str(folder / f"{case}-tp{tp}"), "dtype": dtype, "tp": tp}
                        for tp, dtype in layouts.items()
                    ],
                    "huggingface": str(folder / f"{case}-hf") if huggingface else None,
                    "vectors": str(folder / f"{case}.vectors"),
                }
                for case in cases
                if case.source == source
            ],
        }
        for source in dict.fromkeys(case.source for case in cases)
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("quantized_modelopt.py")), str(folder / "jobs.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, f"needs the extra `peer`; or leave out with -m 'not peer'\n{done.stderr[-3000:]}"


def make_layers(
    config: Mapping[str, Any], source: hf.Source, scales: Mapping[str, Array], folder: Path
) -> dict[str, TensorEntry]:
    """The layers' files as `trtkit.quantize` makes them, from the source's weights and given scales.

    Args:
        scales: everything but the weights, float32, by the name in a TP 1 checkpoint.
    """
    quantization = checkpoint_quantization(config)
    made: dict[int, dict[str, Array]] = {layer: {} for layer in range(config["num_hidden_layers"])}
    with SourceReader(source, config) as reader:
        for linear in linears(config):
            form = quantization.format_of(linear.name)
            assert form is not None
            own = {
                name.removeprefix(f"{linear.name}."): values
                for name, values in scales.items()
                if name.startswith(f"{linear.name}.")
            }
            weight = torch.from_numpy(gather(reader.whole[f"{linear.name}.weight"], reader.read))
            for suffix, values in with_scales(form, weight, own).items():
                made[linear.layer][f"{linear.name}.{suffix}"] = values
            cache = f"transformer.layers.{linear.layer}.attention.kv_cache_scaling_factor"
            if cache in scales:
                made[linear.layer][cache] = scales[cache]
    folder.mkdir(parents=True)
    for layer, tensors in made.items():
        dtype = config["dtype"]
        # As `trtkit.quantize.pipeline` has it: what the checkpoint holds in the model's dtype, layers' files do too.
        rounded = {
            name: _as(values, dtype) if name.endswith(".prequant_scaling_factor") else values
            for name, values in tensors.items()
        }
        write_layer(folder, layer, rounded, None)
    return layer_entries(folder)


def _as(values: Array, dtype: str) -> Array:
    import ml_dtypes

    return values.astype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))


def read(file: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(file)


def mean(vectors: Mapping[str, torch.Tensor], modules: list[str]) -> Array:
    """One vector in place of several, as ModelOpt's exporters have it."""
    values: Array = torch.stack([vectors[module] for module in modules]).mean(dim=0).numpy()
    return values


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (
        ours.dtype == theirs.dtype
        and ours.shape == theirs.shape
        and torch.equal(ours.contiguous().view(-1).view(torch.uint8), theirs.contiguous().view(-1).view(torch.uint8))
    )


def describe(tensor: Any) -> Any:
    return tensor if tensor is ABSENT else f"{tensor.dtype} {list(tensor.shape)}, sum {tensor.double().sum():.6g}"


def differing(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> dict[str, tuple[Any, Any]]:
    """Tensors that are not the same in name, shape, dtype and bits -> descriptions of both."""
    found = {}
    for name in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(name, ABSENT), theirs.get(name, ABSENT)
        if isinstance(mine, str) or isinstance(other, str) or not same_bits(mine, other):
            found[name] = (describe(mine), describe(other))
    return found


def scales_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """The scales of a TRT-LLM export with TP 1, float32."""
    return {
        name: values.float().numpy().astype(np.float32)
        for name, values in tensors.items()
        if name.endswith("_factor") or name.endswith("_factor_2")
    }
