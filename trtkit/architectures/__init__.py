"""Model families. A new one is one new file with an `ARCHITECTURE` and one entry here."""

from __future__ import annotations

import difflib
import importlib

from trtkit.architectures.rules import Architecture
from trtkit.errors import InputError

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


def get(name: str) -> Architecture:
    """The family of a Hugging Face class name.

    Raises:
        InputError: no family has this class; names near ones.
    """
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=3, cutoff=0.5) or list(FAMILIES)
        raise InputError(f"architecture '{name}' is not supported", f"supported and closest: {', '.join(near)}")
    architecture: Architecture = importlib.import_module(f"trtkit.architectures.{FAMILIES[name]}").ARCHITECTURE
    return architecture
