"""A corpus of broken sources. Each is refused by `trtkit convert` in one line that names the file and the cause, with
one line of fix; nothing is written, no traceback is shown, and neither time nor memory grows with what a file claims.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from trtkit import cli

Break = Callable[[Path], Any]
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
FIRST, SECOND, LAST = SHARDS
INDEX = "model.safetensors.index.json"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16", "hidden_act": "silu",
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}  # fmt: skip


def write_source(folder: Path) -> None:
    """A Llama of two layers, in three shards."""
    layer = {
        "input_layernorm": (8,), "post_attention_layernorm": (8,), "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8), "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8), "mlp.down_proj": (8, 12),
    }  # fmt: skip
    parts = [
        {EMBEDDING: (11, 8), **{f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}},
        {f"model.layers.1.{name}.weight": shape for name, shape in layer.items()},
        {NORM: (8,), "lm_head.weight": (11, 8)},
    ]
    folder.mkdir()
    weight_map = {}
    for shard, tensors in zip(SHARDS, parts, strict=True):
        arrays = {name: np.full(shape, 0.5, np.float16) for name, shape in tensors.items()}
        safetensors.numpy.save_file(arrays, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))


# What breaks a source. Each function makes one that takes the folder.


def config(**changes: Any) -> Break:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def without(key: str) -> Break:
    return lambda folder: (folder / "config.json").write_text(
        json.dumps({name: value for name, value in CONFIG.items() if name != key})
    )


def content(name: str, data: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(data)


def config_text(old: str, new: str) -> Break:
    """Replaces text of config.json, for what json.dumps cannot write."""
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG).replace(old, new, 1))


def cut(name: str, size: Callable[[int, int], int]) -> Break:
    """Truncates a shard to `size(end of header, size of file)` bytes."""

    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: size(8 + int.from_bytes(data[:8], "little"), len(data))])

    return apply


def header(edit: Callable[[dict[str, Any]], Any], more: bytes = b"") -> Break:
    """Edits the header of the last shard (NORM and lm_head), in place or by returning its new text; appends `more`."""

    def apply(folder: Path) -> None:
        data = (folder / LAST).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        table = json.loads(data[8:end])
        result = edit(table)
        raw = result if isinstance(result, bytes) else json.dumps(table).encode()
        (folder / LAST).write_bytes(len(raw).to_bytes(8, "little") + raw + data[end:] + more)

    return apply


def record(**changes: Any) -> Break:
    """Changes the record of the norm, float16[8] at bytes 0 to 16 or 176 to 192."""
    return header(lambda table: table[NORM].update(changes))


def shift(begin: int, end: int, more: bytes = b"") -> Break:
    def edit(table: dict[str, Any]) -> None:
        record = max(table.values(), key=lambda record: record.get("data_offsets", [0])[0])
        record["data_offsets"] = [record["data_offsets"][0] + begin, record["data_offsets"][1] + end]

    return header(edit, more)


def rename(new: str) -> Break:
    return header(lambda table: table.update({new: table.pop(NORM)}))


def tensors(name: str, edit: Callable[[dict[str, Any]], Any]) -> Break:
    """Rewrites a shard with other tensors."""

    def apply(folder: Path) -> None:
        state = dict(safetensors.numpy.load_file(folder / name))
        edit(state)
        safetensors.numpy.save_file(state, folder / name)

    return apply


def index(edit: Callable[[dict[str, Any]], Any]) -> Break:
    def apply(folder: Path) -> None:
        data = json.loads((folder / INDEX).read_text())
        result = edit(data)
        (folder / INDEX).write_text(json.dumps(data if result is None else result))

    return apply


def shard_name(name: Any) -> Break:
    return index(lambda data: data["weight_map"].update({NORM: name}))


def instead(name: str, make: Callable[[Path], Any]) -> Break:
    """Puts something else in a file's place."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


def both(*steps: Break) -> Break:
    return lambda folder: [step(folder) for step in steps]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the address of a socket has room for 107 bytes only
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def remove_weights(folder: Path) -> None:
    for name in (*SHARDS, INDEX):
        (folder / name).unlink()


def sparse(name: str, size: int) -> Break:
    return lambda folder: os.truncate(folder / name, size)


def only(name: str) -> Break:
    """One file of that name instead of all weights."""
    return both(remove_weights, content(name, b"\x80\x04."))


def adapter(folder: Path) -> None:
    remove_weights(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
LONG = "x" * 100_000

# name -> (what breaks it, what the line says: a regular expression)
CORPUS: dict[str, tuple[Break, str]] = {
    # Truncation, at every boundary of the format.
    "shard empty": (content(FIRST, b""), rf"{FIRST}: not a safetensors file, or truncated"),
    "cut in the length": (cut(FIRST, lambda end, size: 5), rf"{FIRST}: not a safetensors file, or truncated"),
    "cut after the length": (cut(FIRST, lambda end, size: 8), rf"{FIRST}: not a safetensors file, or truncated"),
    "cut in the header": (cut(SECOND, lambda end, size: end // 2), rf"{SECOND}: .*truncated within its header"),
    "cut a byte before the header ends": (cut(LAST, lambda end, size: end - 1), rf"{LAST}: .*within its header"),
    "cut where the header ends": (cut(LAST, lambda end, size: end), rf"{LAST}: truncated: tensor '.+' ends \d+ bytes"),
    "cut in a tensor": (cut(FIRST, lambda end, size: (end + size) // 2), rf"{FIRST}: truncated: tensor '.+' ends"),
    "last byte missing": (cut(LAST, lambda end, size: size - 1), rf"{LAST}: truncated: tensor '.+' ends 1 bytes after"),
    "trailing bytes": (header(lambda table: None, b"\0" * 3), rf"{LAST}: 3 bytes follow the last tensor"),
    "a terabyte of trailing zeros": (sparse(LAST, 1 << 40), rf"{LAST}: \d+ bytes follow the last tensor"),
    # The length of the header.
    "length 2^63": (content(LAST, (2**63).to_bytes(8, "little") + b"{}"), rf"{LAST}: not a safetensors file"),
    "length 2^64 - 1": (content(LAST, b"\xff" * 8 + b"{}"), rf"{LAST}: not a safetensors file"),
    "length over the format's limit": (
        both(content(LAST, (100_000_001).to_bytes(8, "little")), sparse(LAST, 1 << 38)), rf"{LAST}: not a safetensors"),
    "a header of 90 MB of zeros": (
        both(content(LAST, (90_000_000).to_bytes(8, "little")), sparse(LAST, 90_000_008)), r"header is corrupt \(Exp"),
    "length 0": (content(LAST, bytes(8)), rf"{LAST}: the safetensors header is corrupt"),
    # The text of the header.
    "header not JSON": (header(lambda table: b"{]"), rf"{LAST}: the safetensors header is corrupt \(Expecting"),
    "header a list": (header(lambda table: b"[]"), r"header is corrupt \(not a JSON object\)"),
    "header a number of 5000 digits": (header(lambda table: b"1" * 5000), r"header is corrupt \(Exceeds the limit"),
    "header not UTF-8": (header(lambda table: b'{"\xff": 1}'), r"header is corrupt \(byte 2 is not UTF-8\)"),
    "header UTF-16": (header(lambda table: "{}".encode("utf-16")), r"header is corrupt \(byte 0 is not UTF-8\)"),
    "header with a byte order mark": (header(lambda table: b"\xef\xbb\xbf{}"), r"starts with a byte order mark"),
    "header of nested lists": (header(lambda table: b"[" * 200_000), rf"{LAST}: .*nested too deeply"),
    "header of nested objects": (header(lambda table: b'{"a":' * 200_000), rf"{LAST}: .*nested too deeply"),
    "a tensor twice in a header": (
        header(lambda table: b"{" + b", ".join([f'"{NORM}": {json.dumps(table[NORM])}'.encode()] * 2) + b"}"),
        rf"{LAST}: .*key 'model.norm.weight' appears twice"),
    "NaN in a header": (header(lambda table: b'{"x": NaN}'), rf"{LAST}: .*NaN is not a JSON number"),
    "empty header": (header(lambda table: b"{}"), rf"{LAST}: \d+ bytes follow the last tensor"),
    # One tensor's record.
    "record a string": (header(lambda table: table.update({NORM: "x"})), r"tensor 'model.norm.weight' lacks its dtype"),
    "record without offsets": (header(lambda table: table[NORM].pop("data_offsets")), r"lacks its dtype, shape or"),
    "dtype unknown": (record(dtype="Q4_K"), rf"{LAST}: tensor 'model.norm.weight' has dtype Q4_K, which trtkit"),
    "dtype a list": (record(dtype=["F16"]), r"has dtype \['F16'\], which trtkit does not read"),
    "dtype endless": (record(dtype=LONG), r"has dtype x{120}\.\.\., which"),
    "dtype of another size": (record(dtype="F32"), rf"{LAST}: tensor '.*' claims 16 bytes, F32\[8\] takes 32"),
    "dtype of the same size": (record(dtype="I16"), r"tensor 'model.norm.weight' is int16"),
    "float offsets": (record(data_offsets=[0.0, 16.0]), rf"{LAST}: .*has data_offsets \[0.0, 16.0\]"),
    "boolean offsets": (record(data_offsets=[False, 16]), r"has data_offsets \[False, 16\]"),
    "negative offsets": (record(data_offsets=[-16, 0]), r"has data_offsets \[-16, 0\]"),
    "offsets beyond 2^63": (record(data_offsets=[2**63, 2**63 + 16]), r"has data_offsets \[9223372036854775808"),
    "offsets beyond the file": (record(data_offsets=[2**62, 2**62 + 16]), r"truncated: tensor 'model.norm.weight'"),
    "three offsets": (record(data_offsets=[0, 8, 16]), r"has data_offsets \[0, 8, 16\]"),
    "offsets a string": (record(data_offsets="ab"), r"has data_offsets ab"),
    "offsets reversed": (record(data_offsets=[16, 0]), r"claims -16 bytes"),
    "shape negative": (record(shape=[-8]), r"has shape \[-8\]"),
    "shape boolean": (record(shape=[True, 8]), r"has shape \[True, 8\]"),
    "shape float": (record(shape=[8.0]), r"has shape \[8.0\]"),
    "shape a string": (record(shape="8"), r"has shape 8\)"),
    "shape huge": (record(shape=[2**62, 2**62]), r"claims 16 bytes, F16\[4611686018427387904, "),
    "shape of a million axes": (record(shape=[2**62] * 1_000_000), r"has shape \[4611686018427387904, .*\.\.\."),
    "shape of 4000 digits": (record(shape=[10**4000]), r"has shape \[10+\.\.\."),
    "shape of a size that fits": (record(shape=[4, 2]), r"has shape \[4, 2\], config.json implies \[8\]"),
    "overlapping tensors": (shift(-2, -2), rf"{LAST}: tensor '.*' leaves a gap or overlaps its neighbour"),
    "a gap between tensors": (shift(2, 2, b"\0\0"), rf"{LAST}: tensor '.*' leaves a gap or overlaps its neighbour"),
    "a tensor over the header": (shift(-(2**40), -(2**40)), rf"{LAST}: .*has data_offsets \[-"),
    "name with a line break": (rename("a\nerror: b"), rf"{LAST}: .*no tensor can be named 'a\\nerror: b'"),
    "name with terminal codes": (rename("\x1b[2J\x07"), r"no tensor can be named '\\x1b\[2J\\x07'"),
    "name with a lone surrogate": (rename("\ud800"), r"no tensor can be named '\\ud800'"),
    "name that turns the text around": (rename("\u202eabc"), r"no tensor can be named '\\u202eabc'"),
    "name empty": (rename(""), r"no tensor can be named ''"),
    "name endless": (rename(LONG), r"no tensor can be named 'x{120}\.\.\.'"),
    # Something else in place of a file.
    "shard a folder": (instead(FIRST, Path.mkdir), rf"{FIRST} is a folder, not a plain file"),
    "shard a pipe": (instead(FIRST, os.mkfifo), rf"{FIRST} is a named pipe, not a plain file"),
    "shard a socket": (instead(FIRST, make_socket), rf"{FIRST} is a socket, not a plain file"),
    "shard a device": (instead(FIRST, lambda path: path.symlink_to("/dev/zero")), rf"{FIRST} is a device, not a plain"),
    "shard a link to itself": (instead(FIRST, lambda path: path.symlink_to(path)), rf"{FIRST}: Too many levels"),
    "shard a link to nothing": (instead(FIRST, lambda path: path.symlink_to("gone")), rf"{FIRST}: it is a link to a"),
    "shard a git-lfs pointer": (content(SECOND, POINTER), rf"{SECOND} is a git-lfs pointer"),
    "shard a web page": (content(SECOND, b"<!DOCTYPE html><html>" * 9), rf"{SECOND}: not a safetensors file"),
    "config a folder": (instead("config.json", Path.mkdir), r"config\.json is a folder, not a plain file"),
    "config a pipe": (instead("config.json", os.mkfifo), r"config\.json is a named pipe, not a plain file"),
    "config a device": (instead("config.json", lambda path: path.symlink_to("/dev/zero")), r"config\.json is a device"),
    "config a link to itself": (instead("config.json", lambda path: path.symlink_to(path)), r"config\.json: Too many"),
    "config missing": (lambda folder: (folder / "config.json").unlink(), r"cannot read .*config\.json: No such file"),
    "config a git-lfs pointer": (content("config.json", POINTER), r"config\.json is a git-lfs pointer"),
    "config of a terabyte": (sparse("config.json", 1 << 40), r"config\.json: larger than 100,000,000 bytes"),
    "index a folder": (instead(INDEX, Path.mkdir), rf"{INDEX} is a folder, not a plain file"),
    "index a pipe": (instead(INDEX, os.mkfifo), rf"{INDEX} is a named pipe, not a plain file"),
    "index a link to itself": (instead(INDEX, lambda path: path.symlink_to(path)), rf"{INDEX}: Too many levels"),
    "index a git-lfs pointer": (content(INDEX, POINTER), rf"{INDEX} is a git-lfs pointer"),
    # The index.
    "index empty": (content(INDEX, b""), rf"{INDEX}: not valid JSON"),
    "index not UTF-8": (content(INDEX, b'{"\xe9": 1}'), rf"{INDEX}: not valid JSON \(byte 2 is not UTF-8\)"),
    "index nested": (content(INDEX, b'{"weight_map":' * 100_000), rf"{INDEX}: .*nested too deeply"),
    "index a list": (index(lambda data: [1]), rf"{INDEX}: not a JSON object"),
    "index without map": (index(lambda data: {"metadata": {}}), rf"{INDEX}: key 'weight_map' is missing"),
    "map a list": (index(lambda data: {"weight_map": [FIRST]}), rf"{INDEX}: key 'weight_map' is missing or not"),
    "map empty": (index(lambda data: {"weight_map": {}}), rf"{INDEX}: 'weight_map' names no tensor"),
    "shard name a number": (shard_name(3), rf"{INDEX}: key 'weight_map' is missing or not a mapping of names"),
    "shard name null": (shard_name(None), rf"{INDEX}: key 'weight_map' is missing or not a mapping of names"),
    "shard name of the folder above": (shard_name("../x.safetensors"), rf"{INDEX}: shard name '\.\./x.* leaves the"),
    "shard name absolute": (shard_name("/etc/passwd"), rf"{INDEX}: shard name '/etc/passwd' leaves the folder"),
    "shard name ..": (shard_name(".."), rf"{INDEX}: shard name '\.\.' leaves the folder"),
    "shard name .": (shard_name("."), rf"{INDEX}: shard name '\.' leaves the folder"),
    "shard name empty": (shard_name(""), rf"{INDEX}: no file can be named ''"),
    "shard name with NUL": (shard_name("a\0b"), rf"{INDEX}: no file can be named 'a\\x00b'"),
    "shard name with a line break": (shard_name("a\nb"), rf"{INDEX}: no file can be named 'a\\nb'"),
    "shard name with a lone surrogate": (shard_name("\udcff"), rf"{INDEX}: no file can be named '\\udcff'"),
    "shard name too long": (shard_name("é" * 200), rf"{INDEX}: no file can be named 'é+\.\.\.'"),
    "shard missing": (lambda folder: (folder / SECOND).unlink(), rf"{SECOND} is missing \(the index expects tensor '"),
    "tensor name with a line break": (
        index(lambda data: data["weight_map"].update({"a\nb": FIRST})), rf"{INDEX}: no tensor can be named 'a\\nb'"),
    "a tensor twice in the index": (
        lambda folder: (folder / INDEX).write_text(
            (folder / INDEX).read_text().replace(f'"{NORM}"', f'"{EMBEDDING}"')),
        rf"{INDEX}: .*key '{EMBEDDING}' appears twice"),
    "a tensor in another shard than indexed": (
        index(lambda data: data["weight_map"].update({NORM: FIRST})), rf"{LAST}: tensor '{NORM}' is in {FIRST} too"),
    "a tensor in two shards": (
        tensors(FIRST, lambda state: state.update({NORM: np.ones(8, np.float16)})), rf"{FIRST}: tensor '{NORM}' is in"),
    "a tensor in two shards, unindexed": (
        both(*(tensors(name, lambda state: state.update({"x": np.ones(8, np.float16)})) for name in (FIRST, LAST))),
        rf"{LAST}: tensor 'x' is in {FIRST} too"),
    "a tensor indexed and in no shard": (
        index(lambda data: data["weight_map"].update({"x": LAST})), rf"{LAST}: tensor 'x' is missing, though"),
    # The tensors.
    "tensor missing": (
        both(tensors(FIRST, lambda state: state.pop(Q)), index(lambda data: data["weight_map"].pop(Q) and None)),
        rf"tensor '{Q}' is missing"),
    "tensor surplus": (
        tensors(LAST, lambda state: state.update({"model.norm.bias": np.ones(8, np.float16)})),
        r"tensor 'model.norm.bias' has no place in LlamaForCausalLM"),
    "tensor misshapen": (
        tensors(LAST, lambda state: state.update({NORM: np.ones(7, np.float16)})),
        rf"{LAST}: tensor '{NORM}' has shape \[7\], config.json implies \[8\]"),
    "tensor scalar": (
        tensors(LAST, lambda state: state.update({NORM: np.ones((), np.float16)})), rf"tensor '{NORM}' has shape \[\]"),
    "tensor without elements": (
        tensors(LAST, lambda state: state.update({NORM: np.ones((0, 8), np.float16)})), r"has shape \[0, 8\]"),
    "tensor of integers": (
        tensors(LAST, lambda state: state.update({NORM: np.ones(8, np.int8)})), rf"{LAST}: tensor '{NORM}' is int8"),
    "tensor of a LoRA": (
        tensors(LAST, lambda state: state.update({f"base_model.model.{Q[:-7]}.lora_A.weight": np.ones((2, 8))})),
        r"tensor 'base_model.*lora_A.weight' has no place"),
    # Other things than a checkpoint.
    "only pickle": (only("pytorch_model.bin"), r"holds pickled weights \(pytorch_model.bin\)"),
    "only a .pth": (only("consolidated.00.pth"), r"holds pickled weights \(consolidated.00.pth\)"),
    "only GGUF": (only("model-q4_k.gguf"), r"only weights in another layout \(model-q4_k.gguf\)"),
    "only Mistral's layout": (only("consolidated.safetensors"), r"another layout \(consolidated.safetensors\)"),
    "no weights": (remove_weights, r"holds neither model.safetensors nor model.safetensors.index.json$"),
    "an adapter": (adapter, r"holds an adapter \(adapter_config.json\), not a whole model"),
    "only an adapter's weights": (only("adapter_model.safetensors"), r"only an adapter \(adapter_model.safetensors\)"),
    "quantised": (
        config(quantization_config={"quant_method": "gptq"}),
        r"config.json says that the weights are quantised \(gptq\), but no linear's are",
    ),
    "quantised, oddly": (
        config(quantization_config=["a\nb"]),
        r"config.json: quantization_config is \['a\\nb'\], expected a mapping",
    ),
    "quantised, an older key": (
        config(compression_config={}),
        r"config.json: weights quantised by '' are not imported",
    ),
    "quantised, in a file": (
        content("hf_quant_config.json", b"{}"),
        r"hf_quant_config.json says that the weights are quantised \(modelopt\), but no linear's",
    ),
    # config.json as text.
    "config empty": (content("config.json", b""), r"config.json: not valid JSON \(Expecting value"),
    "config of two objects": (content("config.json", b"{} {}"), r"config.json: not valid JSON \(Extra data"),
    "config a list": (content("config.json", b"[]"), r"config.json: not a JSON object"),
    "config null": (content("config.json", b"null"), r"config.json: not a JSON object"),
    "config with a byte order mark": (content("config.json", b"\xef\xbb\xbf{}"), r"config.json: .*byte order mark"),
    "config not UTF-8": (content("config.json", b"{\xff}"), r"config.json: not valid JSON \(byte 1 is not UTF-8\)"),
    "config nested": (content("config.json", b'{"a":' * 100_000), r"config.json: .*nested too deeply"),
    "config with a key twice": (config_text('"vocab_size": 11', '"vocab_size": 11, "vocab_size": 12'), r"twice"),
    "config with NaN": (config_text("1e-06", "NaN"), r"config.json: not valid JSON \(NaN is not a JSON number\)"),
    "config with Infinity": (config_text("10000.0", "-Infinity"), r"config.json: .*-Infinity is not a JSON number"),
    "config with 1e999": (config_text("10000.0", "1e999"), r"config.json: rope_theta is inf"),
    "config with 5000 digits": (config_text("11", "1" * 5000), r"config.json: not valid JSON \(Exceeds the limit"),
    # config.json as a model.
    "architectures missing": (without("architectures"), r"config.json: key 'architectures' is missing"),
    "architectures a string": (config(architectures="LlamaForCausalLM"), r"config.json: key 'architectures' is"),
    "architectures empty": (config(architectures=[]), r"config.json: key 'architectures' is missing"),
    "architectures of numbers": (config(architectures=[1]), r"config.json: key 'architectures' is missing or no list"),
    "architecture unknown": (config(architectures=["GPT9LMHead"]), r"config.json: architecture 'GPT9LMHead' is not"),
    "architecture with a line break": (config(architectures=["a\nb"]), r"config.json: architecture 'a\\nb' is no"),
    "architecture endless": (config(architectures=[LONG]), r"architecture 'x+\.\.\.' is no class name"),
    "architecture of a path": (config(architectures=["../llama"]), r"architecture '\.\./llama' is no class name"),
    "several modalities": (
        config(architectures=["Gemma3ForConditionalGeneration"], text_config={"hidden_size": 8}),
        r"config.json: Gemma3ForConditionalGeneration is a model of several modalities"),
    "hidden_size missing": (without("hidden_size"), r"config.json: key 'hidden_size' is missing"),
    "hidden_size 0": (config(hidden_size=0), r"config.json: hidden_size is 0, expected a positive integer"),
    "hidden_size negative": (config(hidden_size=-8), r"config.json: hidden_size is -8"),
    "hidden_size 1e30": (config(hidden_size=1e30), r"config.json: hidden_size is 1e\+30, expected a positive integer"),
    "hidden_size 2^70": (config(hidden_size=2**70), r"implies \[11, 1180591620717411303424\]|hidden_size is 11805916"),
    "hidden_size a string": (config(hidden_size="8"), r"config.json: hidden_size is '8'"),
    "hidden_size a list": (config(hidden_size=[8]), r"config.json: hidden_size is \[8\]"),
    "hidden_size true": (config(hidden_size=True), r"config.json: hidden_size is True"),
    "hidden_size of another model": (config(hidden_size=16), r"has shape \[11, 8\], config.json implies \[11, 16\]"),
    "vocab_size of another model": (config(vocab_size=12), r"has shape \[11, 8\], config.json implies \[12, 8\]"),
    "heads do not divide": (config(num_attention_heads=3), r"config.json: hidden_size 8 is no multiple"),
    "key heads do not divide": (config(num_attention_heads=4, num_key_value_heads=3), r"no multiple of num_key_value"),
    "a billion layers": (config(num_hidden_layers=10**9), r"config.json: num_hidden_layers is 1000000000, no model"),
    "a billion layers of two kinds": (
        config(architectures=["Gemma3ForCausalLM"], num_hidden_layers=2**63), r"num_hidden_layers is 92|not supported"),
    "more layers than tensors": (
        config(num_hidden_layers=99_999), r"config.json: num_hidden_layers is 99999, the weights are 21 tensors"),
    "layers of 4000 digits": (config(num_hidden_layers=10**4000), r"config.json: num_hidden_layers is 10+\.\.\., no"),
    "layers 0": (config(num_hidden_layers=0), r"config.json: num_hidden_layers is 0"),
    "layers 2.0": (config(num_hidden_layers=2.0), r"config.json: num_hidden_layers is 2.0"),
    "one layer more": (config(num_hidden_layers=3), r"tensor 'model.layers.2.* is missing"),
    "one layer less": (config(num_hidden_layers=1), r"tensor 'model.layers.1.* has no place"),
    "rms_norm_eps 0": (config(rms_norm_eps=0), r"config.json: rms_norm_eps is 0"),
    "dtype float8": (config(torch_dtype="float8_e4m3fn"), r"config.json: dtype 'float8_e4m3fn' is not a weight dtype"),
    "dtype a mapping": (config(torch_dtype={"a": "float16"}), r"config.json: dtype \{'a': 'float16'\} is not a weight"),
    "activation unknown": (config(hidden_act="relu"), r"config.json: .*hidden_act"),
    "rope a string": (config(rope_scaling="linear"), r"config.json: rope parameters are 'linear', expected a mapping"),
    "rope a list": (config(rope_parameters=[1]), r"config.json: rope parameters are \[1\], expected a mapping"),
    "rope type a list": (config(rope_scaling={"type": ["linear"]}), r"config.json: rope type is \['linear'\]"),
    "rope type with a line break": (config(rope_scaling={"type": "a\nb"}), r"config.json: rope type is 'a\\nb'"),
    "rope type unknown": (config(rope_scaling={"type": "zorg"}), r"config.json: rope type 'zorg'"),
    "rope factor missing": (config(rope_scaling={"type": "linear"}), r"config.json: rope type 'linear' lacks 'factor'"),
    "rope factor a string": (
        config(rope_scaling={"type": "linear", "factor": "2"}), r"config.json: rope parameter 'factor' is '2'"),
    "rope factor negative": (config(rope_scaling={**LLAMA3, "factor": -1}), r"config.json: rope parameter 'factor' is"),
    "rope factor infinite": (
        config_text('"rope_theta": 10000.0', '"rope_scaling": {"type": "linear", "factor": 1e999}'),
        r"config.json: rope parameter 'factor' is inf"),
    "rope of llama3 half said": (
        config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), r"config.json: rope type 'llama3' lacks 'low_"),
    "rope factors no list": (
        config(rope_scaling={"type": "longrope", "short_factor": 1.0, "long_factor": [1.0]}),
        r"config.json: rope parameter 'short_factor' is 1.0, expected a list of numbers"),
    "rope factors of strings": (
        config(rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": ["1"]}), r"'long_factor' is"),
    "rope theta 0": (config(rope_theta=0), r"config.json: rope_theta is 0"),
    "rope theta a list": (config(rope_parameters={"rope_theta": [1.0]}), r"config.json: rope_theta is \[1.0\]"),
    "rope per layer, one unknown": (
        config(rope_parameters={"chunked_attention": {"rope_theta": 1.0}}), r"config.json: .*layer type 'chunked_att"),
    "rope per layer, one no mapping": (
        config(rope_parameters={"full_attention": {}, "sliding_attention": 5}), r"config.json: rope parameters are 5"),
    "rope per layer, both scaled": (
        config(rope_parameters={"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
        r"config.json: rope type 'linear' of the sliding-window layers"),
}  # fmt: skip


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def check_report(stdout: str, stderr: str, code: int, message: str) -> None:
    lines = stderr.encode("utf-8", "backslashreplace").decode().splitlines()  # xdist stumbles over surrogates
    assert len(lines) == 2, lines[:10]
    assert lines[0].startswith("error: ") and len(lines[0]) < 1500
    assert re.search(message, lines[0]), lines[0]
    assert lines[1].startswith("  fix: ") and len(lines[1]) > len("  fix: ")
    assert code in (2, 3)
    assert stdout == ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", CORPUS)
def test_bad_source_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = CORPUS[name]
    source = tmp_path / "source"
    write_source(source)
    spoil(source)
    before = listing(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(["convert", str(source), str(tmp_path / "out")])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    streams = capsys.readouterr()
    check_report(streams.out, streams.err, int(stop.value.code or 0), message)
    line = streams.err.splitlines()[0]
    assert str(source) in line or "config.json: " in line
    assert listing(tmp_path) == before
    assert peak < 500_000_000  # header and JSON texts, at most a few times the format's limit of 100 MB


def test_unbroken_source_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The corpus breaks something that works."""
    write_source(tmp_path / "source")
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "out")])
    assert stop.value.code == 0, capsys.readouterr().err
    assert len(CORPUS) >= 80


@pytest.mark.parametrize("name", ["shard a pipe", "config nested", "name with a line break", "a billion layers"])
def test_bad_source_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    """As a user runs it, with little memory."""
    spoil, message = CORPUS[name]
    write_source(tmp_path / "source")
    spoil(tmp_path / "source")
    before = listing(tmp_path)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)); from trtkit.cli import main"
    done = subprocess.run(
        [sys.executable, "-c", f"{limited}; main()", "convert", str(tmp_path / "source"), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    check_report(done.stdout, done.stderr, done.returncode, message)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", INDEX, FIRST])
def test_unreadable_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "source")
    victim = tmp_path / "source" / name
    victim.chmod(0)
    if os.access(victim, os.R_OK):  # root reads everything
        original = Path.open

        def refuse(path: Path, *args: Any, **options: Any) -> Any:
            if path == victim:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *args, **options)

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "out")])
    streams = capsys.readouterr()
    check_report(streams.out, streams.err, int(stop.value.code or 0), rf"{name}: Permission denied")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x" * 5000, r"File name too long"),
        ("~no_such_user_here/model", r"there is no such user"),
        ("/dev/null", r"is not a folder"),
        ("../nowhere/at/all", r"does not exist"),
        ("file\nerror: other", r"source 'file\\nerror: other' does not exist"),
    ],
)
def test_bad_source_path(source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", source, str(tmp_path / "out")])
    streams = capsys.readouterr()
    check_report(streams.out, streams.err, int(stop.value.code or 0), message)
    assert listing(tmp_path) == []
