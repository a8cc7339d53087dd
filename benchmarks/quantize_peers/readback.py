"""What the written files of each format hold, as float32 weights and the arithmetic of their kernels around them.

Each reader returns the whole model under Hugging Face names. The readers are written from the formats alone and share
no code with the tools that wrote the files, nor with trtkit. Sources of the layouts: TensorRT-LLM, tensorrt_llm/models/
modeling_utils.py and quantization/functional.py; Model-Optimizer, modelopt/torch/export/quant_utils.py;
compressed-tensors, compressed_tensors/compressors; AutoAWQ, awq/utils/packing_utils.py.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

Tensor = torch.Tensor
Inputs = Literal["int8 tensor", "int8 token", "fp8 tensor", "fp8 token"]
INT8_MAX, FLOAT8_MAX = 127.0, 448.0


@dataclass
class Linear:
    """A quantised linear as its kernel computes it: (inputs * prequant), rounded as `inputs` says, times weight.

    Attributes:
        weight: float32 (N, K), dequantised.
        prequant: float32 (K,), or None for ones.
        inputs: how the kernel rounds the inputs: with one scale for the tensor or one per token; None leaves them.
        scale: of inputs with one scale (real = rounded * scale).
        limit: what inputs are clamped to before they are rounded.
    """

    weight: Tensor
    prequant: Tensor | None = None
    inputs: Inputs | None = None
    scale: float = 1.0
    limit: float | None = None

    def transform(self, x: Tensor) -> Tensor:
        """What the kernel multiplies the weight with, float32."""
        if self.prequant is not None:
            x = x * self.prequant
        if self.inputs is None:
            return x
        if self.limit is not None:
            x = x.clamp(-self.limit, self.limit)
        number, per = self.inputs.split()
        largest = INT8_MAX if number == "int8" else FLOAT8_MAX
        scale = (x.abs().amax(-1, keepdim=True) / largest).clamp(min=1e-12) if per == "token" else self.scale
        if number == "int8":
            return (x / scale).round().clamp(-128, 127) * scale
        return (x / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn).float() * scale


@dataclass
class Model:
    """A model read back: its linears by module name, every other weight by tensor name."""

    linears: dict[str, Linear] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def read(kind: str, folder: Path) -> Model:
    """The files of one format, as the scripts name it. Raises KeyError for another."""
    return READERS[kind](_load(folder), json.loads((folder / "config.json").read_text()))


def plain(tensors: dict[str, Tensor], config: dict[str, Any]) -> Model:
    """Hugging Face tensors without any quantisation."""
    del config
    return Model(tensors={name: tensor.float() for name, tensor in tensors.items()})


def trtllm(tensors: dict[str, Tensor], config: dict[str, Any]) -> Model:
    """A TRT-LLM checkpoint of the Llama family for one rank, whoever wrote it."""
    head = config.get("head_size") or config["hidden_size"] // config["num_attention_heads"]
    rows = [head * config["num_attention_heads"]] + 2 * [head * config["num_key_value_heads"]]
    model = Model()
    for theirs, name in (("vocab_embedding", "model.embed_tokens"), ("ln_f", "model.norm")):
        model.tensors[f"{name}.weight"] = tensors[f"transformer.{theirs}.weight"].float()
    model.tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    for index in range(config["num_hidden_layers"]):
        there, here = f"transformer.layers.{index}.", f"model.layers.{index}."
        for theirs, name in (("input_layernorm", "input_layernorm"), ("post_layernorm", "post_attention_layernorm")):
            model.tensors[f"{here}{name}.weight"] = tensors[f"{there}{theirs}.weight"].float()
        qkv = _trtllm_linear(tensors, f"{there}attention.qkv", config["quantization"])
        for name, weight in zip("qkv", qkv.weight.split(rows), strict=True):
            model.linears[f"{here}self_attn.{name}_proj"] = dataclasses.replace(qkv, weight=weight)
        for theirs, name in (
            ("attention.dense", "self_attn.o_proj"),
            ("mlp.fc", "mlp.gate_proj"),
            ("mlp.gate", "mlp.up_proj"),
            ("mlp.proj", "mlp.down_proj"),
        ):
            model.linears[f"{here}{name}"] = _trtllm_linear(tensors, f"{there}{theirs}", config["quantization"])
    return model


def _trtllm_linear(tensors: dict[str, Tensor], name: str, quantization: dict[str, Any]) -> Linear:
    weight, algo = tensors[f"{name}.weight"], quantization.get("quant_algo")
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    prequant = own["prequant_scaling_factor"].float() if "prequant_scaling_factor" in own else None
    scale = float(own["activation_scaling_factor"].float()) if "activation_scaling_factor" in own else 1.0
    if algo in ("W4A16_AWQ", "W4A8_AWQ"):
        values = _by_group(_nibbles_of_rows(weight), own["weights_scaling_factor"])
        return Linear(values, prequant, "fp8 tensor" if algo == "W4A8_AWQ" else None, scale)
    if algo == "W8A8_SQ_PER_CHANNEL":
        return Linear(_by_row(weight, own["weights_scaling_factor"]), prequant, "int8 tensor", scale)
    if algo == "FP8":
        return Linear(_by_row(weight, own["weights_scaling_factor"]), None, "fp8 tensor", scale)
    if "per_channel_scale" in own:  # its plugins, which find a scale for each token
        values = _by_row(weight, own["per_channel_scale"])
        if algo == "FP8_PER_CHANNEL_PER_TOKEN":
            limits = quantization.get("clamp_val")
            return Linear(values, None, "fp8 token", limit=limits[1] if limits else None)
        if algo == "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN":
            return Linear(values, 1 / own["smoother"].float().flatten() if "smoother" in own else None, "int8 token")
    if not weight.is_floating_point() or weight.dtype == torch.float8_e4m3fn:
        raise ValueError(f"{name} is {weight.dtype} under quant_algo {algo}")
    excluded = any(fnmatch.fnmatchcase(name, pattern) for pattern in quantization.get("exclude_modules") or ())
    weight_only = algo in ("W8A16", "W4A16") and not excluded
    return Linear(_as_the_engine_builder_rounds(weight, 8 if algo == "W8A16" else 4) if weight_only else weight.float())


def _as_the_engine_builder_rounds(weight: Tensor, bits: int) -> Tensor:
    """Weight-only checkpoints hold plain weights, which trtllm-build rounds: per output, half away from zero."""
    steps = 2 ** (bits - 1)
    scales = weight.float().abs().amax(1, keepdim=True) / steps
    ratio = weight.float() / scales.clamp(min=1e-30)
    codes = (ratio.sign() * (ratio.abs() + 0.5).floor()).clamp(-steps, steps - 1)
    return codes * scales.to(weight.dtype).float()


def modelopt(tensors: dict[str, Tensor], config: dict[str, Any]) -> Model:
    """ModelOpt's Hugging Face format."""
    algo = config["quantization_config"]["quant_algo"]
    model, taken = Model(), set()
    for key in [key for key in tensors if key.endswith(".weight_scale")]:
        name = key.removesuffix(".weight_scale")
        own = {part: tensors.get(f"{name}.{part}") for part in ("weight", "pre_quant_scale", "input_scale")}
        weight, scales, prequant = own["weight"], tensors[key].float(), own["pre_quant_scale"]
        assert weight is not None
        if algo in ("W4A16_AWQ", "W4A8_AWQ"):
            values = _by_group(_nibbles_of_rows(weight), scales)
        else:
            values = _by_row(weight, scales)
        inputs: dict[str, Inputs] = {
            "W4A8_AWQ": "fp8 tensor",
            "FP8": "fp8 tensor",
            "FP8_PER_CHANNEL_PER_TOKEN": "fp8 token",
            "W8A8_SQ_PER_CHANNEL": "int8 tensor",
        }
        scale = 1.0 if own["input_scale"] is None else float(own["input_scale"].float())
        smoothing = None if prequant is None else prequant.float()
        model.linears[name] = Linear(values, smoothing, inputs.get(algo), scale)
        taken |= {key for key in tensors if key.startswith(f"{name}.")}
    model.tensors = {name: tensor.float() for name, tensor in tensors.items() if name not in taken}
    return model


def compressed_tensors(tensors: dict[str, Tensor], config: dict[str, Any]) -> Model:
    """pack-quantized, int-quantized and float-quantized, with one scheme for all linears."""
    (scheme,) = config["quantization_config"]["config_groups"].values()
    activations = scheme["input_activations"]
    inputs: Inputs | None = None
    if activations:
        number = "int8" if activations["type"] == "int" else "fp8"
        inputs = f"{number} {activations['strategy']}"  # type: ignore[assignment]
    model, taken = Model(), set()
    for key in [key for key in tensors if key.endswith(".weight_scale")]:
        name = key.removesuffix(".weight_scale")
        scales = tensors[key].float()
        if f"{name}.weight_packed" in tensors:
            rows, columns = tensors[f"{name}.weight_shape"].tolist()
            codes = _words(tensors[f"{name}.weight_packed"]).reshape(rows, -1)[:, :columns]
            zeros = 8.0  # codes are stored without sign
            if f"{name}.weight_zero_point" in tensors:
                packed = tensors[f"{name}.weight_zero_point"]
                zeros = _words(packed.T.contiguous()).reshape(packed.shape[1], -1)[:, :rows].T.float()
                zeros = zeros.repeat_interleave(columns // scales.shape[1], 1)  # type: ignore[attr-defined]
            if f"{name}.weight_g_idx" in tensors:
                order = tensors[f"{name}.weight_g_idx"].long()
                values = (codes.float() - zeros) * scales[:, order]
            else:
                values = _by_group(codes.float() - zeros, scales)
        else:
            values = _by_row(tensors[f"{name}.weight"], scales)
        given = tensors.get(f"{name}.input_scale")
        model.linears[name] = Linear(values, None, inputs, 1.0 if given is None else float(given.float()))
        taken |= {key for key in tensors if key.startswith(f"{name}.")}
    model.tensors = {name: tensor.float() for name, tensor in tensors.items() if name not in taken}
    return model


def autoawq(tensors: dict[str, Tensor], config: dict[str, Any]) -> Model:
    """AutoAWQ's GEMM layout: transposed, eight outputs in a word in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    group = config["quantization_config"]["group_size"]
    model, taken = Model(), set()
    place = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # of output 0, 1, ... in the word
    for key in [key for key in tensors if key.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        codes, zeros = (_words(tensors[f"{name}.{part}"])[..., place].flatten(1) for part in ("qweight", "qzeros"))
        scales = tensors[f"{name}.scales"].float()
        values = (codes - zeros.repeat_interleave(group, 0)).float() * scales.repeat_interleave(group, 0)
        model.linears[name] = Linear(values.T.contiguous())
        taken |= {key for key in tensors if key.startswith(f"{name}.")}
    model.tensors = {name: tensor.float() for name, tensor in tensors.items() if name not in taken}
    return model


READERS: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Model]] = {
    "rounded": plain,
    "trtllm": trtllm,
    "modelopt": modelopt,
    "compressed-tensors": compressed_tensors,
    "autoawq": autoawq,
}


def _load(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


def _by_row(values: Tensor, scales: Tensor) -> Tensor:
    """float32 (N, K) from values (N, K) and scales, N of them or one, in any shape."""
    return values.float() * scales.float().reshape(-1, 1)


def _by_group(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 (N, K) from codes (N, K) and scales (N, groups)."""
    rows, columns = codes.shape
    return (codes.float().reshape(rows, scales.shape[1], -1) * scales.float()[:, :, None]).reshape(rows, columns)


def _nibbles_of_rows(packed: Tensor) -> Tensor:
    """Bytes (N/2, K) to signed codes (N, K): the even output in the low four bits, two's complement."""
    words = packed.view(torch.uint8).int()
    both = torch.stack([words & 15, words >> 4], dim=1)
    return torch.where(both > 7, both - 16, both).reshape(-1, packed.shape[1])


def _words(packed: Tensor) -> Tensor:
    """int32 (..., n) to its nibbles (..., n, 8), low ones first, without sign."""
    return (packed[..., None].long() >> torch.arange(0, 32, 4)) & 15
