"""Which kind of thing a path is, and what cannot be one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtkit.errors import InputError
from trtkit.inspect import (
    inspect_folder,
    inspect_path,
)

# What a path is


def nothing(folder: Path) -> str:
    return "is empty"


def strangers(folder: Path) -> str:
    for name in "abcd":
        (folder / f"{name}.txt").touch()
    return r"holds nothing that trtkit knows \(a\.txt, b\.txt, c\.txt and 1 more\)"


def other_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"debug": true}')
    return r"config\.json is neither a model's nor"


def broken_config(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return r"config\.json: not valid JSON"


def dangling(folder: Path) -> str:
    (folder / "config.json").symlink_to("nowhere")
    return "a link to a file that does not exist"


def ranks_without_config(folder: Path) -> str:
    (folder / "rank0.safetensors").touch()
    return r"cannot read .*config\.json"


def weights_without_config(folder: Path) -> str:
    (folder / "model.safetensors").touch()
    return r"cannot read .*config\.json"


def source_and_engine(folder: Path) -> str:
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "rank0.engine").touch()
    return r"ambiguous \(source: config\.json has architectures; engine: rank0\.engine is there\)"


def source_and_repository(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "a").mkdir()
    (folder / "a" / "config.pbtxt").touch()
    return r"ambiguous \(source: .*; repository: a/config\.pbtxt is there\)"


def both_keys(folder: Path) -> str:
    (folder / "config.json").write_text('{"architectures": ["A"], "architecture": "A"}')
    return r"ambiguous \(checkpoint: .*; source: "


def one_model(folder: Path) -> str:
    (folder / "config.pbtxt").touch()
    return "is one model of a repository"


FOLDERS = [
    nothing, strangers, other_config, broken_config, dangling, ranks_without_config, weights_without_config,
    source_and_engine, source_and_repository, both_keys, one_model,
]  # fmt: skip


@pytest.mark.parametrize("make", FOLDERS)
def test_folders_that_are_nothing_or_several_things(make: Callable[[Path], str], tmp_path: Path) -> None:
    message = make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        inspect_folder(tmp_path)
    assert caught.value.fix and "\n" not in caught.value.cause
    if "ambiguous" in message:
        assert "--kind" in caught.value.fix


def test_kind_settles_what_is_ambiguous(make_source: Any) -> None:
    folder = make_source()
    (folder / "rank0.engine").touch()
    with pytest.raises(InputError, match="ambiguous"):
        inspect_folder(folder)
    assert inspect_folder(folder, kind="source").kind == "source"
    with pytest.raises(InputError, match="holds something else and no engine"):
        inspect_folder(folder, kind="engine")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("model.safetensors", "give the folder"),
        ("rank0.engine", "give the folder"),
        ("config.pbtxt", "model repository"),
        ("llama.yaml", "trtkit config check"),
        ("notes", "give a folder, or a hub id"),
    ],
)
def test_a_file_is_told_from_a_folder(name: str, fix: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="is a file, not a folder") as caught:
        inspect_path(str(tmp_path / name))
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("/no/such/folder", {}, "does not exist"),
        ("a\0b", {}, "does not exist|is no path"),
        ("x" * 5000, {}, "cannot read|does not exist"),
        ("~no-such-user-here/x", {}, "is no path"),
        (".", {"revision": "main"}, "is a local folder, which has no revision 'main'"),
        ("owner/name", {"kind": "engine"}, "does not exist"),
        ("s3://bucket/model", {"revision": "main"}, "has no revisions"),
        ("s3://key:secret@bucket", {}, "holds credentials"),
    ],
)
def test_paths_that_cannot_be(path: str, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        inspect_path(path, **options)
    assert "secret" not in caught.value.cause and len(caught.value.cause) < 500
