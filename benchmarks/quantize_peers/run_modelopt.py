"""One quantisation by NVIDIA ModelOpt, written as a TRT-LLM checkpoint and as a Hugging Face checkpoint of its format.

ModelOpt fits one scale vector per linear and averages those of q, k and v when it exports, so what its files hold is
not what it has in memory; the benchmark reads the files.

    python run_modelopt.py --model DIR --tokens FILE.npy --method awq_lite --out DIR --report FILE.json
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import job
import numpy as np

warnings.simplefilter("ignore")  # ModelOpt warns of every optional package that is not there

import modelopt.torch.quantization as mtq  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import transformers.models.auto.modeling_auto  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402  # loaded late otherwise, and measured
from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint  # noqa: E402

METHODS: dict[str, tuple[str, Any]] = {  # the config it starts from, and the algorithm
    "rtn": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "max"),
    "awq_lite": ("INT4_AWQ_CFG", {"method": "awq_lite", "alpha_step": 0.1}),
    "awq_clip": ("INT4_AWQ_CFG", {"method": "awq_clip"}),
    "awq_full": ("INT4_AWQ_CFG", {"method": "awq_full", "alpha_step": 0.1}),
    "gptq": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"method": "gptq"}),
    "gptq_layerwise": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", {"method": "gptq", "layerwise": {"enable": True}}),
    "int8_sq": ("INT8_SMOOTHQUANT_CFG", "smoothquant"),
    "int8_sq_half": ("INT8_SMOOTHQUANT_CFG", {"method": "smoothquant", "alpha": 0.5}),
    "fp8": ("FP8_DEFAULT_CFG", "max"),
    "fp8_rowwise": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", "max"),
    "w4a8_awq": ("W4A8_AWQ_BETA_CFG", {"method": "awq_lite", "alpha_step": 0.1}),
}


def config(method: str, group: int) -> dict[str, Any]:
    name, algorithm = METHODS[method]
    settings = copy.deepcopy(getattr(mtq, name))
    settings["algorithm"] = algorithm
    for rule in settings["quant_cfg"]:
        cfgs = rule.get("cfg") or {}
        for cfg in cfgs if isinstance(cfgs, list) else [cfgs]:
            if cfg.get("block_sizes"):
                cfg["block_sizes"][-1] = group
    return settings


def use_transformers_4_spelling(settings: dict[str, Any]) -> None:
    """ModelOpt 0.47 looks for RoPE where transformers 4 had it."""
    settings["rope_theta"] = settings["rope_parameters"]["rope_theta"]
    settings["rope_scaling"] = None


def main() -> None:
    options = job.parse(__doc__, sorted(METHODS))
    torch.set_num_threads(1)
    work = job.Job(options, ("nvidia-modelopt", "torch", "transformers"))
    with work.stage("load"):
        dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
        tokens = torch.from_numpy(np.load(options.tokens))

    def calibrate(quantised: Any) -> None:
        with torch.inference_mode():
            for windows in tokens.split(options.batch):
                quantised(windows, use_cache=False)

    with work.stage("quantise"):
        mtq.quantize(model, config(options.method, options.group), calibrate)

    stored = json.loads((options.model / "config.json").read_text())
    half = torch.float16 if "float16" in (stored.get("dtype"), stored.get("torch_dtype")) else torch.bfloat16

    def write_trtllm(folder: Path) -> None:
        with torch.inference_mode():
            export_tensorrt_llm_checkpoint(model, "llama", half, folder, inference_tensor_parallel=1)

    use_transformers_4_spelling(vars(model.config))
    work.write_files("trtllm", write_trtllm)
    work.write_files("modelopt", lambda folder: export_hf_checkpoint(model, export_dir=folder))
    work.finish()


if __name__ == "__main__":
    main()
