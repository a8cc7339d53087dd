"""What the benchmark runs: tools, their methods, and what each of them competes in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A row's tool and method, what it competes in, whether the draw matters to it, and whether it runs unasked."""

    tool: str
    name: str
    kind: str
    draws: bool = True
    default: bool = True

    def __str__(self) -> str:
        return f"{self.tool}/{self.name}"


INT4, SQ_TENSOR, SQ_TOKEN = "int4", "int8, scale per tensor", "int8, scale per token"
FP8_TENSOR, FP8_TOKEN = "fp8, scale per tensor", "fp8, scale per token"
METHODS = (
    Method("trtkit", "int4_awq", INT4),
    Method("modelopt", "rtn", INT4, draws=False),
    Method("modelopt", "awq_lite", INT4),
    Method("modelopt", "awq_clip", INT4),
    Method("modelopt", "awq_full", INT4),
    Method("modelopt", "gptq", INT4),
    Method("modelopt", "gptq_layerwise", INT4, default=False),
    Method("autoawq", "awq", INT4),  # with zero points
    Method("autoawq", "awq_sym", INT4),
    Method("llmcompressor", "rtn", INT4, draws=False),
    Method("llmcompressor", "awq", INT4),
    Method("llmcompressor", "awq_asym", INT4, default=False),
    Method("llmcompressor", "gptq", INT4),
    Method("llmcompressor", "awq_gptq", INT4),  # both of its modifiers, one after the other
    Method("trtkit", "int8_sq", SQ_TENSOR),
    Method("modelopt", "int8_sq", SQ_TENSOR),
    Method("modelopt", "int8_sq_half", SQ_TENSOR, default=False),
    Method("trtkit", "int8_sq_plugin", SQ_TOKEN),
    Method("llmcompressor", "smoothquant", SQ_TOKEN),
    Method("llmcompressor", "smoothquant_gptq", SQ_TOKEN, default=False),
    Method("trtkit", "fp8", FP8_TENSOR),
    Method("modelopt", "fp8", FP8_TENSOR),
    Method("llmcompressor", "fp8", FP8_TENSOR),
    Method("trtkit", "fp8_rowwise", FP8_TOKEN, draws=False),
    Method("modelopt", "fp8_rowwise", FP8_TOKEN, draws=False),
    Method("llmcompressor", "fp8_dynamic", FP8_TOKEN, draws=False),
    Method("trtkit", "w4a8_awq", "int4 with fp8 inputs", default=False),
    Method("modelopt", "w4a8_awq", "int4 with fp8 inputs", default=False),
)
"""All that can be asked for. What competes in one kind stores the same number of bits."""

LEAN = (
    "trtkit/int4_awq",
    "modelopt/rtn",
    "modelopt/gptq",
    "modelopt/awq_lite",
    "llmcompressor/rtn",
    "llmcompressor/gptq",
    "llmcompressor/awq",
    "autoawq/awq",
)
"""What the comparison of memory runs unasked."""


def named(method: Method, words: list[str]) -> bool:
    """Whether one of the words is the tool, or the tool and the method."""
    return method.tool in words or str(method) in words
