"""What is Phi's own: an output projection with a bias, and rotary factors that change with the length of the text."""

from __future__ import annotations

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
from trtkit.convert.source import plan_conversion
from trtkit.convert.verify import verify

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [1.0, 3.0, 5.0, 7.0]
ORIGINAL = 16
"""Positions behind which long rope changes its factors."""


def make_model(folder: Path, model_type: str, **settings: Any) -> Any:
    """A random model, saved and in memory."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


def to_checkpoint(source: Path, out: Path, **options: Any) -> None:
    opened = hf.open_source(source)
    convert(plan_conversion(opened, CheckpointConfig(**options)), opened, out)
    assert verify(opened, open_checkpoint(out)).passed


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_rank_has_its_part_of_the_bias(tp: int, tmp_path: Path) -> None:
    bias = make_model(tmp_path / "source", "phi").lm_head.bias.detach()
    to_checkpoint(tmp_path / "source", tmp_path / "out", tp=tp, dtype="float32")
    padded = torch.cat([bias, bias.new_zeros(-len(bias) % tp)])
    for rank in range(tp):
        found = safetensors.torch.load_file(tmp_path / "out" / f"rank{rank}.safetensors")
        assert torch.equal(found["lm_head.bias"], padded.chunk(tp)[rank])
        assert found["lm_head.weight"].shape[0] == len(padded) // tp


@pytest.mark.parametrize("factor", [None, 4.0])
@pytest.mark.parametrize("length", [ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 40])
def test_long_rope_computes_the_same_below_and_beyond_the_original_length(
    length: int, factor: float | None, tmp_path: Path
) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": SHORT, "long_factor": LONG}
    rope |= {"factor": factor} if factor else {}
    model = make_model(tmp_path / "source", "phi3", original_max_position_embeddings=ORIGINAL, rope_parameters=rope)
    to_checkpoint(tmp_path / "source", tmp_path / "out", tp=4, dtype="float32")
    checkpoint = load_transformers_model(tmp_path / "out")
    ids = torch.arange(length)[None]
    with torch.inference_mode():
        expected, found = model(ids).logits, checkpoint(ids).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("key", "value", "length"),
    [
        ("longrope_scaling_short_factors", [2.0] * 4, ORIGINAL),
        ("longrope_scaling_long_factors", [2.0] * 4, ORIGINAL + 1),
        ("original_max_position_embeddings", 32, 20),
        ("max_position_embeddings", 640, 10),  # the scaling of attention follows from both
        ("rotary_base", 50.0, 10),
        ("sliding_window", 4, 10),
    ],
)
def test_the_put_together_model_obeys_every_setting(key: str, value: Any, length: int, tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": SHORT, "long_factor": LONG}
    model = make_model(tmp_path / "source", "phi3", original_max_position_embeddings=ORIGINAL, rope_parameters=rope)
    to_checkpoint(tmp_path / "source", tmp_path / "out", dtype="float32")
    config = {**open_checkpoint(tmp_path / "out").config, key: value}
    settings = architectures.get("Phi3ForCausalLM").huggingface_config(config)
    other = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    changed = type(model).from_pretrained(tmp_path / "source", config=other, dtype=torch.float32).eval()
    ids = torch.arange(length)[None]
    with torch.inference_mode():
        expected, found = model(ids).logits, changed(ids).logits
    assert (found - expected).abs().max() > 1e-4 * expected.abs().max()


PHI35 = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072,
    "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 262144, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
}  # fmt: skip
"""Phi-3.5-mini-instruct's config.json, but for its factors."""
PHI4_MINI = {
    **PHI35, "vocab_size": 200064, "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
}  # fmt: skip
"""Phi-4-mini-instruct's, likewise."""


@pytest.mark.parametrize("kind", ["longrope", "su"])
@pytest.mark.parametrize(("raw", "share"), [(PHI35, 1.0), (PHI4_MINI, 0.75)])
def test_long_rope_as_the_hub_spells_it(raw: dict[str, Any], share: float, kind: str) -> None:
    raw = {**raw, "rope_scaling": {**raw["rope_scaling"], "type": kind}}
    family = architectures.get("Phi3ForCausalLM")
    config = family.checkpoint_config(hf.normalize_config(raw))
    assert config["position_embedding_type"] == "long_rope"
    assert config["original_max_position_embeddings"] == 4096
    assert config["longrope_scaling_short_factors"] == [1.0] * 48
    assert config["longrope_scaling_long_factors"] == [2.0] * 48
    assert (config["rotary_pct"], config["rotary_scaling"], config["hidden_act"]) == (share, None, "swiglu")


def test_no_long_rope_no_keys_of_it() -> None:
    """TRT-LLM's class takes the factors' mere presence for long rope."""
    raw = {**PHI35, "rope_scaling": None, "max_position_embeddings": 4096}
    config = architectures.get("Phi3ForCausalLM").checkpoint_config(hf.normalize_config(raw))
    assert config["position_embedding_type"] == "rope_gpt_neox"
    assert not [key for key in config if "long" in key or "original" in key]
