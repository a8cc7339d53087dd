"""Run as a program: builds random models with transformers and exports them with NVIDIA ModelOpt.

It is a process of its own because importing ModelOpt patches torch.

    python modelopt_export.py JOBS.json

JOBS.json is a list of `{"source", "model", "decoder_type", "dtype", "exports"}`: the folder to save the model in, its
`architecture` and config values, ModelOpt's name for the family, the dtype to save it in, and the exports to make of
it, each `{"out", "dtype", "tp", "pp"}`.
"""

from __future__ import annotations

import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from modelopt.torch.export import export_tensorrt_llm_checkpoint


def main(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        save(job)
        # What trtkit reads is what ModelOpt reads: the saved model.
        model = transformers.AutoModelForCausalLM.from_pretrained(job["source"])
        use_transformers_4_spelling(vars(model.config))
        for export in job["exports"]:
            with torch.inference_mode():
                export_tensorrt_llm_checkpoint(
                    model,
                    job["decoder_type"],
                    getattr(torch, export["dtype"]),
                    export["out"],
                    inference_tensor_parallel=export["tp"],
                    inference_pipeline_parallel=export["pp"],
                )


def save(job: dict[str, Any]) -> None:
    model_class = getattr(transformers, job["model"].pop("architecture"))
    model = model_class(model_class.config_class(**job["model"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # also norms and biases, whose defaults would hide mistakes
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))
    model.to(getattr(torch, job["dtype"])).save_pretrained(job["source"])


def use_transformers_4_spelling(config: dict[str, Any]) -> None:
    """ModelOpt 0.47 looks for RoPE where transformers 4 had it; without this its config.json says nothing of RoPE."""
    rope = dict(config["rope_parameters"])
    if "full_attention" in rope:  # Gemma 3 has one per kind of layer
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None


def stand_in_for_tensorrt_llm() -> None:
    """Stand-in for what ModelOpt asks TensorRT-LLM: the config keys of Gemma 2 and 3, without which it refuses them.

    It answers with the two keys that ModelOpt itself hands over and rejects every other question, so the tensors and
    the rest of config.json remain ModelOpt's own. Other families do not need TensorRT-LLM.
    """

    class Config:
        def __init__(self, keys: dict[str, Any]) -> None:
            self.keys = keys

        @classmethod
        def from_hugging_face(
            cls, *, hf_config_or_dir: Any, dtype: str, mapping: dict[str, Any], quant_config: dict[str, Any]
        ) -> Config:
            return cls({"mapping": mapping, "quantization": quant_config})

        def to_dict(self) -> dict[str, Any]:
            return self.keys

    class Keys:
        @staticmethod
        def from_dict(keys: dict[str, Any]) -> dict[str, Any]:
            return keys

    root, models, utils = (
        types.ModuleType(name) for name in ("tensorrt_llm", "tensorrt_llm.models", "tensorrt_llm.models.modeling_utils")
    )
    root.__version__ = "1.2.1"  # type: ignore[attr-defined]
    gemma = type("Gemma", (), {"config_class": Config})
    models.MODEL_MAP = {"Gemma2ForCausalLM": gemma, "Gemma3ForCausalLM": gemma}  # type: ignore[attr-defined]
    utils.Mapping = utils.QuantConfig = Keys  # type: ignore[attr-defined]
    sys.modules.update({module.__name__: module for module in (root, models, utils)})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    stand_in_for_tensorrt_llm()
    main(json.loads(Path(sys.argv[1]).read_text()))
