"""Conversion over layouts: every source tensor comes back bit for bit, and the put-together model computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtkit import architectures, hf
from trtkit.checkpoint import Checkpoint, open_checkpoint, stage_layers
from trtkit.config import CheckpointConfig
from trtkit.convert import conversion, readback, stream, verify
from trtkit.convert.parallelism import valid_tp_sizes
from trtkit.convert.plan import Plan, plan_checkpoint
from trtkit.convert.source import plan_conversion
from trtkit.errors import CheckFailedError, InputError

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
    "llama-head-dim": {"head_dim": 16},
    "mistral": {"architecture": "MistralForCausalLM"},
    "mistral-window": {"architecture": "MistralForCausalLM", "sliding_window": 8},
}
LAYOUTS = [
    CheckpointConfig(),
    CheckpointConfig(tp=2, dtype="float16"),
    CheckpointConfig(tp=4, pp=3, dtype="float16", parallel_embedding="vocab"),
    CheckpointConfig(tp=8, pp=2, dtype="float32", parallel_embedding="hidden"),
    CheckpointConfig(pp=5, dtype="bfloat16"),
]


def convert(source: Path, out: Path, options: CheckpointConfig) -> conversion.Conversion:
    opened = hf.open_source(source)
    return conversion.convert(plan_conversion(opened, options), opened, out)


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda o: f"tp{o.tp}-pp{o.pp}-{o.dtype}-{o.parallel_embedding}")
@pytest.mark.parametrize("model", MODELS)
def test_round_trip(model: str, options: CheckpointConfig, make_source: Any, tmp_path: Path) -> None:
    source = make_source(**MODELS[model])
    report = convert(source, tmp_path / "checkpoint", options)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")

    result = verify.verify(hf.open_source(source), checkpoint)
    assert result.passed
    assert result.tensors == len(hf.open_source(source).tensors)
    assert result.rounded == report.report.rounded
    if checkpoint.config["dtype"] in ("bfloat16", "float32"):
        assert result.rounded == 0

    # The same values, by a reader that is not ours.
    ours = dict(readback.read_tensors(checkpoint))
    for name, tensor in transformers.AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        if name in ours:
            expected = tensor.to(getattr(torch, checkpoint.config["dtype"])).float().numpy()
            assert np.array_equal(ours[name].astype(np.float32), expected), name

    ids = torch.arange(2 * 20).reshape(2, 20) % 131
    with torch.inference_mode():
        expected_logits = transformers.AutoModelForCausalLM.from_pretrained(source).float()(ids).logits
        logits = readback.load_transformers_model(tmp_path / "checkpoint")(ids).logits
    tolerance = 0.02 if result.rounded else 1e-4
    assert (logits - expected_logits).abs().max() < tolerance * expected_logits.abs().max()


def test_rank_files_are_what_other_readers_expect(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    convert(source, tmp_path / "out", CheckpointConfig(tp=2, pp=2, dtype="float16"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "conversion.json",
        *(f"rank{r}.safetensors" for r in range(4)),
    ]
    first, last = (safetensors.numpy.load_file(tmp_path / "out" / f"rank{rank}.safetensors") for rank in (0, 3))
    assert "transformer.vocab_embedding.weight" in first and "lm_head.weight" not in first
    assert "lm_head.weight" in last and "transformer.vocab_embedding.weight" not in last
    original = transformers.AutoModelForCausalLM.from_pretrained(source).half().state_dict()
    q, k, v = (original[f"model.layers.0.self_attn.{x}_proj.weight"].numpy() for x in "qkv")
    expected = np.concatenate([q[:32], k[:8], v[:8]])  # 4 of 8 query heads and 1 of 2 key/value heads of size 8
    assert np.array_equal(first["transformer.layers.0.attention.qkv.weight"], expected)
    gate = original["model.layers.0.mlp.gate_proj.weight"].numpy()
    assert np.array_equal(first["transformer.layers.0.mlp.fc.weight"], gate[:48])
    down = original["model.layers.3.mlp.down_proj.weight"].numpy()  # first layer of the second stage (3 + 2 layers)
    assert np.array_equal(last["transformer.layers.0.mlp.proj.weight"], down[:, 48:])
    head = original["lm_head.weight"].numpy()
    assert np.array_equal(last["lm_head.weight"][:65], head[66:])
    assert not last["lm_head.weight"][65:].any()


def test_config_holds_every_key_whose_default_would_be_wrong(make_source: Any, tmp_path: Path) -> None:
    convert(make_source(rope_parameters=LLAMA3_ROPE), tmp_path / "out", CheckpointConfig(tp=2, pp=2))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mapping"] == {"world_size": 4, "tp_size": 2, "pp_size": 2}
    assert config["position_embedding_type"] == "rope_gpt_neox"
    assert config["hidden_act"] == "silu"
    assert (config["rotary_base"], config["rotary_scaling"]["rope_type"]) == (500000.0, "llama3")
    assert config["norm_epsilon"] == 1e-6
    assert config["dtype"] == "bfloat16"
    assert config["quantization"] == {"quant_algo": None, "kv_cache_quant_algo": None}


def test_unscaled_rope_is_written_as_null(make_source: Any, tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "out", CheckpointConfig())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rotary_scaling"] is None


def test_float32_source_becomes_float16(make_source: Any, tmp_path: Path) -> None:
    report = convert(make_source(dtype="float32"), tmp_path / "out", CheckpointConfig())
    assert open_checkpoint(tmp_path / "out").config["dtype"] == "float16"
    assert report.report.rounded > 0


def test_sharded_source_gives_the_same_bytes(make_source: Any, tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "a", CheckpointConfig(tp=2))
    sharded = make_source(max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    convert(sharded, tmp_path / "b", CheckpointConfig(tp=2))
    for file in (tmp_path / "a").glob("rank*"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_small_blocks_give_the_same_bytes(make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source()
    options = CheckpointConfig(tp=4, pp=2, dtype="float16")
    convert(source, tmp_path / "a", options)
    monkeypatch.setattr(stream, "BLOCK_BYTES", 700)
    convert(source, tmp_path / "b", options)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_overflow_names_the_tensor_and_writes_nothing(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    state = safetensors.torch.load_file(source / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    safetensors.torch.save_file(state, source / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*overflows float16"):
        convert(source, tmp_path / "out", CheckpointConfig(dtype="float16"))
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_a_changed_checkpoint_fails_verification(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    convert(source, tmp_path / "out", CheckpointConfig(tp=2))
    file = tmp_path / "out" / "rank1.safetensors"
    state = safetensors.torch.load_file(file)
    state["transformer.layers.2.mlp.gate.weight"][0, 0] += 1
    safetensors.torch.save_file(state, file)
    result = verify.verify(hf.open_source(source), open_checkpoint(tmp_path / "out"))
    assert result.mismatches == {"model.layers.2.mlp.up_proj.weight": 1}


@pytest.mark.parametrize(("key", "value"), [("norm_epsilon", 0.5), ("rotary_base", 7.0), ("hidden_act", "gelu")])
def test_a_changed_config_fails_verification(key: str, value: Any, make_source: Any, tmp_path: Path) -> None:
    """The same tensors under another config are another model."""
    source = make_source()
    convert(source, tmp_path / "out", CheckpointConfig(tp=4, pp=2, parallel_embedding="vocab"))
    assert verify.verify(hf.open_source(source), open_checkpoint(tmp_path / "out")).passed
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, key: value}))
    result = verify.verify(hf.open_source(source), open_checkpoint(tmp_path / "out"))
    assert not result.passed
    assert result.settings == {key: (config[key], value)}


def test_a_rank_file_too_many_is_found(make_source: Any, tmp_path: Path) -> None:
    convert(make_source(), tmp_path / "out", CheckpointConfig(tp=2))
    (tmp_path / "out" / "rank9.safetensors").write_bytes((tmp_path / "out" / "rank0.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"rank9\.safetensors does not belong here"):
        open_checkpoint(tmp_path / "out")


def test_replacing_spares_everything_but_an_earlier_checkpoint(
    make_source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hf.open_source(make_source())
    plan = plan_conversion(source, CheckpointConfig())
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    monkeypatch.chdir(mine)
    for out in (mine, Path(), Path(".."), source.path, source.path / "sub", source.path.parent, Path.home(), Path("/")):
        with pytest.raises(InputError):
            conversion.convert(plan, source, out, replace=True)
    assert (mine / "thesis.txt").read_text() == "precious"
    assert verify.verify(source, convert_to(source, plan, tmp_path / "out")).passed
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(InputError, match="not an earlier checkpoint"):
        conversion.convert(plan, source, tmp_path / "out", replace=True)
    (tmp_path / "out" / "notes.md").unlink()
    conversion.convert(plan, source, tmp_path / "out", replace=True)


def convert_to(source: hf.Source, plan: Plan, out: Path) -> Checkpoint:
    conversion.convert(plan, source, out)
    return open_checkpoint(out)


def test_a_symbolic_link_is_followed_not_replaced(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    convert(source, tmp_path / "link", CheckpointConfig())
    convert(source, tmp_path / "dangling", CheckpointConfig())
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").is_file()
    assert (tmp_path / "dangling").is_symlink() and (tmp_path / "later" / "config.json").is_file()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_copies_that_differ_between_ranks_are_found(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    convert(source, tmp_path / "out", CheckpointConfig(tp=2))
    file = tmp_path / "out" / "rank1.safetensors"
    state = safetensors.torch.load_file(file)
    state["transformer.ln_f.weight"][0] += 1
    safetensors.torch.save_file(state, file)
    result = verify.verify(hf.open_source(source), open_checkpoint(tmp_path / "out"))
    assert result.mismatches == {"model.norm.weight": 1}


def test_padding_that_is_not_zero_is_found(make_source: Any, tmp_path: Path) -> None:
    source = make_source()
    convert(source, tmp_path / "out", CheckpointConfig(tp=2))
    file = tmp_path / "out" / "rank1.safetensors"
    state = safetensors.torch.load_file(file)
    state["lm_head.weight"][-1, -1] = 1
    safetensors.torch.save_file(state, file)
    with pytest.raises(CheckFailedError, match=r"padding of tensor 'lm_head\.weight' is not zero"):
        verify.verify(hf.open_source(source), open_checkpoint(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CheckpointConfig(tp=3), "TP 3 does not fit this model: num_attention_heads 8"),
        (CheckpointConfig(tp=16), "TP 16 does not fit this model: num_attention_heads 8"),
        (CheckpointConfig(pp=6), "PP 6 does not fit this model: it has 5 layers"),
    ],
)
def test_impossible_layouts_are_refused(options: CheckpointConfig, message: str, make_source: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        plan_conversion(hf.open_source(make_source()), options)
    assert "valid" in caught.value.fix


# Every way in which a source tensor can be stored: apart, fused by heads, fused in sections, transposed.
SHAPES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attn_bias": True, "mlp_bias": True},
    "GemmaForCausalLM": {"attn_bias": False},
    "FalconForCausalLM": {"bias": True, "new_decoder_architecture": True, "parallel_attention": True},
    "Phi3ForCausalLM": {},
    "GPT2LMHeadModel": {"max_position_embeddings": 7, "bias": True},
}


@given(
    architecture=st.sampled_from(list(SHAPES)),
    kv_heads=st.integers(1, 6),
    group=st.integers(1, 4),
    head=st.sampled_from([2, 4]),
    vocab=st.integers(1, 40),
    layers=st.integers(1, 7),
    tp=st.sampled_from([1, 2, 3, 4, 6, 8, 12]),
    pp=st.integers(1, 7),
    embedding=st.sampled_from([(False, 0), (True, 0), (True, 1)]),
    tied=st.booleans(),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
def test_every_element_has_a_place(
    architecture: str,
    kv_heads: int,
    group: int,
    head: int,
    vocab: int,
    layers: int,
    tp: int,
    pp: int,
    embedding: tuple[bool, int],
    tied: bool,
) -> None:
    """Over random sizes: a plan exists exactly when it should, covers all and overlaps nothing, and counts each element
    exactly once."""
    heads = kv_heads * group
    config = {
        "architecture": architecture, "dtype": "float16", "vocab_size": vocab, "hidden_size": 24,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_size": head,
        "intermediate_size": 24, "tie_word_embeddings": tied, "use_parallel_embedding": embedding[0],
        "embedding_sharding_dim": embedding[1], **SHAPES[architecture],
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
    }  # fmt: skip
    fits = heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0) and 24 % tp == 0
    assert (tp in valid_tp_sizes(config)) == fits
    if not fits or pp > layers or (pp > 1 and not architectures.get(architecture).pipeline):
        with pytest.raises(InputError):
            plan_checkpoint(config)
        return
    plan = plan_checkpoint(config)
    covered = {name: np.zeros(shape, dtype=int) for name, shape in plan.sources.items()}
    counted = {name: np.zeros(shape, dtype=int) for name, shape in plan.sources.items()}
    for tensors in plan.ranks:
        assert len({tensor.name for tensor in tensors}) == len(tensors)
        for tensor in tensors:
            used = np.zeros(int(np.prod(tensor.shape)), dtype=int)
            for piece in tensor.pieces:
                where = tuple(slice(a, b) for a, b in piece.box)
                covered[piece.source].reshape(piece.view)[where] += 1
                counted[piece.source].reshape(piece.view)[where] += piece.counted
                used[piece.element : piece.element + piece.count] += 1
            assert used.max() <= 1
            assert used.all() or "vocab" in tensor.name or "lm_head" in tensor.name or "position" in tensor.name
    assert all(counts.min() >= 1 for counts in covered.values())
    assert all((counts == 1).all() for counts in counted.values())


@given(layers=st.integers(1, 200), pp=st.integers(1, 64))
def test_stages_are_even_and_complete(layers: int, pp: int) -> None:
    stages = stage_layers(layers, pp)
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    lengths = [len(stage) for stage in stages]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_unknown_architecture_names_near_ones() -> None:
    with pytest.raises(InputError, match="'LlamaForCausalML' is not supported") as caught:
        architectures.get("LlamaForCausalML")
    assert "LlamaForCausalLM" in caught.value.fix
