"""Has Model-Optimizer quantise and export a small model, and compares what we read with what it says itself.

A program of its own, since the package changes transformers when it is imported. Arguments: a folder, and JSON that
maps names of its configurations to its names of the formats. Writes found.json.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import transformers
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import from_quantized_weight, to_quantized_weight
from safetensors.torch import load_file

from trtkit.quantize import imports
from trtkit.safetensors_io import Reader, read_header

OWN_DEQUANTISATION = ("fp8", "int8_sq", "int8_wo")
"""The formats for which it has one."""


def export(folder: Path, config: str) -> None:
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings).to(torch.bfloat16)
    quantisation = copy.deepcopy(getattr(mtq, config))
    kv = mtq.utils.update_quant_cfg_with_kv_cache_quant(quantisation, mtq.FP8_KV_CFG["quant_cfg"])
    mtq.quantize(model, kv, lambda quantised: quantised(torch.arange(128)[None]))
    export_hf_checkpoint(model, export_dir=str(folder))


def compare(folder: Path, method: str) -> dict[str, Any]:
    scheme = imports.detect(json.loads((folder / "config.json").read_text()), folder)
    assert scheme is not None
    entries = read_header(folder / "model.safetensors")
    theirs = load_file(folder / "model.safetensors")
    modules = sorted(name.removesuffix(".weight") for name in entries if name.endswith(".weight"))
    algos, wrong, linears = set(), [], []
    with Reader() as reader:
        for module in modules:
            linear = imports.check(module, scheme, entries, reader)
            weight = imports.read(module, scheme, entries, reader)
            if linear is None or weight is None:
                continue
            linears.append(module)
            algos.add(linear.quant_algo)
            ours = torch.from_numpy(weight.dequantize())
            stored, scale = theirs[f"{module}.weight"], theirs[f"{module}.weight_scale"]
            packed = to_quantized_weight(ours, scale, method, None, linear.group_size)
            same = packed.dtype == stored.dtype and torch.equal(packed.view(torch.uint8), stored.view(torch.uint8))
            if method in OWN_DEQUANTISATION:
                same &= torch.equal(ours, from_quantized_weight(stored, scale, method, torch.float32))
            if not same:
                wrong.append(module)
        kv = [imports.read_kv_scales(f"model.layers.{i}.self_attn", scheme, entries, reader) for i in range(2)]
    return {
        "algos": sorted(str(algo) for algo in algos),
        "linears": len(linears),
        "wrong": wrong,
        "leftovers": imports.leftovers(scheme, entries, linears),
        "kv": sum(scales is not None and min(scales) > 0 for scales in kv),
    }


def main(folder: Path, methods: dict[str, str]) -> None:
    found = {}
    for config, method in methods.items():
        export(folder / config, config)
        found[config] = compare(folder / config, method)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
