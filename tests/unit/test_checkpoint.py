"""Reading checkpoints: what NVIDIA's tools write opens, whatever else is wrong is one error that names the key."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from trtkit.checkpoint import is_checkpoint, open_checkpoint, read_checkpoint_config
from trtkit.convert.plan import plan_checkpoint
from trtkit.errors import InputError

CONFIG: dict[str, Any] = {
    "architecture": "LlamaForCausalLM", "dtype": "float16", "vocab_size": 11, "hidden_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_size": 4,
    "intermediate_size": 12, "max_position_embeddings": 32, "use_parallel_embedding": False,
    "embedding_sharding_dim": 0, "attn_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
    "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
}  # fmt: skip
ODD = [None, True, 0, -1, 1.5, 1e30, 2**70, "", "x", "a\nb", [], [1], {}, {"a": 1}]


def write(folder: Path, config: Any, ranks: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(ranks):
        tensors = {name: np.zeros(1, np.float16) for name in "abc"}
        safetensors.numpy.save_file(tensors, folder / f"rank{rank}.safetensors")
    return folder


@pytest.mark.parametrize("key", CONFIG)
def test_every_key_missing_or_odd_is_an_input_error(key: str, tmp_path: Path) -> None:
    """Missing keys of families are the families' own; here none may fail otherwise."""
    variants = [{**CONFIG, key: value} for value in ODD]
    if key not in ("attn_bias", "mlp_bias", "tie_word_embeddings"):
        variants.append({name: value for name, value in CONFIG.items() if name != key})
    for variant in variants:
        folder = write(tmp_path / "checkpoint", variant)
        try:
            checkpoint = open_checkpoint(folder)
            plan_checkpoint(checkpoint.config)
        except InputError as error:
            assert error.fix or "architecture" in error.cause
            assert "\n" not in error.cause
            assert len(error.cause) < 1000
        assert is_checkpoint(folder) in (True, False)


@pytest.mark.parametrize("key", ["world_size", "tp_size", "pp_size", "cp_size", "moe_tp_size", "moe_ep_size"])
def test_every_odd_mapping_is_an_input_error(key: str, tmp_path: Path) -> None:
    for value in ODD:
        folder = write(tmp_path / "checkpoint", {**CONFIG, "mapping": {**CONFIG["mapping"], key: value}})
        if value is None or value == 1 or (key.startswith("moe") and value == -1):
            continue
        if value == -1:
            assert read_checkpoint_config(folder)["mapping"] == CONFIG["mapping"]
            continue
        with pytest.raises(InputError, match="size") as caught:
            read_checkpoint_config(folder)
        assert "\n" not in caught.value.cause and caught.value.fix


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(changes=st.dictionaries(st.sampled_from(sorted(CONFIG)), json_values, max_size=4))
def test_any_config_opens_or_is_an_input_error(changes: dict[str, Any], tmp_path_factory: Any) -> None:
    folder = write(tmp_path_factory.mktemp("checkpoint"), {**CONFIG, **changes})
    assert is_checkpoint(folder) in (True, False)
    with contextlib.suppress(InputError):
        plan_checkpoint(open_checkpoint(folder).config)


MODELOPT: dict[str, Any] = {
    # As NVIDIA's ModelOpt exports it: other keys, some of trtkit's own missing.
    "producer": {"name": "modelopt", "version": "0.29.0"}, "architecture": "LlamaForCausalLM", "dtype": "bfloat16",
    "logits_dtype": "float16", "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "hidden_size": 8, "norm_epsilon": 1e-05, "vocab_size": 11, "max_position_embeddings": 32, "hidden_act": "silu",
    "use_parallel_embedding": True, "embedding_sharding_dim": 0, "head_size": 4, "intermediate_size": 12,
    "position_embedding_type": "rope_gpt_neox", "share_embedding_table": False, "residual_mlp": False, "bias": False,
    "rotary_pct": 1.0, "rank": 0, "decoder": "llama", "rmsnorm": True, "lm_head_bias": False, "rotary_base": 500000.0,
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
    "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
    "some_key_of_a_later_version": {"deep": [1]},
}  # fmt: skip


def test_foreign_checkpoint_opens(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "checkpoint", MODELOPT, ranks=2))
    assert (checkpoint.tp, checkpoint.pp, len(checkpoint.ranks)) == (2, 1, 2)
    assert checkpoint.config == MODELOPT


def test_what_tensorrt_llm_leaves_out_is_filled_in(tmp_path: Path) -> None:
    left_out = ("num_key_value_heads", "head_size", "use_parallel_embedding", "embedding_sharding_dim", "mapping")
    config = read_checkpoint_config(
        write(tmp_path / "checkpoint", {key: value for key, value in CONFIG.items() if key not in left_out})
    )
    assert {key: config[key] for key in left_out} == {
        "num_key_value_heads": 2, "head_size": 4, "use_parallel_embedding": False, "embedding_sharding_dim": 0,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tp_size": 2}, {"world_size": 2, "tp_size": 2, "pp_size": 1}),
        ({"tp_size": 4, "moe_tp_size": -1, "moe_ep_size": -1}, {"world_size": 4, "tp_size": 4, "pp_size": 1}),
        ({"tp_size": 4, "moe_ep_size": 2},
         {"world_size": 4, "tp_size": 4, "pp_size": 1, "moe_tp_size": 2, "moe_ep_size": 2}),
        ({"tp_size": 4, "moe_tp_size": 4},
         {"world_size": 4, "tp_size": 4, "pp_size": 1, "moe_tp_size": 4, "moe_ep_size": 1}),
        ({"tp_size": 2, "pp_size": 2, "moe_tp_size": 1, "moe_ep_size": 2, "gpus_per_node": 8, "cp_size": 1},
         {"world_size": 4, "tp_size": 2, "pp_size": 2, "moe_tp_size": 1, "moe_ep_size": 2}),
    ],
)  # fmt: skip
def test_mapping(given: dict[str, int], expected: dict[str, int], tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint", {**CONFIG, "mapping": given})
    assert read_checkpoint_config(folder)["mapping"] == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tp_size": 4, "moe_tp_size": 2, "moe_ep_size": 1}, "moe_tp_size 2 x moe_ep_size 1 is not tp_size 4"),
        ({"tp_size": 4, "moe_ep_size": 3}, "moe_tp_size 1 x moe_ep_size 3 is not tp_size 4"),
        ({"tp_size": 2, "world_size": 3}, "world_size 3 is not tp_size 2 x pp_size 1"),
        ({"cp_size": 2}, "cp_size 2"),
        ([2], "mapping is"),
        ({"tp_size": "2"}, "mapping.tp_size is '2'"),
    ],
)
def test_mapping_that_does_not_fit(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_checkpoint_config(write(tmp_path / "checkpoint", {**CONFIG, "mapping": given}))


def test_a_billion_layers_are_not_gone_through(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_hidden_layers is 1000000000, expected a positive integer up to 100000"):
        read_checkpoint_config(write(tmp_path / "checkpoint", {**CONFIG, "num_hidden_layers": 10**9}))
    with pytest.raises(InputError, match="num_hidden_layers is 4, the ranks hold 3 tensors"):
        open_checkpoint(write(tmp_path / "checkpoint", {**CONFIG, "num_hidden_layers": 4}))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"vocab_size": NaN}', "\ufeff{}"])
def test_config_that_is_no_json_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: not"):
        read_checkpoint_config(tmp_path)
    assert not is_checkpoint(tmp_path)


def test_is_checkpoint_never_raises(tmp_path: Path) -> None:
    assert not is_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert not is_checkpoint(tmp_path / "file")
    os.mkfifo(tmp_path / "config.json")
    assert not is_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    write(tmp_path / "whole", CONFIG)
    assert is_checkpoint(tmp_path / "whole")
    (tmp_path / "whole" / "notes.txt").write_text("mine")
    assert not is_checkpoint(tmp_path / "whole")
