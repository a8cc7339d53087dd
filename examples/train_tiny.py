"""Train the tiny Llama model of this folder on text that every machine with Python has: its standard library.

The result is a complete Hugging Face checkpoint (config, bf16 weights in one safetensors file, tokenizer with a chat
template, generation config) that has learned enough to continue code and to answer in chat form, so that a
deployment can be checked for what it says and not only for not crashing.

Example:

    python examples/train_tiny.py --out examples/tiny-llama

About 20 minutes on two idle cores. The same versions, processor and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tiny_text import ASSISTANT, BOS, END, EOT, PAD, SYSTEM, USER, documents, is_held_out, library_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = [BOS, END, EOT, PAD, SYSTEM, USER, ASSISTANT]  # their ids are 0 to 6
BEGIN_ID, END_IDS, PAD_ID = 0, [1, 2], 3
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the roles are system, user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

VOCABULARY = 2048
CONTEXT = 256  # tokens; every fourth step trains twice that, so that max_position_embeddings is a limit that holds
BATCH = 8  # sequences of CONTEXT tokens
PROMPTS = [
    "import os\nimport sys\n\ndef main(",
    "class Connection:\n    def __init__(self,",
    "    try:\n        value =",
    "Return a list of all",
    "This module provides",
    f"{USER}What does json.load do?{EOT}{ASSISTANT}",
]


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: any text round-trips without an unknown token. Puts BOS in front, as Llama's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    begins = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, BEGIN_ID)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begins])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """One stream of token ids, uint16; every document begins with BOS."""
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(texts)])


def model_config() -> transformers.LlamaConfig:
    """Small in parameters, yet every shape is one that real builds meet.

    Grouped-query attention with 8 query and 2 key/value heads: TP 2 splits both, TP 4 splits the query heads and
    repeats the key/value heads. Head size 64 is one that TensorRT-LLM's attention kernels have; as in Mistral-Nemo,
    heads x head size is not the hidden size. Inputs and outputs of every matrix are multiples of 128 after TP 2 and of
    64 after TP 4, so int4 groups of those sizes fit. The embedding is tied: untied it would take a seventh of the
    parameters.
    """
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BEGIN_ID,
        eos_token_id=END_IDS,
        pad_token_id=PAD_ID,
    )


def train(stream: np.ndarray, *, steps: int, peak: float, seed: int) -> tuple[Any, int]:
    """A model trained in float32 on random windows of `stream`, and the number of tokens it saw."""
    torch.manual_seed(seed)
    chooser = np.random.default_rng(seed)
    model = transformers.LlamaForCausalLM(model_config())
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=BEGIN_ID, eos_token_id=END_IDS, pad_token_id=PAD_ID, do_sample=False
    )
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    warmup = max(1, min(150, steps // 10))
    seen, began, recent = 0, time.monotonic(), 0.0
    for step in range(steps):
        progress = max(0, step - warmup) / max(1, steps - warmup)
        rate = peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        longer = 2 if step % 4 == 3 else 1
        offsets = np.arange(longer * CONTEXT + 1)
        starts = chooser.integers(0, len(stream) - len(offsets), BATCH // longer)
        window = torch.from_numpy(stream[starts[:, None] + offsets].astype(np.int64))
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += window[:, 1:].numel()
        recent = loss.item() if step == 0 else 0.98 * recent + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            speed = seen / (time.monotonic() - began)
            log(f"step {step:5d} of {steps}  loss {recent:.3f}  rate {rate:.1e}  {speed:,.0f} tokens/s")
    return model.eval(), seen


def to_stored_values(model: Any) -> int:
    """Round every weight to bf16 and then to a value that fp16 holds too; returns how many the second step changed.

    bf16 has 8 significant bits and fp16 11, so only magnitude can stand in the way: too large raises ValueError, and
    what lies below fp16's normal range is rounded to a multiple of 2**-24, which bf16 then holds.
    """
    changed = 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            rounded = weight.to(torch.bfloat16).float()
            exact = rounded.half().float()
            if not torch.isfinite(exact).all():
                raise ValueError(f"{name} holds a value beyond the range of float16")
            changed += int((exact != rounded).sum())
            weight.copy_(exact)
    return changed


def summed_nats(model: Any, stream: np.ndarray, frequencies: np.ndarray, context: int) -> tuple[float, float, int]:
    """Summed nats of the model and of the unigram baseline over the same held-out tokens, and how many these are.

    The stream is cut into windows of `context` predictions. `frequencies` are token counts of the training files; the
    baseline adds one to each. BOS is not counted: it follows every end of text, so it would flatter the model.
    """
    smoothed = np.where(np.arange(VOCABULARY) == BEGIN_ID, 0.0, frequencies + 1.0)
    unigram = -np.log(np.maximum(smoothed, 1e-300) / smoothed.sum())
    nats, baseline, counted = 0.0, 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(stream) - 1, context):
            window = torch.from_numpy(stream[start : start + context + 1].astype(np.int64))[None]
            logits, targets = model(input_ids=window[:, :-1], use_cache=False).logits[0].float(), window[0, 1:]
            kept = targets != BEGIN_ID
            nats += torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="sum").item()
            baseline += float(unigram[targets[kept].numpy()].sum())
            counted += int(kept.sum())
    return nats, baseline, counted


def greedy(model: Any, tokenizer: Tokenizer, prompt: str, tokens: int = 40) -> str:
    """Greedy continuation of a text, or of a chat if the prompt holds the template's tokens; stops at END or EOT."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=True)


def save(model: Any, tokenizer: Tokenizer, out: Path) -> None:
    """The checkpoint in the spelling that transformers 4.48 reads, which 5 reads as well."""
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    config = json.loads((out / "config.json").read_text())
    config |= {"torch_dtype": "bfloat16", "rope_theta": config["rope_parameters"]["rope_theta"]}  # version 4's keys
    write_json(out / "config.json", config)
    tokenizer.save(str(out / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [EOT, SYSTEM, USER, ASSISTANT],
        "model_max_length": 2 * CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "tokenizer_config.json", described)


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def measure(model: Any, tokenizer: Tokenizer, training: dict[str, str], held_out: dict[str, str]) -> dict[str, Any]:
    """Perplexity per token and bits per byte of the model and of the unigram baseline on the held-out files."""
    frequencies = np.bincount(encode(tokenizer, [t + END for t in training.values()]), minlength=VOCABULARY)
    unseen = encode(tokenizer, [t + END for t in held_out.values()])
    size = sum(len(text.encode()) for text in held_out.values())
    nats, baseline, counted = summed_nats(model, unseen, frequencies, CONTEXT)
    longer, _, _ = summed_nats(model, unseen, frequencies, 2 * CONTEXT)
    return {
        "held_out_perplexity": math.exp(nats / counted),
        "held_out_perplexity_at_twice_the_context": math.exp(longer / counted),
        "unigram_perplexity": math.exp(baseline / counted),
        "ratio": math.exp((baseline - nats) / counted),
        "held_out_bits_per_byte": nats / math.log(2) / size,
        "unigram_bits_per_byte": baseline / math.log(2) / size,
        "held_out": {"files": sorted(held_out), "tokens": counted, "bytes": size},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps of 2,048 tokens")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1, help="of the text's order, the weights and the windows")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    files = library_files()
    training = {path: text for path, text in files.items() if not is_held_out(path)}
    held_out = {path: text for path, text in files.items() if is_held_out(path)}
    texts = documents(training, options.seed)
    tokenizer = train_tokenizer(texts)
    stream = encode(tokenizer, texts)
    log(f"{len(training)} files, {len(texts)} documents, {len(stream):,} tokens; {len(held_out)} files held out")
    model, seen = train(stream, steps=options.steps, peak=options.rate, seed=options.seed)
    changed = to_stored_values(model)

    digest = hashlib.sha256("\0".join(training.values()).encode()).hexdigest()
    settings = {key: getattr(options, key) for key in ("steps", "rate", "seed", "threads")}
    record = measure(model, tokenizer, training, held_out) | {
        "training": settings | {"files": len(training), "sha256": digest, "tokens": len(stream), "tokens_seen": seen},
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "weights_changed_to_fit_float16": changed,
        "versions": {"python": platform.python_version()}
        | {module.__name__: str(module.__version__) for module in (torch, transformers, tokenizers)},
        "greedy_continuations": {prompt: greedy(model, tokenizer, prompt) for prompt in PROMPTS},
    }
    save(model, tokenizer, options.out)
    write_json(options.out / "training.json", record)
    log(f"held-out perplexity {record['held_out_perplexity']:.2f}, unigram {record['unigram_perplexity']:.1f}")


if __name__ == "__main__":
    main()
