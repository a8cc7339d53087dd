"""A coverage-guided search for sources that break the reader: only TrtkitError may come out, and soon.

pytest does not collect this file; it runs by hand, in an environment of its own, since atheris is no dependency:

    python3.11 -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris==3.0.0 -e .
    /tmp/fuzz/bin/python tests/fuzz/fuzz_sources.py -max_total_time=120

(Or atheris alone in the new environment, and PYTHONPATH to the site-packages of another one that has trtkit.) All
options are libFuzzer's; a folder as the last argument keeps what it finds interesting. The first byte of an input says
which reader the rest goes to: 0 the header of a safetensors file, 1 config.json with the architecture's own keys, 2 the
index of the shards, 3 a checkpoint's config.json. From 128 on, the rest is not the text of the file but says how a good
one is changed: Python's JSON scanner is not instrumented, and blind mutation rarely gets past it. What this finds
becomes a row of tests/unit/test_bad_sources.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["trtkit", "json"]):
    from trtkit import architectures, hf
    from trtkit.checkpoint import is_checkpoint, read_checkpoint_config
    from trtkit.errors import TrtkitError
    from trtkit.safetensors_io import read_header

    for family in architectures.FAMILIES:  # imported now, or they would not be instrumented
        architectures.get(family)

FOLDER = Path(os.environ.get("FUZZ_FOLDER", ""))
HEADER: dict[str, Any] = {"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16", "hidden_act": "silu",
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 32, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "sliding_window": None,
    "rope_theta": 10000.0,
}  # fmt: skip
ROPES: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
    {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
]
CHECKPOINT: dict[str, Any] = {
    "architecture": "LlamaForCausalLM", "dtype": "float16", "vocab_size": 11, "hidden_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_size": 4,
    "intermediate_size": 12, "max_position_embeddings": 32, "use_parallel_embedding": False,
    "embedding_sharding_dim": 0, "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1, "moe_ep_size": 2},
}  # fmt: skip
FAMILIES = sorted(architectures.FAMILIES)
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1e30,
    2**63,
    "",
    "a\nb",
    "silu",
    "linear",
    "yarn",
    "default",
    "float16",
    "x.safetensors",
]
KEYS = sorted(
    CONFIG.keys() | CHECKPOINT.keys() | CHECKPOINT["mapping"].keys() | HEADER["a"].keys()
    | {key for rope in ROPES for value in rope.values() for key in value} | set(ROPES[0]) | set(ROPES[3])
    | {"quantization_config", "text_config", "num_experts", "rotary_pct", "partial_rotary_factor", "weight_map", "b"}
)  # fmt: skip


def seeds() -> list[bytes]:
    header = json.dumps(HEADER).encode()
    file = len(header).to_bytes(8, "little") + header + b"\0" * 4
    configs = [CONFIG, *({**CONFIG, **rope} for rope in ROPES)]
    architectures_too = [{**CONFIG, "architectures": [name]} for name in architectures.FAMILIES]
    return [
        b"\0" + file,
        *(b"\1" + json.dumps(config).encode() for config in (*configs, *architectures_too)),
        b"\2" + json.dumps({"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}).encode(),
        b"\3" + json.dumps(CHECKPOINT).encode(),
        *(bytes([128 + reader]) + bytes(range(step, 256, step)) for reader in range(len(READERS)) for step in (3, 7)),
    ]


def prepare() -> None:
    """What the readers find beside the file in question."""
    for kind in ("header", "config", "index", "checkpoint"):
        (FOLDER / kind).mkdir()
    (FOLDER / "index" / "config.json").write_text(json.dumps(CONFIG))
    header = json.dumps(HEADER).encode()
    (FOLDER / "index" / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)


def read_source_config(data: bytes) -> None:
    (FOLDER / "config" / "config.json").write_bytes(data)
    config = hf.read_config(FOLDER / "config")
    architectures.get(config["architectures"][0]).checkpoint_config(config)


def read_index(data: bytes) -> None:
    (FOLDER / "index" / "model.safetensors.index.json").write_bytes(data)
    hf.open_source(FOLDER / "index")


def read_checkpoint(data: bytes) -> None:
    (FOLDER / "checkpoint" / "config.json").write_bytes(data)
    is_checkpoint(FOLDER / "checkpoint")
    read_checkpoint_config(FOLDER / "checkpoint")


def read_file_header(data: bytes) -> None:
    file = FOLDER / "header" / "model.safetensors"
    file.write_bytes(data)
    read_header(file)


def good_file(reader: int) -> dict[str, Any]:
    if reader == 0:
        return HEADER
    if reader == 2:
        return {"weight_map": {"a": "a.safetensors"}}
    return CHECKPOINT if reader == 3 else CONFIG


def changed_file(reader: int, data: bytes) -> bytes:
    """A good file of that reader with a few values replaced, at any depth, by what `data` says."""
    provider = atheris.FuzzedDataProvider(data)
    value = json.loads(json.dumps(good_file(reader)))
    if reader == 1:
        value |= json.loads(json.dumps(ROPES[provider.ConsumeIntInRange(0, len(ROPES) - 1)]))
        value["architectures"] = [FAMILIES[provider.ConsumeIntInRange(0, 999) % len(FAMILIES)]]
    for _ in range(provider.ConsumeIntInRange(1, 4)):
        place = value
        keys = sorted(place)
        key = KEYS[provider.ConsumeIntInRange(0, 999) % len(KEYS)] if provider.ConsumeBool() else None
        while key is None:
            key = keys[provider.ConsumeIntInRange(0, 999) % len(keys)]
            if isinstance(place[key], dict) and place[key] and provider.ConsumeBool():
                place, keys, key = place[key], sorted(place[key]), None
        if provider.ConsumeIntInRange(0, 9) == 0:
            place.pop(key, None)
            if not value:
                break
        else:
            place[key] = any_value(provider, 3)
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 4 if reader == 0 else text


def any_value(provider: Any, depth: int) -> Any:
    kind = provider.ConsumeIntInRange(0, 9 if depth else 6)
    if kind <= 1:
        return ODD[provider.ConsumeIntInRange(0, len(ODD) - 1)]
    if kind <= 3:
        return provider.ConsumeIntInRange(-2, 40)
    if kind == 4:
        return provider.ConsumeInt(9)
    if kind == 5:
        return provider.ConsumeFloat()
    if kind == 6:
        return provider.ConsumeUnicode(12)
    items = [any_value(provider, depth - 1) for _ in range(provider.ConsumeIntInRange(0, 3))]
    return items if kind == 7 else {KEYS[provider.ConsumeIntInRange(0, len(KEYS) - 1)]: item for item in items}


READERS = (read_file_header, read_source_config, read_index, read_checkpoint)


def one_input(data: bytes) -> None:
    if not data:
        return
    reader, rest = data[0] % len(READERS), data[1:]
    if data[0] >= 128:
        rest = changed_file(reader, rest)
    try:
        READERS[reader](rest)
    except TrtkitError as error:
        assert error.cause and len(error.cause.splitlines()) == 1, ascii(error.cause)
        assert error.cause.isprintable(), ascii(error.cause)
        assert len(error.cause) < 2000, error.cause[:300]
        assert error.fix and len(error.fix.splitlines()) == 1, f"no fix for: {error.cause}"


def main() -> None:
    prepare()
    corpus = FOLDER / "seeds"
    corpus.mkdir()
    for number, seed in enumerate(seeds()):
        (corpus / str(number)).write_bytes(seed)
    dictionary = FOLDER / "words"
    words = sorted(CONFIG.keys() | CHECKPOINT.keys() | {"rope_scaling", "rope_parameters", "dtype", "factor", "type"})
    values = ['"', "[]", "{}", "null", "true", "1e999", "-1", "NaN", "\\\\ud800", "\\\\u000a", "../", "9" * 20]
    escaped = [value.replace('"', '\\"') for value in values]
    dictionary.write_text("".join(f'"{word}"\n' for word in (*words, *escaped)))
    options = [f"-dict={dictionary}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=4096"]
    mine = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    flags = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    atheris.Setup([sys.argv[0], *options, *flags, *mine, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    if os.environ.get("FUZZ_FOLDER"):
        main()
    else:  # libFuzzer ends the process as it likes, so another one cleans up
        memory = Path("/dev/shm")  # noqa: S108 - a file system in memory, only for speed
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            environment = {**os.environ, "FUZZ_FOLDER": folder, "PYTHONHASHSEED": "0"}
            code = subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode
        sys.exit(code)
