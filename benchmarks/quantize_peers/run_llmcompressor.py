"""One quantisation by llm-compressor, written as a compressed-tensors checkpoint.

python run_llmcompressor.py --model DIR --tokens FILE.npy --method gptq --out DIR --report FILE.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import job
import numpy as np
import torch
import transformers
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # loaded late otherwise, and measured
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache

Recipe = Callable[[int], list[Any]]


def int4(group: int, *, symmetric: bool = True) -> dict[str, Any]:
    """What its scheme W4A16 says, with any group size."""
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group)
    return {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }


def preset(scheme: str) -> dict[str, Any]:
    return {"targets": ["Linear"], "scheme": scheme, "ignore": ["lm_head"]}


METHODS: dict[str, Recipe] = {
    "rtn": lambda group: [QuantizationModifier(**int4(group))],
    "awq": lambda group: [AWQModifier(), QuantizationModifier(**int4(group))],
    "awq_asym": lambda group: [AWQModifier(), QuantizationModifier(**int4(group, symmetric=False))],
    "gptq": lambda group: [GPTQModifier(**int4(group))],
    "awq_gptq": lambda group: [AWQModifier(), GPTQModifier(**int4(group))],
    "smoothquant": lambda _: [SmoothQuantModifier(smoothing_strength=0.8), QuantizationModifier(**preset("W8A8"))],
    "smoothquant_gptq": lambda _: [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(**preset("W8A8"))],
    "fp8": lambda _: [QuantizationModifier(**preset("FP8"))],
    "fp8_dynamic": lambda _: [QuantizationModifier(**preset("FP8_DYNAMIC"))],
}


def do_not_pin_memory() -> None:
    """Without this repair its AWQ stops on a machine that has no GPU: it pins memory for copies to one."""
    IntermediatesCache.pin_memory = lambda *_: None


def main() -> None:
    options = job.parse(__doc__, sorted(METHODS))
    torch.set_num_threads(1)
    if not torch.accelerator.is_available():
        do_not_pin_memory()
    work = job.Job(options, ("llmcompressor", "compressed-tensors", "torch", "transformers"))
    with work.stage("load"):
        dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
        windows = np.load(options.tokens)
        columns = {"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()}
        dataset = Dataset.from_dict(columns)
    with work.stage("quantise"):
        oneshot(
            model=model,
            dataset=dataset,
            recipe=METHODS[options.method](options.group),
            num_calibration_samples=len(windows),
            max_seq_length=windows.shape[1],
            batch_size=options.batch,
            shuffle_calibration_samples=False,
        )
    work.write_files("compressed-tensors", lambda folder: model.save_pretrained(folder, save_compressed=True))
    work.finish()


if __name__ == "__main__":
    main()
