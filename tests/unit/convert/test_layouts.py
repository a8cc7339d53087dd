"""Rank tensors of every kind of layout, against the same tensors made by hand with torch's own chunk, cat and view."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from trtkit import hf
from trtkit.config import CheckpointConfig
from trtkit.convert import stream
from trtkit.convert.conversion import convert
from trtkit.convert.source import plan_conversion

Tensors = dict[str, torch.Tensor]
VOCAB, LAYERS, HIDDEN, HEADS = 131, 2, 64, 8
HEAD = HIDDEN // HEADS
COMMON = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}


def chunk(tensor: torch.Tensor, tp: int, rank: int, axis: int = 0) -> torch.Tensor:
    return tensor.chunk(tp, dim=axis)[rank]


def padded(tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    """Rows like those of a vocabulary: zeros behind the last so that all ranks have as many."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % tp)).chunk(tp)[rank]


def heads(tensor: torch.Tensor, count: int, tp: int, rank: int) -> torch.Tensor:
    """A rank's key or value heads: each one repeated where there are fewer than ranks."""
    each = tensor.view(count, HEAD, *tensor.shape[1:])
    each = each.repeat_interleave(max(1, tp // count), dim=0)
    return each.chunk(tp)[rank].flatten(0, 1)


def ungroup(tensor: torch.Tensor, kv: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(key/value heads, query heads of each + 2, head size, ...) as [all queries], [all keys], [all values]."""
    groups = tensor.view(kv, HEADS // kv + 2, HEAD, *tensor.shape[1:])
    return groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)


def llama(source: Tensors, tp: int, rank: int) -> Tensors:
    found = {
        "transformer.vocab_embedding.weight": source["model.embed_tokens.weight"],
        "transformer.ln_f.weight": source["model.norm.weight"],
        "lm_head.weight": padded(source["lm_head.weight"], tp, rank),
    }
    for layer in range(LAYERS):
        theirs, ours = f"model.layers.{layer}.", f"transformer.layers.{layer}."
        q, k, v = (source[f"{theirs}self_attn.{which}_proj.weight"] for which in "qkv")
        qkv = torch.cat([chunk(q, tp, rank), heads(k, 2, tp, rank), heads(v, 2, tp, rank)])
        found |= {
            f"{ours}input_layernorm.weight": source[f"{theirs}input_layernorm.weight"],
            f"{ours}attention.qkv.weight": qkv,
            f"{ours}attention.dense.weight": chunk(source[f"{theirs}self_attn.o_proj.weight"], tp, rank, 1),
            f"{ours}post_layernorm.weight": source[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}mlp.fc.weight": chunk(source[f"{theirs}mlp.gate_proj.weight"], tp, rank),
            f"{ours}mlp.gate.weight": chunk(source[f"{theirs}mlp.up_proj.weight"], tp, rank),
            f"{ours}mlp.proj.weight": chunk(source[f"{theirs}mlp.down_proj.weight"], tp, rank, 1),
        }
    return found


def grouped(source: Tensors, tp: int, rank: int, *, kv: int, first: Tensors, norms: dict[str, str]) -> Tensors:
    """Falcon and BLOOM.

    Args:
        first: the tensors of the first pipeline stage.
        norms: TRT-LLM name -> Hugging Face name, within a layer.
    """
    found = {
        **first,
        "transformer.ln_f.weight": source["transformer.ln_f.weight"],
        "transformer.ln_f.bias": source["transformer.ln_f.bias"],
        "lm_head.weight": padded(source["transformer.word_embeddings.weight"], tp, rank),
    }
    for layer in range(LAYERS):
        theirs, ours = f"transformer.h.{layer}.", f"transformer.layers.{layer}."
        for kind in ("weight", "bias"):
            found |= {f"{ours}{to}.{kind}": source[f"{theirs}{of}.{kind}"] for to, of in norms.items()}
            if f"{theirs}self_attention.query_key_value.{kind}" not in source:
                continue
            q, k, v = ungroup(source[f"{theirs}self_attention.query_key_value.{kind}"], kv)
            qkv = torch.cat([chunk(q, tp, rank), heads(k, kv, tp, rank), heads(v, kv, tp, rank)])
            found[f"{ours}attention.qkv.{kind}"] = qkv
            found[f"{ours}mlp.fc.{kind}"] = chunk(source[f"{theirs}mlp.dense_h_to_4h.{kind}"], tp, rank)
            for to, of in (("attention.dense", "self_attention.dense"), ("mlp.proj", "mlp.dense_4h_to_h")):
                whole = source[f"{theirs}{of}.{kind}"]
                found[f"{ours}{to}.{kind}"] = whole if kind == "bias" else chunk(whole, tp, rank, 1)
    return found


def falcon_40b(source: Tensors, tp: int, rank: int) -> Tensors:
    first = {"transformer.vocab_embedding.weight": source["transformer.word_embeddings.weight"]}
    norms = {"input_layernorm": "ln_attn", "mlp_layernorm": "ln_mlp"}
    return grouped(source, tp, rank, kv=2, first=first, norms=norms)


def falcon_7b(source: Tensors, tp: int, rank: int) -> Tensors:
    first = {"transformer.vocab_embedding.weight": source["transformer.word_embeddings.weight"]}
    return grouped(source, tp, rank, kv=1, first=first, norms={"input_layernorm": "input_layernorm"})


def bloom(source: Tensors, tp: int, rank: int) -> Tensors:
    first = {
        "transformer.vocab_embedding.weight": source["transformer.word_embeddings.weight"],
        "transformer.ln_embed.weight": source["transformer.word_embeddings_layernorm.weight"],
        "transformer.ln_embed.bias": source["transformer.word_embeddings_layernorm.bias"],
    }
    norms = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
    return grouped(source, tp, rank, kv=HEADS, first=first, norms=norms)


def gpt2(source: Tensors, tp: int, rank: int) -> Tensors:
    found = {
        "transformer.vocab_embedding.weight": source["transformer.wte.weight"],
        "transformer.position_embedding.weight": source["transformer.wpe.weight"],
        "lm_head.weight": padded(source["transformer.wte.weight"], tp, rank),
    }
    for kind in ("weight", "bias"):
        found[f"transformer.ln_f.{kind}"] = source[f"transformer.ln_f.{kind}"]
        for layer in range(LAYERS):
            theirs, ours = f"transformer.h.{layer}.", f"transformer.layers.{layer}."
            linear = {
                name: source[f"{theirs}{name}.{kind}"].T if kind == "weight" else source[f"{theirs}{name}.{kind}"]
                for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            }
            q, k, v = linear["attn.c_attn"].chunk(3)
            found |= {
                f"{ours}input_layernorm.{kind}": source[f"{theirs}ln_1.{kind}"],
                f"{ours}post_layernorm.{kind}": source[f"{theirs}ln_2.{kind}"],
                f"{ours}attention.qkv.{kind}": torch.cat([chunk(part, tp, rank) for part in (q, k, v)]),
                f"{ours}mlp.fc.{kind}": chunk(linear["mlp.c_fc"], tp, rank),
            }
            for to, of in (("attention.dense", "attn.c_proj"), ("mlp.proj", "mlp.c_proj")):
                found[f"{ours}{to}.{kind}"] = linear[of] if kind == "bias" else chunk(linear[of], tp, rank, 1)
    return found


def opt(source: Tensors, tp: int, rank: int) -> Tensors:
    found = {
        "transformer.vocab_embedding.weight": source["model.decoder.embed_tokens.weight"],
        "transformer.position_embedding.weight": source["model.decoder.embed_positions.weight"][2:],
        "lm_head.weight": padded(source["model.decoder.embed_tokens.weight"], tp, rank),
    }
    for kind in ("weight", "bias"):
        found[f"transformer.ln_f.{kind}"] = source[f"model.decoder.final_layer_norm.{kind}"]
        for layer in range(LAYERS):
            theirs, ours = f"model.decoder.layers.{layer}.", f"transformer.layers.{layer}."
            qkv = [source[f"{theirs}self_attn.{which}_proj.{kind}"] for which in "qkv"]
            found |= {
                f"{ours}input_layernorm.{kind}": source[f"{theirs}self_attn_layer_norm.{kind}"],
                f"{ours}post_layernorm.{kind}": source[f"{theirs}final_layer_norm.{kind}"],
                f"{ours}attention.qkv.{kind}": torch.cat([chunk(part, tp, rank) for part in qkv]),
                f"{ours}mlp.fc.{kind}": chunk(source[f"{theirs}fc1.{kind}"], tp, rank),
            }
            for to, of in (("attention.dense", "self_attn.out_proj"), ("mlp.proj", "fc2")):
                whole = source[f"{theirs}{of}.{kind}"]
                found[f"{ours}{to}.{kind}"] = whole if kind == "bias" else chunk(whole, tp, rank, 1)
    return found


def phi3(source: Tensors, tp: int, rank: int) -> Tensors:
    found = {
        "transformer.vocab_embedding.weight": source["model.embed_tokens.weight"],
        "transformer.ln_f.weight": source["model.norm.weight"],
        "lm_head.weight": padded(source["lm_head.weight"], tp, rank),
    }
    for layer in range(LAYERS):
        theirs, ours = f"model.layers.{layer}.", f"transformer.layers.{layer}."
        q, k, v = source[f"{theirs}self_attn.qkv_proj.weight"].split([HIDDEN, 2 * HEAD, 2 * HEAD])
        gate, up = source[f"{theirs}mlp.gate_up_proj.weight"].chunk(2)
        found |= {
            f"{ours}input_layernorm.weight": source[f"{theirs}input_layernorm.weight"],
            f"{ours}attention.qkv.weight": torch.cat(
                [chunk(q, tp, rank), heads(k, 2, tp, rank), heads(v, 2, tp, rank)]
            ),
            f"{ours}attention.dense.weight": chunk(source[f"{theirs}self_attn.o_proj.weight"], tp, rank, 1),
            f"{ours}post_layernorm.weight": source[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}mlp.fc.weight": torch.cat([chunk(up, tp, rank), chunk(gate, tp, rank)]),
            f"{ours}mlp.proj.weight": chunk(source[f"{theirs}mlp.down_proj.weight"], tp, rank, 1),
        }
    return found


FAMILIES: dict[str, tuple[dict[str, object], Callable[[Tensors, int, int], Tensors]]] = {
    "llama": ({"model_type": "llama", **COMMON, "intermediate_size": 96, "num_key_value_heads": 2}, llama),
    "falcon-40b": ({"model_type": "falcon", **COMMON, "new_decoder_architecture": True, "num_kv_heads": 2}, falcon_40b),
    "falcon-7b": ({"model_type": "falcon", **COMMON}, falcon_7b),
    "bloom": ({"model_type": "bloom", **COMMON}, bloom),
    "gpt2": ({"model_type": "gpt2", **COMMON, "max_position_embeddings": 33, "n_inner": 96}, gpt2),
    "opt": ({"model_type": "opt", **COMMON, "ffn_dim": 96, "max_position_embeddings": 33}, opt),
    "phi3": (
        {"model_type": "phi3", **COMMON, "intermediate_size": 96, "num_key_value_heads": 2, "pad_token_id": 0},
        phi3,
    ),
}
BLOCKS = {
    "by the kernel": (1 << 20, 0),
    "two rows at a time": (2 * HIDDEN * 2, 1 << 30),
    "less than a row": (10, 1 << 30),
    "blocks that end within a head": (3 * HIDDEN * 2, 4 * HIDDEN * 2),
}
"""BLOCK_BYTES and DIRECT_BYTES of stream.py; rows of a source have 2 * HIDDEN bytes."""


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a family's source, bfloat16, every parameter random."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            config = transformers.AutoConfig.for_model(**FAMILIES[name][0])
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            generator = torch.Generator().manual_seed(7)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            made[name] = tmp_path_factory.mktemp("sources") / name
            model.to(torch.bfloat16).save_pretrained(made[name])
        return made[name]

    return make


def convert_to(folder: Path, source: Path, tp: int, dtype: str, embedding: str = "none") -> Path:
    options = CheckpointConfig.model_validate({"tp": tp, "dtype": dtype, "parallel_embedding": embedding})
    opened = hf.open_source(source)
    convert(plan_conversion(opened, options), opened, folder)
    return folder


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_rank_tensors_are_what_torch_makes(
    name: str, tp: int, dtype: str, make_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = make_model(name)
    convert_to(tmp_path / "out", source, tp, dtype)
    theirs = safetensors.torch.load_file(source / "model.safetensors")
    for rank in range(tp):
        found = safetensors.torch.load_file(tmp_path / "out" / f"rank{rank}.safetensors")
        expected = FAMILIES[name][1](theirs, tp, rank)
        assert found.keys() == expected.keys()
        for tensor, values in expected.items():
            assert found[tensor].dtype == getattr(torch, dtype)
            assert torch.equal(found[tensor], values.to(getattr(torch, dtype))), (tensor, rank)


@pytest.mark.parametrize("embedding", ["vocab", "hidden"])
@pytest.mark.parametrize(
    ("name", "source_name", "skipped"),
    [("gpt2", "transformer.wpe.weight", 0), ("opt", "model.decoder.embed_positions.weight", 2)],
)
def test_positions_are_split_like_the_vocabulary(
    name: str, source_name: str, skipped: int, embedding: str, make_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = make_model(name)
    convert_to(tmp_path / "out", source, 4, "bfloat16", embedding)
    positions = safetensors.torch.load_file(source / "model.safetensors")[source_name][skipped:]
    for rank in range(4):
        found = safetensors.torch.load_file(tmp_path / "out" / f"rank{rank}.safetensors")
        expected = padded(positions, 4, rank) if embedding == "vocab" else chunk(positions, 4, rank, 1)
        assert torch.equal(found["transformer.position_embedding.weight"], expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", ["llama", "falcon-40b", "gpt2", "opt", "phi3"])
def test_the_size_of_blocks_changes_no_byte(
    name: str,
    blocks: str,
    dtype: str,
    make_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make_model(name)
    usual = convert_to(tmp_path / "usual", source, 2, dtype)
    for constant, value in zip(("BLOCK_BYTES", "DIRECT_BYTES"), BLOCKS[blocks], strict=True):
        monkeypatch.setattr(stream, constant, value)
    other = convert_to(tmp_path / "other", source, 2, dtype)
    for file in ("rank0.safetensors", "rank1.safetensors"):
        assert (other / file).read_bytes() == (usual / file).read_bytes()
