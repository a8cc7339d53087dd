"""Model families. A new one is one new file with an `ARCHITECTURE` and one entry here."""

from __future__ import annotations

import difflib
import importlib
import re

from trtkit.architectures.rules import Architecture
from trtkit.errors import InputError
from trtkit.untrusted import printable

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "BloomForCausalLM": "bloom",
    "FalconForCausalLM": "falcon",
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gpt_neox",
    "OPTForCausalLM": "opt",
    "Starcoder2ForCausalLM": "starcoder2",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma",
    "PhiForCausalLM": "phi",
    "Phi3ForCausalLM": "phi3",
}
"""Hugging Face class name -> module of this package."""

LLMAPI = frozenset((
    "Cohere2ForCausalLM", "DeciLMForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM", "Exaone4ForCausalLM", "ExaoneForCausalLM", "ExaoneMoEForCausalLM",
    "Gemma3ForConditionalGeneration", "Gemma3nForConditionalGeneration", "Glm4MoeForCausalLM", "GptOssForCausalLM",
    "GraniteForCausalLM", "HCXVisionForCausalLM", "Llama4ForConditionalGeneration", "LlavaNextForConditionalGeneration",
    "MiniMaxM2ForCausalLM", "Mistral3ForConditionalGeneration", "MllamaForConditionalGeneration",
    "NemotronForCausalLM", "NemotronHForCausalLM", "NemotronNASForCausalLM", "Phi4MMForCausalLM",
    "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3NextForCausalLM",
))  # fmt: skip
"""Classes without a family here that TensorRT-LLM's PyTorch backend runs from the Hugging Face checkpoint
(nvidia.github.io/TensorRT-LLM, "Supported Models", tables of 1.0 to 1.3.0rc)."""


def get(name: str) -> Architecture:
    """The family of a Hugging Face class name.

    Raises:
        InputError: no family has this class; names near ones.
    """
    if name not in FAMILIES:
        raise InputError(f"architecture '{printable(name)}' is not supported", _advice(name))
    architecture: Architecture = importlib.import_module(f"trtkit.architectures.{FAMILIES[name]}").ARCHITECTURE
    return architecture


def relatives(name: str) -> list[str]:
    """Supported classes whose names resemble one that is not, nearest first."""
    stems = {_stem(family): family for family in reversed(FAMILIES)}
    return [stems[stem] for stem in difflib.get_close_matches(_stem(name), stems, n=3, cutoff=0.6)]


def _advice(name: str) -> str:
    near = relatives(name)
    advice = f"near relatives: {', '.join(near)}; " if near else ""
    if name in LLMAPI:
        advice += (
            "runtime `llmapi` (TensorRT-LLM's PyTorch backend) serves it from the Hugging Face checkpoint, "
            "without conversion; "
        )
    return advice + "`trtkit convert --list` prints the supported ones"


def _stem(name: str) -> str:
    return re.sub(r"(For|LMHead).*", "", name).lower()
