"""Held-out perplexity of a model read back from files: one function for every tool."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from quantize_peers.readback import Linear, Model

BATCH = 8  # windows


def perplexity(source: Path, read: Model | None, windows: np.ndarray[Any, Any]) -> float:
    """Perplexity per token in float32 of the model of `source`, with the weights that were read in place of its own.

    Args:
        source: the Hugging Face folder that the files were made from.
        read: None for the source itself.
        windows: int64 (windows, tokens + 1); each is a text of its own. The token that begins every text is not
            counted: it follows every end of a text, which would flatter the model.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if read is not None:
        _replace(model, read)
    nats, counted = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(windows), BATCH):
            batch = torch.from_numpy(windows[start : start + BATCH])
            logits, targets = model(batch[:, :-1], use_cache=False).logits, batch[:, 1:]
            kept = targets != model.config.bos_token_id
            nats += float(torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="sum"))
            counted += int(kept.sum())
    return math.exp(nats / counted)


def _replace(model: Any, read: Model) -> None:
    """Every weight of the model becomes the one that was read; raises ValueError if one is missing or left over."""
    weights = dict(read.tensors)
    weights |= {f"{name}.weight": linear.weight for name, linear in read.linears.items()}
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        head = weights.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, weights["model.embed_tokens.weight"]):
            raise ValueError("lm_head.weight is not the embedding, which the source ties it to")
        expected.pop("lm_head.weight", None)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:  # ModelOpt pads the vocabulary
            weights[name] = weights[name][: model.config.vocab_size]
    if weights.keys() != expected.keys():
        raise ValueError(f"the files and the model differ in {sorted(weights.keys() ^ expected.keys())[:4]}")
    model.load_state_dict(weights, strict=False)
    for name, linear in read.linears.items():
        model.get_submodule(name).register_forward_pre_hook(_hook(linear))


def _hook(linear: Linear) -> Any:
    return lambda _, arguments: (linear.transform(arguments[0]), *arguments[1:])
