"""A Llama that computes the same function as its source, but whose activations have outliers.

    python benchmarks/outliers.py examples/tiny-llama /tmp/tiny-llama-outliers

Large language models have a few channels whose activations are many times larger than the rest, and these decide how
well a quantiser does; a small model trained for minutes has none. So they are made: a channel is multiplied in one
weight and divided in the next linear, by powers of two, which leaves the mantissas of the weights untouched. The
function stays the same up to the order of float32's roundings, which the program checks on random tokens.

- 3 % of the residual channels, the same in every layer as in real models: both norms times 16, 32 or 64, and the
  columns of q, k, v, gate and up divided.
- 1 % of the rows of each up_proj: times 16, 32 or 64, and the columns of down_proj divided.
- 3 % of the rows of each v_proj, likewise, with the columns of o_proj: one row of v feeds a column of every query head
  of its group.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch

RESIDUAL_SHARE, UP_SHARE, VALUE_SHARE = 0.03, 0.01, 0.03
FACTORS = (16.0, 32.0, 64.0)
TOLERANCE = 1e-4  # of the largest logit

Tensors = dict[str, torch.Tensor]


def write_outlier_variant(source: Path, out: Path, *, seed: int = 0) -> float:
    """Writes the variant of a Llama source (safetensors, one file or several) as a new folder of the same files.

    Returns the largest difference of the logits relative to the largest logit, in float32 on random tokens. Raises
    ValueError for another architecture, for a weight that its dtype would have to round, and where the logits differ
    by more than `TOLERANCE`.
    """
    config = json.loads((source / "config.json").read_text())
    if config.get("model_type") != "llama":
        raise ValueError(f"{source / 'config.json'} is of model_type {config.get('model_type')!r}, not llama")
    shards = {file.name: safetensors.torch.load_file(file) for file in sorted(source.glob("*.safetensors"))}
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    scaled = scale_channels(tensors, config, seed)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    for file, shard in shards.items():
        safetensors.torch.save_file({name: scaled[name] for name in shard}, out / file, metadata={"format": "pt"})
    difference = logit_difference(source, out, seed)
    if difference > TOLERANCE:
        raise ValueError(f"the logits of {out} differ from those of {source} by {difference:.1e} of the largest")
    return difference


def scale_channels(tensors: Tensors, config: dict[str, object], seed: int) -> Tensors:
    """The weights of the variant, with the same names, shapes and dtypes; `tensors` stays as it is."""
    layers, hidden = int(str(config["num_hidden_layers"])), int(str(config["hidden_size"]))
    heads = int(str(config["num_attention_heads"]))
    kv_heads = int(str(config.get("num_key_value_heads") or heads))
    generator = torch.Generator().manual_seed(seed)
    residual = _factors(hidden, RESIDUAL_SHARE, generator)
    scaled = dict(tensors)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            _multiply(scaled, f"{prefix}{norm}.weight", residual)
            for reader in readers:
                _multiply(scaled, f"{prefix}{reader}.weight", 1 / residual)

        up = _factors(len(scaled[f"{prefix}mlp.up_proj.weight"]), UP_SHARE, generator)
        _multiply_rows(scaled, f"{prefix}mlp.up_proj", up)
        _multiply(scaled, f"{prefix}mlp.down_proj.weight", 1 / up)

        value = _factors(len(scaled[f"{prefix}self_attn.v_proj.weight"]), VALUE_SHARE, generator)
        _multiply_rows(scaled, f"{prefix}self_attn.v_proj", value)
        # Query heads read the value heads in groups of neighbours.
        per_query_head = value.view(kv_heads, 1, -1).expand(-1, heads // kv_heads, -1).reshape(-1)
        _multiply(scaled, f"{prefix}self_attn.o_proj.weight", 1 / per_query_head)
    return scaled


def logit_difference(source: Path, variant: Path, seed: int = 0) -> float:
    """max |difference of the logits| / max |logit| of two models on the same 4 x 64 random tokens, in float32."""
    import transformers

    logits = []
    for folder in (source, variant):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(model.config.vocab_size, (4, 64), generator=generator)
        with torch.inference_mode():
            logits.append(model(tokens, use_cache=False).logits)
    return float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())


def _factors(channels: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """One factor per channel, float32: 1, or one of FACTORS for a random share of the channels, at least one."""
    factors = torch.ones(channels)
    count = max(1, round(share * channels))
    chosen = torch.randperm(channels, generator=generator)[:count]
    factors[chosen] = torch.tensor(FACTORS)[torch.randint(len(FACTORS), (count,), generator=generator)]
    return factors


def _multiply_rows(tensors: Tensors, linear: str, factors: torch.Tensor) -> None:
    """Multiplies the outputs of a linear: its rows, and its bias if it has one."""
    _multiply(tensors, f"{linear}.weight", factors[:, None])
    if f"{linear}.bias" in tensors:
        _multiply(tensors, f"{linear}.bias", factors)


def _multiply(tensors: Tensors, name: str, factors: torch.Tensor) -> None:
    before = tensors[name]
    tensors[name] = (before.float() * factors).to(before.dtype)
    if not torch.equal(tensors[name].float() / factors, before.float()):
        raise ValueError(f"{name}: {before.dtype} cannot hold its values times {factors.min():g} to {factors.max():g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a Llama checkpoint")
    parser.add_argument("out", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--seed", type=int, default=0, help="which channels, and by how much")
    options = parser.parse_args()
    difference = write_outlier_variant(options.source, options.out, seed=options.seed)
    print(f"{options.out}: logits differ by {difference:.1e} of the largest", file=sys.stderr)


if __name__ == "__main__":
    main()
