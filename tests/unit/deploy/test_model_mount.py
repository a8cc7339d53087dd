"""What a container must see beside the repository: whether it is what the models name, and lies where they look."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from trtkit.config_file import parse_config
from trtkit.deploy import model_mount
from trtkit.docker_cli import Mount
from trtkit.errors import InputError
from trtkit.repository.generate import render_repository, write_repository

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
    assert model_mount.check(models, folder, "/engines") == ([Mount(folder, "/engines")], {}, [])
    anywhere = model_mount.check(models.parent, folder, "/anywhere")  # no TensorRT-LLM model in there
    assert anywhere == ([Mount(folder, "/anywhere")], {}, [])


def test_an_engine_that_lies_where_the_repository_looks_is_mounted_there(tmp_path: Path) -> None:
    folder = engine(tmp_path)
    models = looking_at(tmp_path, f"{folder}/")
    assert model_mount.check(models, None, None) == ([Mount(folder, str(folder))], {}, [])
    (folder / "rank0.engine").unlink()
    with pytest.raises(InputError, match=r"rank0\.engine is missing or empty"):
        model_mount.check(models, None, None)


def test_an_engine_inside_the_repository_needs_no_mount(tmp_path: Path) -> None:
    models = looking_at(tmp_path, str(tmp_path / "models" / "engine"))
    assert model_mount.check(models, None, str(models)) == ([], {}, [])


def test_a_model_that_is_told_otherwise(tmp_path: Path) -> None:
    assert model_mount.check(repository(tmp_path, 'backend: "python"'), None, None) == ([], {}, [])


def test_what_does_not_exist_yet(tmp_path: Path) -> None:
    _, _, found = model_mount.check(tmp_path / "no", tmp_path / "nosuch", "/e")
    assert [(one.severity, one.cause) for one in found] == [
        ("warning", f"no model repository at {tmp_path / 'no'}"),
        ("warning", f"no engine at {tmp_path / 'nosuch'}"),
    ]


def test_another_place(tmp_path: Path) -> None:
    models, folder = looking_at(tmp_path, "/engines/a"), engine(tmp_path)
    with pytest.raises(InputError, match=r"at '/engines/a' .* mounted at '/engines/b'") as refused:
        model_mount.check(models, folder, "/engines/b")
    assert "--model-path-in-container /engines/a" in refused.value.fix
    with pytest.raises(InputError, match="mounted at '/engines/b'") as refused:
        model_mount.check(models, tmp_path / "nosuch", "/engines/b")
    assert refused.value.fix.endswith(f"there is nothing at {tmp_path / 'nosuch'}")
    with pytest.raises(InputError, match="none is given") as refused:
        model_mount.check(models, None, None)
    assert refused.value.fix == "give --engine DIR"


def test_an_unreadable_config(tmp_path: Path) -> None:
    models = repository(tmp_path, 'backend: "python"\nnonsense: {')
    with pytest.raises(InputError, match=r"config\.pbtxt:2: .*no field named"):
        model_mount.check(models, None, None)
    (models / "tensorrt_llm" / "config.pbtxt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"cannot read .*config\.pbtxt"):
        model_mount.check(models, None, None)


def test_an_engine_without_a_rank(tmp_path: Path) -> None:
    models, folder = looking_at(tmp_path, "/engines"), engine(tmp_path)
    (folder / "rank0.engine").unlink()
    with pytest.raises(InputError, match=r"rank0\.engine is missing or empty"):
        model_mount.check(models, folder, "/engines")


@pytest.mark.parametrize(
    ("config", "said"),
    [({"architecture": "x", "dtype": "float16"}, "holds a checkpoint and no engine"), ([], "holds something else")],
)
def test_what_is_no_engine(tmp_path: Path, config: object, said: str) -> None:
    folder = engine(tmp_path, config)
    with pytest.raises(InputError, match=said):
        model_mount.check(tmp_path, folder, "/e")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        model_mount.check(tmp_path, folder, "/e")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        model_mount.check(tmp_path, folder, "/e")


# Hugging Face checkpoints

LOADERS = [("llmapi", ""), ("llmapi", "topology: fused"), ("vllm", ""), ("vllm", "topology: fused")]
by_loader = pytest.mark.parametrize(("runtime", "serving"), LOADERS)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As much of a Hugging Face checkpoint as generating a repository reads."""
    folder = tmp_path / "a checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    tokenizer = Path(__file__).parents[3] / "examples" / "tiny-llama" / "tokenizer.json"
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    return folder


def generated(root: Path, source: object, runtime: str, serving: str, tokenizer: Path, **model: Any) -> Path:
    given = json.dumps({"source": str(source), **model})
    text = f"name: m\nmodel: {given}\nserving: {{runtime: {runtime}, {serving}}}\ndeploy: {{target: docker}}\n"
    write_repository(render_repository(parse_config(text), tokenizer_dir=tokenizer), root / "models")
    return root / "models"


@by_loader
def test_a_checkpoint_of_this_machine(runtime: str, serving: str, checkpoint: Path, tmp_path: Path) -> None:
    models = generated(tmp_path, checkpoint, runtime, serving, checkpoint)
    assert model_mount.check(models, None, None) == ([Mount(checkpoint, str(checkpoint))], {}, [])
    assert model_mount.check(models, checkpoint, None) == ([Mount(checkpoint, str(checkpoint))], {}, [])
    with pytest.raises(InputError, match=r"looks for the checkpoint at .* mounted at '/elsewhere'"):
        model_mount.check(models, checkpoint, "/elsewhere")
    (checkpoint / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        model_mount.check(models, None, None)
    (checkpoint / "tokenizer.json").unlink()
    checkpoint.rmdir()
    with pytest.raises(InputError, match="none is given") as refused:
        model_mount.check(models, None, None)
    assert refused.value.fix == "give --checkpoint DIR"


@by_loader
@pytest.mark.parametrize("revision", [None, "0123abcd"])
def test_a_model_of_the_hub(
    runtime: str,
    serving: str,
    revision: str | None,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    models = generated(tmp_path, "some/model", runtime, serving, checkpoint, revision=revision)
    folder = tmp_path / "cache" / "models--some--model"
    mounts, _, (finding,) = model_mount.check(models, None, None)
    assert (mounts, finding.id) == ([], "TK763")
    assert finding.fix == f"download it: hf download some/model{f' --revision {revision}' if revision else ''}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("4567")
    (folder / "snapshots" / "0123abcd").mkdir(parents=True)
    mounts, environment, findings = model_mount.check(models, None, None)
    assert mounts == [Mount(folder, "/hub/models--some--model")]
    assert environment == {"HF_HUB_CACHE": "/hub", "HF_HUB_OFFLINE": "1"}
    assert findings == []
    other = generated(tmp_path, "some/model", runtime, serving, checkpoint, revision="ffff")
    assert [one.id for one in model_mount.check(other, None, None)[2]] == ["TK763"]


def test_the_cache_that_is_mounted_is_one_that_the_hub_client_reads_offline(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mount as a link: what huggingface_hub finds with the variables that the container gets."""
    import huggingface_hub

    folder = tmp_path / "cache" / "models--some--model"
    for name in ("refs", "blobs", "snapshots/4567"):
        (folder / name).mkdir(parents=True)
    (folder / "refs" / "main").write_text("4567")
    (folder / "blobs" / "aa").write_text("{}")
    (folder / "snapshots" / "4567" / "config.json").symlink_to("../../blobs/aa")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    models = generated(tmp_path, "some/model", "vllm", "", checkpoint)
    ((mount,), _, _) = model_mount.check(models, None, None)
    inside = tmp_path / "inside" / Path(mount.target).name
    inside.parent.mkdir()
    inside.symlink_to(mount.source)
    found = huggingface_hub.snapshot_download("some/model", cache_dir=inside.parent, local_files_only=True)
    assert (Path(found) / "config.json").read_text() == "{}"


def test_adapters_that_are_here_are_mounted_where_the_config_says(checkpoint: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    models = generated(tmp_path, checkpoint, "vllm", "", checkpoint)
    mounts, _, _ = model_mount.check(models, None, None, (str(adapter), "/not/here", "some/hub-id"))
    assert mounts == [Mount(checkpoint, str(checkpoint)), Mount(adapter, str(adapter))]


def test_arguments_that_are_no_json(checkpoint: Path, tmp_path: Path) -> None:
    models = generated(tmp_path, checkpoint, "vllm", "", checkpoint)
    (models / "vllm_model" / "1" / "model.json").write_text("{")
    with pytest.raises(InputError, match=r"model\.json cannot be read"):
        model_mount.check(models, None, None)
