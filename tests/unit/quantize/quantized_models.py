"""Whole models in the formats of those who quantise them, for tests: random codes and scales, and what they stand for.

The packings are those of the test modules of each format, which write them the way their tools describe them. Values
are (code - zero) * scale in float32, worked out here from the numbers that went into the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import test_imports_autoawq as autoawq
import test_imports_compressed_tensors as compressed
import test_imports_gptq as gptq
import test_imports_modelopt as modelopt
import torch
import transformers
from quantized_files import Array, values

from trtkit import architectures, hf
from trtkit.architectures.rules import Weight
from trtkit.convert.linears import is_linear
from trtkit.convert.source import source_tensors
from trtkit.safetensors_io import Reader, TensorSpec, Writer

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)

LLAMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip

Linear = Callable[[np.random.Generator, int, int, str], tuple[dict[str, Array], Array]]
"""(random, outputs, inputs, name of the weight) -> suffix -> tensor, and the values (outputs, inputs) in float32."""


@dataclass(frozen=True)
class Format:
    """One way to quantise.

    Attributes:
        config: `quantization_config` of config.json.
        linear: makes the tensors of a linear.
        attention: further tensors of an attention module, by suffix.
    """

    config: Mapping[str, Any]
    linear: Linear
    attention: Mapping[str, Array] = field(default_factory=dict)


def tidy(random: np.random.Generator, *shape: int) -> Array:
    """Scales that every dtype holds, also times a small whole number."""
    return (random.integers(1, 8, shape) / 1024).astype(np.float32)


def awq(group: int = 64, scales: Callable[..., Array] = tidy) -> Format:
    def linear(random: np.random.Generator, outputs: int, inputs: int, name: str) -> tuple[dict[str, Array], Array]:
        made = autoawq.sample(outputs, inputs, group, seed=int(random.integers(1 << 31)))
        made["scales"] = scales(random, *made["scales"].shape).astype(np.float16)
        return autoawq.tensors(made), values(made["codes"], made["zeros"], made["scales"], group)

    return Format({**autoawq.CONFIG, "group_size": group}, linear)


def gptq_of(
    group: int | None = 128,
    *,
    sym: bool = True,
    packing: str = "gptq",
    bits: int = 4,
    scales: Callable[..., Array] = tidy,
) -> Format:
    """Groups of None are whole rows."""

    def linear(random: np.random.Generator, outputs: int, inputs: int, name: str) -> tuple[dict[str, Array], Array]:
        size, less = group or inputs, int(packing == "gptq")
        made = gptq.sample(outputs, inputs, size, bits, low=1, seed=int(random.integers(1 << 31)))
        made["scales"] = scales(random, *made["scales"].shape).astype(np.float16)
        if sym:
            made["zeros"][:] = 1 << (bits - 1)
        return gptq.tensors(made, bits, less), values(made["codes"], made["zeros"], made["scales"], size)

    config = {**gptq.CONFIG, "bits": bits, "sym": sym, "group_size": group or -1, "checkpoint_format": packing}
    return Format(config, linear)


def packed(group: int | None = 128, *, symmetric: bool = True, bits: int = 4) -> Format:
    """compressed-tensors, pack-quantized."""

    def linear(random: np.random.Generator, outputs: int, inputs: int, name: str) -> tuple[dict[str, Array], Array]:
        size = group or inputs
        made = compressed.integers(outputs, inputs, size, bits, "bfloat16", int(random.integers(1 << 31)))
        made["scales"] = tidy(random, *made["scales"].shape).astype(ml_dtypes.bfloat16)
        zeros = 0 if symmetric else made["zeros"]
        files = compressed.pack_quantized(made, bits, symmetric=symmetric)
        return files, values(made["codes"], zeros, made["scales"], size)

    weights = {**compressed.WEIGHTS, "num_bits": bits, "symmetric": symmetric}
    weights |= {"group_size": group} if group else {"strategy": "channel", "group_size": None}
    return Format(compressed.config("pack-quantized", weights), linear)


def int8(*, static: bool = False, per_tensor: bool = False) -> Format:
    """compressed-tensors, int-quantized with quantised inputs."""

    def linear(random: np.random.Generator, outputs: int, inputs: int, name: str) -> tuple[dict[str, Array], Array]:
        codes = random.integers(-128, 128, (outputs, inputs), np.int8)
        scales = random.uniform(1e-4, 0.2, (1, 1) if per_tensor else (outputs, 1)).astype(ml_dtypes.bfloat16)
        files = {"weight": codes, "weight_scale": scales[0] if per_tensor else scales}
        if static:
            files["input_scale"] = np.array([0.037], np.float32).astype(ml_dtypes.bfloat16)
        return files, values(codes, 0, np.broadcast_to(scales, (outputs, 1)), inputs)

    weights = compressed.TENSOR if per_tensor else compressed.INT8
    return Format(
        compressed.config("int-quantized", weights, compressed.TENSOR if static else compressed.TOKEN), linear
    )


def scale_of(name: str) -> np.float32:
    """One that query, key and value share, as do up and gate where they are fused; every layer has another."""
    return np.float32(0.013 + 0.001 * int(next(part for part in name.split(".") if part.isdigit())))


def float8(*, dynamic: bool = False, kv: bool = False, scale: Callable[[str], np.float32] = scale_of) -> Format:
    """compressed-tensors, float-quantized: one scale for weights and inputs, or one per row and per token."""

    def linear(random: np.random.Generator, outputs: int, inputs: int, name: str) -> tuple[dict[str, Array], Array]:
        stored = random.normal(0, 100, (outputs, inputs)).clip(-448, 448).astype(FLOAT8)
        if dynamic:
            scales = random.uniform(1e-4, 0.2, (outputs, 1)).astype(ml_dtypes.bfloat16)
            return {"weight": stored, "weight_scale": scales}, stored.astype(np.float32) * scales.astype(np.float32)
        files = {"weight": stored, "weight_scale": np.array([scale(name)]), "input_scale": np.array([0.5], np.float32)}
        return files, stored.astype(np.float32) * scale(name)

    typed: dict[str, Any] = {"type": "float"}
    weights = compressed.FP8 if dynamic else compressed.TENSOR | typed
    inputs = (compressed.TOKEN if dynamic else compressed.TENSOR) | typed
    cache = {"kv_cache_scheme": compressed.TENSOR | typed} if kv else {}
    scales = {"k_scale": np.array([0.25], np.float32), "v_scale": np.array([0.375], np.float32)} if kv else {}
    return Format(compressed.config("float-quantized", weights, inputs, **cache), linear, scales)


def modelopt_int4(*, folded: bool = True, inputs_too: bool = False) -> Format:
    """Model-Optimizer's INT4 AWQ or W4A8; if `folded`, with factors for inputs that have no norm before them."""

    def linear(random: np.random.Generator, outputs: int, inputs: int, name: str) -> tuple[dict[str, Array], Array]:
        codes = random.integers(-8, 8, (outputs, inputs), np.int8)
        scales = np.exp2(random.integers(-9, -5, (outputs, inputs // 128))).astype(np.float32)
        files = {"weight": modelopt.packed(codes), "weight_scale": scales}
        expected = values(codes, 0, scales, 128)
        if folded and ("o_proj" in name or "down_proj" in name):
            factors = random.uniform(0.1, 2, inputs).astype(ml_dtypes.bfloat16)
            files["pre_quant_scale"] = factors
            expected = expected * factors.astype(np.float32)
        if inputs_too:
            files |= {"input_scale": np.float32(0.25), "weight_scale_2": np.float32(0.125)}
        return files, expected

    return Format(modelopt.config("W4A8_AWQ" if inputs_too else "W4A16_AWQ"), linear)


def modelopt_int8(smooth: bool = True) -> Format:
    """Model-Optimizer's SmoothQuant: factors for the inputs of every linear; query, key and value have the same."""

    def linear(random: np.random.Generator, outputs: int, inputs: int, name: str) -> tuple[dict[str, Array], Array]:
        codes = random.integers(-128, 128, (outputs, inputs), np.int8)
        scales = random.uniform(1e-4, 0.2, (outputs, 1)).astype(np.float32)
        files = {"weight": codes, "weight_scale": scales[:, 0]}
        expected = values(codes, 0, scales, inputs)
        if smooth:
            factors = np.linspace(0.1, 2, inputs).astype(ml_dtypes.bfloat16)
            files |= {"input_scale": np.float32(0.0625), "pre_quant_scale": factors}
            expected = expected * factors.astype(np.float32)
        return files, expected

    return Format(modelopt.config("W8A8_SQ_PER_CHANNEL" if smooth else "W8A16"), linear)


def modelopt_float8(*, rows: bool = False, kv: bool = False) -> Format:
    def linear(random: np.random.Generator, outputs: int, inputs: int, name: str) -> tuple[dict[str, Array], Array]:
        stored = random.normal(0, 100, (outputs, inputs)).clip(-448, 448).astype(FLOAT8)
        if rows:
            scales = random.uniform(1e-4, 0.2, outputs).astype(np.float32)
            return {"weight": stored, "weight_scale": scales}, stored.astype(np.float32) * scales[:, None]
        files = {"weight": stored, "weight_scale": scale_of(name), "input_scale": np.float32(0.5)}
        return files, stored.astype(np.float32) * scale_of(name)

    algo = "FP8_PER_CHANNEL_PER_TOKEN" if rows else "FP8"
    cache = {"kv_cache_quant_algo": "FP8"} if kv else {}
    scales = {"k_proj.k_scale": np.float32(1.5), "v_proj.v_scale": np.float32(1.25)} if kv else {}
    return Format(modelopt.config(algo, **cache), linear, scales)


Skip = Callable[[str], bool]


def make(
    folder: Path,
    quantised: Format,
    model_type: str = "llama",
    settings: Mapping[str, Any] = LLAMA,
    *,
    dtype: str = "bfloat16",
    skip: Skip = lambda name: False,
    change: Callable[[dict[str, Array]], None] = lambda tensors: None,
    **config: Any,
) -> dict[str, Array]:
    """Writes a random model whose linears within layers are quantised; the names of its weights -> float32 values of
    those (as the source orders their axes).

    Args:
        skip: whether a linear's weight, by name, stays plain.
        change: is given all tensors before they are written.
        config: further keys of config.json.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = transformers.AutoConfig.for_model(model_type, **settings)
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    plain = hf.open_source(folder)
    with Reader() as reader:
        tensors = {name: reader.tensor(entry) for name, entry in source_tensors(plain).items()}
    random = np.random.default_rng(1)
    expected: dict[str, Array] = {}
    for name, transposed in linear_weights(plain):
        if skip(name):
            continue
        weight = tensors.pop(name)
        outputs, inputs = weight.shape[::-1] if transposed else weight.shape
        files, wanted = quantised.linear(random, outputs, inputs, name)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{suffix}": np.asarray(value) for suffix, value in files.items()}
        expected[name] = wanted.T if transposed else wanted
        if module.endswith("k_proj"):
            attention = module.rpartition(".")[0]
            tensors |= {f"{attention}.{suffix}": np.asarray(value) for suffix, value in quantised.attention.items()}
    change(tensors)
    write(folder, tensors)
    stored = json.loads((folder / "config.json").read_text())
    stored |= {"quantization_config": dict(quantised.config), **config}
    (folder / "config.json").write_text(json.dumps(stored))
    return expected


def write(folder: Path, tensors: Mapping[str, Array]) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    writer = Writer(
        folder / "model.safetensors", [TensorSpec(name, value.dtype, value.shape) for name, value in tensors.items()]
    )
    for name, value in tensors.items():
        writer.write(name, 0, value)
    writer.close()


def linear_weights(plain: hf.Source) -> list[tuple[str, bool]]:
    """The weights of a source's linears within layers, and whether it stores them (inputs, outputs)."""
    architecture = architectures.get(plain.architecture)
    config = architecture.checkpoint_config(plain.config)
    experts = range(config["moe"]["num_experts"]) if architecture.has_experts else [0]

    def wanted(weight: Weight) -> bool:
        return is_linear(weight) and weight.when(config)

    found = {
        part.source.format(layer=layer, expert=expert): part.transposed
        for layer in range(config["num_hidden_layers"])
        for weight in filter(wanted, architecture.weights)
        for part in weight.parts
        for expert in experts
    }
    return list(found.items())
