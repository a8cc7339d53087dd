"""Opening sources: whatever is wrong with one is a single clear error, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from trtkit import hf
from trtkit.config import CheckpointConfig
from trtkit.convert.source import plan_conversion
from trtkit.errors import InputError, LacksError, TrtkitError


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garble_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:20] = b"x" * 12
    file.write_bytes(data)


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 10)


def rewrite(folder: Path, change: Any) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    change(state)
    safetensors.torch.save_file(state, folder / "model.safetensors")


def drop_tensor(folder: Path) -> None:
    rewrite(folder, lambda state: state.pop("model.layers.3.mlp.down_proj.weight"))


def add_tensor(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))


def misshape_tensor(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({"model.norm.weight": torch.zeros(63)}))


def quantised_tensor(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


FAULTS = {
    truncate: r"model\.safetensors: truncated: tensor '.+' ends \d+ bytes after",
    garble_header: r"model\.safetensors: the safetensors header is corrupt",
    not_safetensors: r"model\.safetensors: not a safetensors file",
    drop_tensor: r"tensor 'model\.layers\.3\.mlp\.down_proj\.weight' is missing",
    add_tensor: r"tensor 'model\.layers\.0\.self_attn\.q_proj\.bias' has no place in LlamaForCausalLM",
    misshape_tensor: r"tensor 'model\.norm\.weight' has shape \[63\], config\.json implies \[64\]",
    quantised_tensor: r"tensor 'model\.norm\.weight' is int8",
    remove_config: r"cannot read .*config\.json",
    broken_config: r"config\.json: not valid JSON",
    only_pickle: r"holds pickled weights \(pytorch_model\.bin\)",
    no_weights: r"holds neither model\.safetensors nor",
    lambda f: change_config(f, architectures=["GPT7ForCausalLM"]): r"architecture 'GPT7ForCausalLM' is not supported",
    lambda f: change_config(f, architectures=[]): r"key 'architectures' is missing",
    lambda f: change_config(f, num_hidden_layers=7): r"tensor 'model\.layers\.5\..*' is missing",
    lambda f: change_config(f, num_hidden_layers=2): r"tensor 'model\.layers\.\d\..*' has no place",
    lambda f: change_config(f, hidden_act="gelu"): r"does not run hidden_act 'gelu'",
    lambda f: change_config(f, attention_bias=True): r"tensor '.*bias' is missing",
    lambda f: change_config(f, hidden_size=None): r"hidden_size is None, expected a positive integer",
    lambda f: change_config(f, hidden_size="256"): r"hidden_size is '256', expected a positive integer",
    lambda f: change_config(f, head_dim=None, num_attention_heads=7): r"hidden_size 64 is no multiple",
    lambda f: change_config(f, num_key_value_heads=3): r"num_attention_heads 8 is no multiple of num_key_value_heads 3",
    lambda f: change_config(f, rope_parameters="x"): r"rope parameters are 'x'",
    lambda f: change_config(f, rope_parameters={"rope_theta": "x"}): r"rope_theta is 'x', expected a positive number",
    lambda f: change_config(f, rope_parameters={"rope_type": "zorg"}): r"rope type 'zorg'",
    lambda f: change_config(f, rms_norm_eps=-1): r"rms_norm_eps is -1",
    lambda f: change_config(f, max_position_embeddings=None): r"max_position_embeddings is None",
    lambda f: change_config(f, dtype=5): r"dtype 5 is not a weight dtype",
    lambda f: change_config(f, tie_word_embeddings="yes"): r"tie_word_embeddings is 'yes', expected true or false",
    lambda f: change_config(f, quantization_config={"quant_method": "awq"}): r"quantised already \(awq\)",
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.items(), ids=range(len(FAULTS)))
def test_faults_are_named(fault: Any, message: str, make_source: Any) -> None:
    folder = make_source()
    fault(folder)
    with pytest.raises(InputError, match=message):
        plan_conversion(hf.open_source(folder), CheckpointConfig())


@pytest.mark.parametrize("missing", ["num_attention_heads", "intermediate_size", "rms_norm_eps", "vocab_size"])
def test_missing_config_key_is_named(missing: str, make_source: Any, edit_config: Any) -> None:
    folder = make_source()
    edit_config(folder, **{missing: None})
    with pytest.raises(InputError, match=f"key '{missing}' is missing"):
        plan_conversion(hf.open_source(folder), CheckpointConfig())


def test_missing_shard_names_the_file_and_a_tensor(make_source: Any) -> None:
    folder = make_source(max_shard_size="100KB")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(InputError, match=rf"{victim.name} is missing \(the index expects tensor '"):
        hf.open_source(folder)


def test_shard_without_a_promised_tensor(make_source: Any) -> None:
    folder = make_source(max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.extra.weight"] = next(iter(data["weight_map"].values()))
    index.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"tensor 'model\.extra\.weight' is missing, though the index names it"):
        hf.open_source(folder)


def test_shard_names_cannot_leave_the_folder(make_source: Any, tmp_path: Path) -> None:
    folder = make_source(max_shard_size="100KB")
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    name = next(iter(data["weight_map"]))
    shutil.copy(folder / data["weight_map"][name], tmp_path / "outside.safetensors")
    data["weight_map"][name] = "../outside.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(InputError, match="leaves the folder"):
        hf.open_source(folder)


def test_tied_source_may_carry_a_copy_of_lm_head(make_source: Any) -> None:
    """The copy is accepted, and it is the embedding that is converted: the plan reads no lm_head."""
    folder = make_source(tie_word_embeddings=True)
    plain = plan_conversion(hf.open_source(folder), CheckpointConfig())
    rewrite(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    source = hf.open_source(folder)
    assert "lm_head.weight" in source.tensors
    plan = plan_conversion(source, CheckpointConfig())
    assert "lm_head.weight" not in plan.sources
    assert plan == plain
    edited = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**edited, "tie_word_embeddings": False}))
    untied = plan_conversion(hf.open_source(folder), CheckpointConfig())
    assert "lm_head.weight" in untied.sources


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 5]}, {"eos_token_id": 3}, [3, 5]),
        ({"eos_token_id": 4}, {}, [4]),
        ({}, {"eos_token_id": 9}, [9]),
        (None, {"eos_token_id": [1, 2]}, [1, 2]),
        ({}, {}, []),
    ],
)
def test_all_end_ids(generation: Any, config: Any, expected: list[int], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert hf.eos_token_ids(tmp_path) == expected


def test_path_that_is_neither_folder_nor_hub_id(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        hf.open_source(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        hf.open_source(tmp_path / "file")


def test_identity_follows_content(make_source: Any, edit_config: Any) -> None:
    folder = make_source()
    before = hf.open_source(folder).identity()
    assert hf.open_source(folder).identity() == before
    edit_config(folder, rope_theta=5.0)
    assert hf.open_source(folder).identity() != before


def other_weights(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def other_file(file: Path) -> None:
    other_weights(file)
    file.rename(file.with_suffix(".old"))
    shutil.copy(file.with_suffix(".old"), file)


def other_header(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data.replace(b"model.norm.weight", b"model.Norm.weight", 1))


@pytest.mark.parametrize("change", [other_weights, other_file, other_header])
def test_identity_tells_fine_tunes_apart(change: Any, make_source: Any) -> None:
    """Of one name, size and time, as copies that keep times (rsync -t, cp -p) make them."""
    folder = make_source()
    file = folder / "model.safetensors"
    before, stat = hf.open_source(folder).identity(), file.stat()
    change(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert hf.open_source(folder).identity() != before


def test_identity_of_a_commit_is_the_same_everywhere(make_source: Any, tmp_path: Path) -> None:
    opened = hf.open_source(make_source(max_shard_size="100KB"))
    copy = tmp_path / "another machine"
    shutil.copytree(opened.path, copy)
    origin = f"hub:owner/name@{'a' * 40}"
    here, there = (replace(hf.open_source(path), origin=origin) for path in (opened.path, copy))
    assert here.identity() == there.identity()
    assert opened.identity() != hf.open_source(copy).identity() != here.identity()
    assert replace(here, origin=f"hub:owner/name@{'b' * 40}").identity() != here.identity()
    shorter = dict(list(here.tensors.items())[:1])
    assert replace(here, tensors=shorter).identity() != here.identity()


def test_origin_of_a_folder(make_source: Any) -> None:
    folder = make_source()
    assert hf.open_source(folder).origin == f"file:{folder}"


def test_single_file_is_preferred_as_transformers_does(make_source: Any) -> None:
    folder = make_source(max_shard_size="100KB")
    whole = make_source()
    shutil.copy(whole / "model.safetensors", folder)
    assert {entry.path.name for entry in hf.open_source(folder).tensors.values()} == {"model.safetensors"}


@pytest.mark.parametrize("value", ["x", True, -1, 1.5, [1, "2"], {"a": 1}])
def test_end_ids_that_are_none(value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(InputError, match="eos_token_id is"):
        hf.eos_token_ids(tmp_path)


def test_offline_hub_id_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LacksError, match="cannot reach the hub, and 'owner/model' at revision 'abc'") as caught:
        hf.open_source("owner/model", revision="abc")
    assert "give its folder" in caught.value.fix
    assert isinstance(caught.value, TrtkitError) and caught.value.exit_code == 3
