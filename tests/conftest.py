"""Fixtures that several test folders share: small random sources, made with transformers."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A shell that runs the tests in the background has them ignore SIGINT, and every process that they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("trtkit", deadline=None)  # timing never decides a test
settings.load_profile("trtkit")

MakeSource = Callable[..., Path]


def write_source(
    path: Path, *, architecture: str = "LlamaForCausalLM", dtype: str = "bfloat16", **settings: Any
) -> Path:
    """A random model of a few thousand parameters in `path`; keyword arguments go to its transformers config."""
    import torch
    import transformers

    values: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        **settings,
    }
    shard_size = values.pop("max_shard_size", "1GB")
    config_class = {"LlamaForCausalLM": "LlamaConfig", "MistralForCausalLM": "MistralConfig"}[architecture]
    model = getattr(transformers, architecture)(getattr(transformers, config_class)(**values))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # also norms and biases, whose defaults would hide mistakes
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard_size)
    return path


@pytest.fixture(scope="session", autouse=True)
def _private_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Deployments and artifacts of the tests stay out of the user's own folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTKIT_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        patch.setenv("TRTKIT_STORE", str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture
def make_source(tmp_path: Path) -> MakeSource:
    """`make_source(**config)` writes a random source and returns its folder."""
    count = 0

    def make(**settings: Any) -> Path:
        nonlocal count
        count += 1
        return write_source(tmp_path / f"source{count}", **settings)

    return make


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """`edit_config(folder, key=value)` changes config.json; a value of None removes the key."""

    def edit(folder: Path, **changes: Any) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config.update(changes)
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return edit
