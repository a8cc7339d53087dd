"""What is Gemma's own: norms stored plus one, an embedding that TP always splits, layers of two kinds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from trtkit import architectures, hf
from trtkit.checkpoint import open_checkpoint
from trtkit.config import CheckpointConfig
from trtkit.convert.conversion import convert
from trtkit.convert.readback import load_transformers_model
from trtkit.convert.source import checkpoint_config, plan_conversion
from trtkit.convert.verify import verify

VOCAB, HIDDEN, LAYERS, HEADS, HEAD = 131, 48, 4, 8, 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "max_position_embeddings": 64,
    "sliding_window": 8,
}
SLIDING, FULL = "sliding_attention", "full_attention"
OUTER = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
INNER = {name: name for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm")}
QUERY = {"attention.q_layernorm": "self_attn.q_norm", "attention.k_layernorm": "self_attn.k_norm"}
NORMS = {"gemma": OUTER, "gemma2": {**OUTER, **INNER}, "gemma3_text": {**OUTER, **INNER, **QUERY}}
"""Norms of a layer: TRT-LLM name -> Hugging Face name."""

MakeSource = Callable[[str, torch.dtype], Path]


@pytest.fixture(scope="module")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> MakeSource:
    """Folder of a source whose norms reach from tiny to large values of either sign."""

    @cache
    def make(model_type: str, dtype: torch.dtype) -> Path:
        config = transformers.AutoConfig.for_model(model_type, **SIZES)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                values = torch.randn(parameter.shape, generator=generator)
                if "norm" in name:
                    values *= 10.0 ** torch.randint(-6, 3, parameter.shape, generator=generator)
                parameter.copy_(values)
        folder = tmp_path_factory.mktemp("sources") / "model"
        model.to(dtype).save_pretrained(folder)
        return folder

    return make


def to_checkpoint(source: Path, out: Path, **options: Any) -> list[dict[str, torch.Tensor]]:
    """The tensors of each rank."""
    opened = hf.open_source(source)
    convert(plan_conversion(opened, CheckpointConfig(**options)), opened, out)
    return [safetensors.torch.load_file(file) for file in sorted(out.glob("rank*.safetensors"))]


def norms_of(model_type: str) -> dict[str, str]:
    """All norms: TRT-LLM name -> Hugging Face name."""
    found = {"transformer.ln_f.weight": "model.norm.weight"}
    for layer in range(LAYERS):
        for ours, theirs in NORMS[model_type].items():
            found[f"transformer.layers.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("model_type", NORMS)
def test_norms_are_one_more_bit_for_bit(
    model_type: str, source_dtype: torch.dtype, dtype: Any, make_source: MakeSource, tmp_path: Path
) -> None:
    source = make_source(model_type, source_dtype)
    (found,) = to_checkpoint(source, tmp_path / "out", dtype=dtype)
    theirs = safetensors.torch.load_file(source / "model.safetensors")
    norms = norms_of(model_type)
    assert {name for name in found if "layernorm" in name or "ln_f" in name} == norms.keys()
    for ours, name in norms.items():
        expected = (theirs[name].float() + 1).to(getattr(torch, dtype))
        assert torch.equal(found[ours], expected), ours


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model_type", NORMS)
def test_verify_counts_what_rounding_changed(
    model_type: str, source_dtype: torch.dtype, dtype: Any, make_source: MakeSource, tmp_path: Path
) -> None:
    source = make_source(model_type, source_dtype)
    to_checkpoint(source, tmp_path / "out", dtype=dtype, tp=4, pp=2)  # copies on several ranks count once
    result = verify(hf.open_source(source), open_checkpoint(tmp_path / "out"))

    changed = 0
    norms = set(norms_of(model_type).values())
    for name, values in safetensors.torch.load_file(source / "model.safetensors").items():
        exact = values.float() + 1 if name in norms else values.float()
        changed += int((exact.to(getattr(torch, dtype)).float() != exact).sum())
    assert result.passed
    assert result.rounded == changed
    assert (changed > 0) == (dtype != "float32")


def test_verify_finds_a_norm_that_is_not_one_more(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source("gemma2", torch.bfloat16)
    (found,) = to_checkpoint(source, tmp_path / "out", dtype="bfloat16")
    theirs = safetensors.torch.load_file(source / "model.safetensors")["model.layers.1.input_layernorm.weight"]
    found["transformer.layers.1.input_layernorm.weight"] = theirs
    safetensors.torch.save_file(found, tmp_path / "out" / "rank0.safetensors")
    result = verify(hf.open_source(source), open_checkpoint(tmp_path / "out"))
    alike = int((theirs == (theirs.float() + 1).bfloat16()).sum())  # so large that one more is lost
    assert result.mismatches == {"model.layers.1.input_layernorm.weight": HIDDEN - alike}
    assert alike < HIDDEN


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("model_type", NORMS)
def test_matrices_are_what_torch_makes(model_type: str, tp: int, make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(model_type, torch.bfloat16)
    ranks = to_checkpoint(source, tmp_path / "out", tp=tp)
    theirs = safetensors.torch.load_file(source / "model.safetensors")

    def key_or_value(which: str, rank: int) -> torch.Tensor:
        heads = theirs[f"model.layers.2.self_attn.{which}_proj.weight"].view(2, HEAD, HIDDEN)
        return heads.repeat_interleave(max(1, tp // 2), dim=0).chunk(tp)[rank].flatten(0, 1)

    table = theirs["model.embed_tokens.weight"]
    table = torch.cat([table, table.new_zeros(-VOCAB % tp, HIDDEN)])
    for rank, found in enumerate(ranks):
        layer = {name: values for name, values in found.items() if ".layers.2." in name}
        query = theirs["model.layers.2.self_attn.q_proj.weight"].chunk(tp)[rank]
        expected = {
            "attention.qkv": torch.cat([query, key_or_value("k", rank), key_or_value("v", rank)]),
            "attention.dense": theirs["model.layers.2.self_attn.o_proj.weight"].chunk(tp, 1)[rank],
            "mlp.fc": theirs["model.layers.2.mlp.gate_proj.weight"].chunk(tp)[rank],
            "mlp.gate": theirs["model.layers.2.mlp.up_proj.weight"].chunk(tp)[rank],
            "mlp.proj": theirs["model.layers.2.mlp.down_proj.weight"].chunk(tp, 1)[rank],
        }
        for name, values in expected.items():
            assert torch.equal(layer[f"transformer.layers.2.{name}.weight"], values), (name, rank)
        assert len(layer) == len(expected) + len(NORMS[model_type])
        assert torch.equal(found["transformer.vocab_embedding.weight"], table.chunk(tp)[rank])
        assert torch.equal(found["lm_head.weight"], table.chunk(tp)[rank])


@pytest.mark.parametrize("wish", ["none", "vocab", "hidden"])
def test_tp_splits_the_embedding_whatever_is_wished(wish: Any, make_source: MakeSource) -> None:
    source = hf.open_source(make_source("gemma", torch.bfloat16))
    config = checkpoint_config(source, CheckpointConfig(tp=2, parallel_embedding=wish))
    assert (config["use_parallel_embedding"], config["embedding_sharding_dim"]) == (True, 0)


def gemma3(**changes: Any) -> dict[str, Any]:
    raw = {
        **SIZES,
        "rms_norm_eps": 1e-6,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **changes,
    }
    family = architectures.get("Gemma3ForCausalLM")
    return family.checkpoint_config(hf.normalize_config(raw))


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({}, 6),
        ({"sliding_window_pattern": 3}, 3),
        ({"layer_types": [SLIDING, FULL, SLIDING, FULL]}, 2),
        ({"layer_types": [SLIDING, SLIDING, FULL, SLIDING], "sliding_window_pattern": 6}, 3),
        ({"layer_types": [FULL] * 4}, 1),
        ({"layer_types": [SLIDING] * 4}, 6),
        ({"layer_types": [SLIDING] * 4, "sliding_window_pattern": 2}, 5),
    ],
)
def test_which_layers_have_full_attention(changes: dict[str, Any], pattern: int) -> None:
    config = gemma3(**changes)
    assert config["sliding_window_pattern"] == config["_sliding_window_pattern"] == pattern
    back = architectures.get("Gemma3ForCausalLM").huggingface_config(config)
    usual = [FULL if (layer + 1) % pattern == 0 else SLIDING for layer in range(LAYERS)]
    assert back["layer_types"] == changes.get("layer_types", usual)


def test_a_gemma3_config_that_says_little_means_what_transformers_means() -> None:
    theirs = transformers.Gemma3TextConfig(num_hidden_layers=LAYERS)
    config = gemma3()
    assert config["rotary_base"] == theirs.rope_parameters["full_attention"]["rope_theta"]
    assert config["rope_local_base_freq"] == theirs.rope_parameters["sliding_attention"]["rope_theta"]
    for key in ("query_pre_attn_scalar", "final_logit_softcapping", "tie_word_embeddings"):
        assert config[key] == getattr(theirs, key)


def test_gelu_means_its_approximation() -> None:
    """The first Gemma configs say "gelu"; transformers and TRT-LLM compute the tanh approximation."""
    raw = {**SIZES, "rms_norm_eps": 1e-6, "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu"}
    family = architectures.get("GemmaForCausalLM")
    config = family.checkpoint_config(hf.normalize_config(raw))
    assert config["hidden_act"] == "gelu_pytorch_tanh"
    assert transformers.GemmaConfig(hidden_act="gelu").hidden_act == "gelu_pytorch_tanh"


CHANGES: dict[str, dict[str, Any]] = {
    "GemmaForCausalLM": {"rotary_base": 500.0, "norm_epsilon": 0.5},
    "Gemma2ForCausalLM": {
        "rotary_base": 500.0, "norm_epsilon": 0.5, "query_pre_attn_scalar": 2, "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 3.0, "sliding_window": 3, "sliding_window_layers": [],
    },
    "Gemma3ForCausalLM": {
        "rotary_base": 500.0, "norm_epsilon": 0.5, "query_pre_attn_scalar": 2, "final_logit_softcapping": 3.0,
        "rope_local_base_freq": 5.0, "sliding_window": 3, "_sliding_window_pattern": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in CHANGES.items() for key in keys])
def test_the_put_together_model_obeys_every_setting(name: str, key: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model_type = {"GemmaForCausalLM": "gemma", "Gemma2ForCausalLM": "gemma2"}.get(name, "gemma3_text")
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, "sliding_window_pattern": 3})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "source")
    to_checkpoint(tmp_path / "source", tmp_path / "out", dtype="float32")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        usual = load_transformers_model(tmp_path / "out")(ids).logits
        family = architectures.get(name)
        changed = {**open_checkpoint(tmp_path / "out").config, key: CHANGES[name][key]}
        settings = family.huggingface_config(changed)
        other = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        found = type(model).from_pretrained(tmp_path / "source", config=other, dtype=torch.float32).eval()(ids).logits
    assert (found - usual).abs().max() > 1e-3 * usual.abs().max()
