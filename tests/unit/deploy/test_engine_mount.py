"""Whether an engine is one, and lies where the repository looks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trtkit.deploy import engine_mount
from trtkit.errors import InputError

ENGINE = {
    "version": "1.2.1",
    "pretrained_config": {"architecture": "LlamaForCausalLM", "mapping": {}},
    "build_config": {},
}


def repository(root: Path, text: str) -> Path:
    (root / "models" / "tensorrt_llm").mkdir(parents=True)
    (root / "models" / "tensorrt_llm" / "config.pbtxt").write_text(text)
    return root / "models"


def looking_at(root: Path, path: str) -> Path:
    value = f'parameters {{ key: "gpt_model_path" value {{ string_value: "{path}" }} }}'
    return repository(root, f'name: "tensorrt_llm" backend: "tensorrtllm" {value}')


def engine(root: Path, config: object = ENGINE) -> Path:
    (root / "engine").mkdir()
    (root / "engine" / "config.json").write_text(json.dumps(config))
    (root / "engine" / "rank0.engine").write_bytes(b"1")
    return root / "engine"


def test_what_fits(tmp_path: Path) -> None:
    models, folder = looking_at(tmp_path, "/engines/"), engine(tmp_path)
    assert engine_mount.check(models, folder, "/engines") == []
    assert engine_mount.check(models.parent, folder, "/anywhere") == []  # no TensorRT-LLM model in there


def test_an_engine_inside_the_repository_needs_no_mount(tmp_path: Path) -> None:
    models = looking_at(tmp_path, str(tmp_path / "models" / "engine"))
    assert engine_mount.check(models, None, str(models)) == []


def test_a_model_that_is_told_otherwise(tmp_path: Path) -> None:
    assert engine_mount.check(repository(tmp_path, 'backend: "python"'), None, None) == []


def test_what_does_not_exist_yet(tmp_path: Path) -> None:
    found = engine_mount.check(tmp_path / "no", tmp_path / "nosuch", "/e")
    assert [(one.severity, one.cause) for one in found] == [
        ("warning", f"no model repository at {tmp_path / 'no'}"),
        ("warning", f"no engine at {tmp_path / 'nosuch'}"),
    ]


def test_another_place(tmp_path: Path) -> None:
    models, folder = looking_at(tmp_path, "/engines/a"), engine(tmp_path)
    with pytest.raises(InputError, match=r"at '/engines/a' .* mounted at '/engines/b'") as refused:
        engine_mount.check(models, folder, "/engines/b")
    assert "--model-path-in-container /engines/a" in refused.value.fix
    with pytest.raises(InputError, match="mounted at '/engines/b'") as refused:
        engine_mount.check(models, tmp_path / "nosuch", "/engines/b")
    assert refused.value.fix.endswith(f"there is nothing at {tmp_path / 'nosuch'}")
    with pytest.raises(InputError, match="none is given") as refused:
        engine_mount.check(models, None, None)
    assert refused.value.fix == "give --engine DIR"


def test_an_unreadable_config(tmp_path: Path) -> None:
    models = repository(tmp_path, 'backend: "python"\nnonsense: {')
    with pytest.raises(InputError, match=r"config\.pbtxt:2: .*no field named"):
        engine_mount.check(models, None, None)
    (models / "tensorrt_llm" / "config.pbtxt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"cannot read .*config\.pbtxt"):
        engine_mount.check(models, None, None)


def test_an_engine_without_a_rank(tmp_path: Path) -> None:
    models, folder = looking_at(tmp_path, "/engines"), engine(tmp_path)
    (folder / "rank0.engine").unlink()
    with pytest.raises(InputError, match=r"rank0\.engine is missing or empty"):
        engine_mount.check(models, folder, "/engines")


@pytest.mark.parametrize(
    ("config", "said"),
    [({"architecture": "x", "dtype": "float16"}, "holds a checkpoint and no engine"), ([], "holds something else")],
)
def test_what_is_no_engine(tmp_path: Path, config: object, said: str) -> None:
    folder = engine(tmp_path, config)
    with pytest.raises(InputError, match=said):
        engine_mount.check(tmp_path, folder, "/e")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        engine_mount.check(tmp_path, folder, "/e")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        engine_mount.check(tmp_path, folder, "/e")
