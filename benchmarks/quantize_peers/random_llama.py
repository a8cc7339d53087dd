"""A random Llama of a given size, written a layer at a time: for comparing memory, where the values do not matter."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 1536, 4096, 12, 4, 8192


def write_random_llama(folder: Path, nbytes: float) -> int:
    """Writes a bfloat16 checkpoint of about `nbytes`, a file per layer; returns its number of layers (at least 1)."""
    head = HIDDEN // HEADS
    shapes = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * head, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * head, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    per_layer = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    layers = max(1, round((nbytes - 4 * VOCABULARY * HIDDEN) / per_layer))
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "rms_norm_eps": 1e-5,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": head,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    # llm-compressor wants a tokenizer even where tokens are given.
    words = {str(token): token for token in range(VOCABULARY)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    ends = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    files = [
        (f"layer-{i:03}", {f"model.layers.{i}.{name}": shape for name, shape in shapes.items()}) for i in range(layers)
    ]
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for file, modules in [("ends", ends), *files]:
        tensors = {f"{name}.weight": _random(shape, generator) for name, shape in modules.items()}
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{file}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return layers


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for a norm; a matrix is spread as a trained one's weights are."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
