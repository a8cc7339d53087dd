"""Run as a program: quantises random models with NVIDIA ModelOpt on the CPU and exports them, in both of its formats.

It is a process of its own because importing ModelOpt patches torch.

    python quantized_modelopt.py JOBS.json

JOBS.json is a list of `{"source", "model", "dtype", "decoder_type", "quantizations"}`: the folder to save the model in,
its `architecture` and config values, the dtype to save it in, ModelOpt's name for the family, and how to quantise it:
each `{"config", "group", "kv_cache", "trtllm", "huggingface", "one_scale", "vectors"}`, the name of ModelOpt's
configuration, the group size or null, `FP8`, `INT8` or null, the TRT-LLM exports to make, each `{"out", "dtype",
"tp"}`, the folder of the Hugging Face export or null, whether weights of FP8 that runtimes fuse get one scale before
it, and the file for the factors per input, which exports hold rounded or not at all.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import transformers
from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint
from modelopt_export import use_transformers_4_spelling
from safetensors.torch import save_file


def main(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        save(job)
        for quantization in job["quantizations"]:
            model = transformers.AutoModelForCausalLM.from_pretrained(job["source"], dtype=getattr(torch, job["dtype"]))
            model = quantize(model, quantization)
            vectors = {
                name.removesuffix(".input_quantizer._pre_quant_scale"): values.float().contiguous()
                for name, values in model.state_dict().items()
                if name.endswith("._pre_quant_scale")
            }
            save_file(vectors or {"none": torch.zeros(1)}, quantization["vectors"])
            for export in quantization["trtllm"]:
                whole = copy.deepcopy(model)  # exporting changes it
                use_transformers_4_spelling(vars(whole.config))
                with torch.inference_mode():
                    export_tensorrt_llm_checkpoint(
                        whole, job["decoder_type"], getattr(torch, export["dtype"]), export["out"],
                        inference_tensor_parallel=export["tp"],
                    )  # fmt: skip
            if quantization["huggingface"]:
                if quantization["one_scale"] and quantization["config"] == "FP8_DEFAULT_CFG":
                    share_scales(model)
                with torch.inference_mode():
                    export_hf_checkpoint(copy.deepcopy(model), export_dir=quantization["huggingface"])


def save(job: dict[str, Any]) -> None:
    """A random model with a few loud channels, so that there is something to smooth."""
    model_class = getattr(transformers, job["model"].pop("architecture"))
    model = model_class(model_class.config_class(**job["model"]))
    generator = torch.Generator().manual_seed(0)
    plus_one = "Gemma" in model_class.__name__
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + (parameter.ndim == 1 and not plus_one))
            if name.endswith("layernorm.weight"):
                parameter[::19] += 5
    model.to(getattr(torch, job["dtype"])).save_pretrained(job["source"])


def quantize(model: Any, wanted: dict[str, Any]) -> Any:
    settings = copy.deepcopy(getattr(mtq, wanted["config"]))
    if wanted["group"]:
        for entry in settings["quant_cfg"]:
            for each in entry.get("cfg", []) if isinstance(entry.get("cfg"), list) else [entry.get("cfg") or {}]:
                if "block_sizes" in each:
                    each["block_sizes"][-1] = wanted["group"]
    if wanted["kv_cache"]:
        cache = copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
        if wanted["kv_cache"] == "INT8":
            cache[0]["cfg"] = {"num_bits": 8, "axis": None}
        settings["quant_cfg"] = [*settings["quant_cfg"], *cache]
    tokens = torch.randint(0, model.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(1))
    return mtq.quantize(model, settings, lambda quantised: quantised(tokens))


def share_scales(model: Any) -> None:
    """Gives weights that runtimes fuse the largest of their scales."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for fused in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
            largest = max(module.weight_quantizer.amax for module in fused)
            for module in fused:
                module.weight_quantizer.amax = largest.clone()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    # It prints what it does on stdout.
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        main(json.loads(Path(sys.argv[1]).read_text()))
