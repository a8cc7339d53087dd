"""The generator: what both runtimes share, what the build config decides, and what is never overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trtkit import pbtxt
from trtkit.cli.repo import command
from trtkit.config import BuildConfig
from trtkit.config_file import load_config, parse_config
from trtkit.errors import CheckFailedError, InputError
from trtkit.repository.generate import MARKER, Files, is_generated, render_repository, write_repository
from trtkit.repository.lint import lint_repository

ROOT = Path(__file__).parents[3]


def config_of(runtime: str = "reference", more: str = "", **serving: Any) -> BuildConfig:
    values = {"runtime": runtime, **serving}
    return parse_config(f"name: t\nmodel: {{source: x}}\n{more}serving: {json.dumps(values)}\n")


def render(source: Path, runtime: str = "reference", more: str = "", **serving: Any) -> Files:
    config = config_of(runtime, more, **serving)
    return render_repository(config, tokenizer_dir=source, model_path_in_container="/models/weights")


def message(files: Files, model: str) -> Any:
    text = files[f"{model}/config.pbtxt"]
    assert isinstance(text, str)
    return pbtxt.loads(text)


def parameters(files: Files, model: str) -> dict[str, str]:
    return {key: value.string_value for key, value in message(files, model).parameters.items()}


@pytest.mark.parametrize("streaming", [True, False])
def test_the_runtimes_differ_only_in_the_tensorrt_llm_model(source: Path, streaming: bool) -> None:
    one = render(source, "reference", streaming=streaming)
    other = render(source, "tensorrtllm", streaming=streaming)
    differing = {name for name in {*one, *other} if one.get(name) != other.get(name)}
    assert differing
    assert all(name.startswith("tensorrt_llm/") for name in differing)


COMMON = ("metrics", "streams", "tables", "text")


def test_the_files(source: Path) -> None:
    assert sorted(render(source)) == [
        "ensemble/1/.gitkeep",
        "ensemble/config.pbtxt",
        "llm/1/model.py",
        *(f"llm/1/serving/{name}.py" for name in ("__init__", "answers", "asks", "chat", "decoding", "engine")),
        "llm/1/serving/engines/__init__.py",
        "llm/1/serving/engines/triton.py",
        *(f"llm/1/serving/{name}.py" for name in ("kept", "llm", "mailbox", "metrics", "outbox")),
        *(
            f"llm/1/serving/{name}.py"
            for name in ("reader", "settings", "stops", "streams", "tables", "templates", "text")
        ),
        "llm/1/tokenizer/generation_config.json",
        "llm/1/tokenizer/tokenizer.json",
        "llm/1/tokenizer/tokenizer_config.json",
        "llm/config.pbtxt",
        "postprocessing/1/model.py",
        "postprocessing/1/serving/__init__.py",
        *(f"postprocessing/1/serving/{name}.py" for name in ("decoding", "kept", "keyed", *COMMON)),
        "postprocessing/1/tokenizer/tokenizer.json",
        "postprocessing/config.pbtxt",
        "preprocessing/1/model.py",
        *(
            f"preprocessing/1/serving/{name}.py"
            for name in ("__init__", "decoding", "kept", *COMMON[:3], "tensors", COMMON[3])
        ),
        "preprocessing/1/tokenizer/generation_config.json",
        "preprocessing/1/tokenizer/tokenizer.json",
        "preprocessing/1/tokenizer/tokenizer_config.json",
        "preprocessing/config.pbtxt",
        "tensorrt_llm/1/model.py",
        "tensorrt_llm/config.pbtxt",
        MARKER,
    ]


@pytest.mark.parametrize("runtime", ["reference", "tensorrtllm"])
def test_serving_settings_reach_the_models(source: Path, runtime: str) -> None:
    files = render(
        source,
        runtime,
        max_batch_size=16,
        max_queue_delay_microseconds=700,
        preferred_batch_size=[4, 8],
        max_queue_size=99,
        preprocessing_instances=3,
        add_special_tokens=False,
        streaming=False,
    )
    for model in ("preprocessing", "tensorrt_llm"):
        batching = message(files, model).dynamic_batching
        assert list(batching.preferred_batch_size) == [4, 8]
        assert batching.max_queue_delay_microseconds == 700
        assert batching.default_queue_policy.max_queue_size == 99
    counts = {}
    for model in ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble"):
        config = message(files, model)
        assert config.name == model
        assert config.max_batch_size == 16
        assert config.model_transaction_policy.decoupled is False
        assert config.HasField("model_transaction_policy")
        counts[model] = sum(group.count for group in config.instance_group)
    assert counts == {"preprocessing": 3, "tensorrt_llm": 1, "postprocessing": 1, "ensemble": 0}
    assert parameters(files, "preprocessing")["add_special_tokens"] == "false"


def test_streaming_decouples_the_llm_and_with_it_the_ensemble(source: Path) -> None:
    files = render(source)
    models = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble")
    decoupled = [message(files, model).model_transaction_policy.decoupled for model in models]
    assert decoupled == [False, True, False, True]


def test_parameters_of_the_engine(source: Path) -> None:
    files = render(
        source,
        "tensorrtllm",
        more="engine: {max_beam_width: 2}\n",
        kv_cache_free_gpu_mem_fraction=0.5,
        enable_kv_cache_reuse=False,
        enable_chunked_context=True,
    )
    found = parameters(files, "tensorrt_llm")
    expected = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": "/models/weights",
        "max_beam_width": "2",
        "kv_cache_free_gpu_mem_fraction": "0.5",
        "enable_kv_cache_reuse": "false",
        "enable_chunked_context": "true",
        "exclude_input_in_output": "true",
    }
    assert expected.items() <= found.items()
    assert message(files, "tensorrt_llm").backend == "tensorrtllm"
    assert files["tensorrt_llm/1/.gitkeep"] == ""


def test_parameters_of_the_reference_runtime(source: Path) -> None:
    assert parameters(render(source), "tensorrt_llm") == {
        "checkpoint_dir": "/models/weights",
        "end_ids": "1,2",
        "exclude_input_in_output": "true",
    }
    longer = render(source, more="engine: {max_seq_len: 2048}\n")
    assert parameters(longer, "tensorrt_llm")["max_seq_len"] == "2048"


def test_all_end_ids_reach_preprocessing(source: Path) -> None:
    found = parameters(render(source), "preprocessing")
    assert (found["end_ids"], found["pad_id"]) == ("1,2", "1")
    (source / "generation_config.json").unlink()
    (source / "config.json").write_text('{"eos_token_id": 9}')
    found = parameters(render(source), "preprocessing")
    assert (found["end_ids"], found["pad_id"]) == ("9", "9")
    (source / "config.json").unlink()
    found = parameters(render(source), "preprocessing")
    assert (found["end_ids"], found["pad_id"]) == ("", "0")


def test_a_local_model_path_becomes_absolute(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = render_repository(config_of(), tokenizer_dir=source, checkpoint_dir=Path("ckpt"))
    assert parameters(files, "tensorrt_llm")["checkpoint_dir"] == str(tmp_path / "ckpt")


@pytest.mark.parametrize(("runtime", "flag"), [("reference", "--checkpoint"), ("tensorrtllm", "--engine")])
def test_the_runtime_needs_its_folder(source: Path, tmp_path: Path, runtime: str, flag: str) -> None:
    other = {"engine_dir": tmp_path} if runtime == "reference" else {"checkpoint_dir": tmp_path}
    with pytest.raises(InputError) as caught:
        render_repository(config_of(runtime), tokenizer_dir=source, **other)
    assert flag in caught.value.fix


def test_a_source_without_tokenizer_json(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no readable tokenizer\.json"):
        render(source)


@pytest.mark.parametrize("runtime", ["reference", "tensorrtllm"])
def test_what_is_generated_passes_the_linter(source: Path, tmp_path: Path, runtime: str) -> None:
    write_repository(render(source, runtime), tmp_path / "out")
    assert [finding.id for finding in lint_repository(tmp_path / "out")] == ["TK131"]  # /models/weights is not here


def snapshot(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_generating_again_replaces_the_whole_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = render(source)
    write_repository(files, out)
    (out / "stale").mkdir()
    write_repository(files, out)
    assert snapshot(out) == {k: v.encode() if isinstance(v, str) else v for k, v in files.items()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_foreign_folder_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    write_repository(render(source), out)  # an empty folder is nobody's
    assert is_generated(out)
    (out / MARKER).write_text("[]")
    before = snapshot(out)
    with pytest.raises(InputError, match="trtkit did not generate it"):
        write_repository(render(source), out)
    assert snapshot(out) == before
    write_repository(render(source), out, force=True)
    assert is_generated(out)


def test_a_repository_with_errors_is_not_published(source: Path, tmp_path: Path) -> None:
    files = {**render(source), "preprocessing/1/model.py": "def broken(:"}
    with pytest.raises(CheckFailedError, match="TK108"):
        write_repository(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run(*args: object) -> Any:
    return CliRunner().invoke(command, [str(arg) for arg in args], standalone_mode=True)


@pytest.fixture
def config_file(tmp_path: Path, source: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(f"name: t\nmodel: {{source: {source}}}\nserving: {{runtime: reference}}\n")
    return file


def test_cli_generate_and_lint(config_file: Path, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    checkpoint.mkdir()
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), 4)
    sizes |= dict.fromkeys(("num_key_value_heads", "head_size", "intermediate_size", "max_position_embeddings"), 4)
    config = {"architecture": "LlamaForCausalLM", "dtype": "float16", **sizes, "mapping": {}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "rank0.safetensors").write_bytes(b"")
    dry = run("generate", config_file, "--checkpoint", checkpoint, "-o", out, "--dry-run", "--json")
    assert dry.exit_code == 0
    assert not out.exists()
    done = run("generate", config_file, "--checkpoint", checkpoint, "-o", out, "--json")
    planned, written = json.loads(dry.stdout), json.loads(done.stdout)
    assert (planned.pop("written"), written.pop("written")) == (False, True)
    assert planned == written
    assert written["files"] == {name: len(content) for name, content in snapshot(out).items()}
    good = run("lint", out, "--json")
    assert (good.exit_code, json.loads(good.stdout)) == (0, [])
    (checkpoint / "rank0.safetensors").unlink()
    bad = run("lint", out)
    assert bad.exit_code == 1
    assert "error TK133" in bad.stdout


def test_cli_dry_run_refuses_what_the_real_run_refuses(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "precious").write_text("x")
    arguments = ["generate", config_file, "--model-path-in-container", "/models/x", "-o", out]
    for extra in ([], ["--dry-run"]):
        error = run(*arguments, *extra).exception
        assert isinstance(error, InputError), extra
        assert "trtkit did not generate it" in error.cause
    assert run(*arguments, "--dry-run", "--force").exit_code == 0
    assert (out / "precious").exists()


@pytest.mark.parametrize("path", ["rel/path", "./x", ""])
def test_the_path_in_the_container_is_absolute(source: Path, path: str) -> None:
    with pytest.raises(InputError, match="is not absolute"):
        render_repository(config_of(), tokenizer_dir=source, model_path_in_container=path)


def test_a_repository_for_another_machine_is_generated_although_its_checkpoint_is_not_here(
    source: Path, tmp_path: Path
) -> None:
    files = render_repository(config_of(), tokenizer_dir=source, model_path_in_container=str(tmp_path / "checkpoint"))
    write_repository(files, tmp_path / "out")
    assert [finding.id for finding in lint_repository(tmp_path / "out")] == ["TK138"]


def test_cli_lint_rules_are_the_table() -> None:
    from trtkit.repository.lint.rules import RULES

    rows = json.loads(run("lint", "--rules", "--json").stdout)
    assert {row["id"]: (row["severity"], row["title"]) for row in rows} == RULES
    assert run("lint").exit_code == 2


def test_the_example_repository_is_what_the_generator_makes() -> None:
    config = load_config(ROOT / "build_configs" / "tiny-llama.yaml")
    files = render_repository(
        config, tokenizer_dir=Path(config.model.source), model_path_in_container="/models/checkpoint"
    )
    expected = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
    kept = snapshot(ROOT / "model_repository")
    explained = kept.pop("README.md").decode()
    assert kept == expected, (
        "run: trtkit repo generate build_configs/tiny-llama.yaml -o model_repository"
        " --model-path-in-container /models/checkpoint"
    )
    assert not any(str(ROOT).encode() in content for content in expected.values())
    for name in expected:
        folder = f"`{name.rpartition('/')[0]}/`"
        assert f"`{name}`" in explained or folder in explained, f"README.md does not explain {name}"


def test_cli_looks_into_the_store_that_is_named(
    make_source: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtkit.cli.build import command as build

    monkeypatch.setenv("TRTKIT_STORE", str(tmp_path / "default"))
    file, store = tmp_path / "c.yaml", tmp_path / "store"
    file.write_text(f"name: t\nmodel: {{source: {make_source()}}}\nserving: {{runtime: reference}}\n")
    built = CliRunner().invoke(build, [str(file), "--store", str(store), "--json"])
    assert built.exit_code == 0, built.output
    arguments = ["generate", file, "--tokenizer", source, "-o", tmp_path / "out"]
    lacking = run(*arguments).exception
    assert isinstance(lacking, InputError) and "no finished checkpoint" in lacking.cause
    assert run(*arguments, "--store", store).exit_code == 0
    (checkpoint,) = [Path(one["checkpoint"]) for one in json.loads(built.stdout)]
    assert checkpoint.is_relative_to(store)
    assert f'string_value: "{checkpoint}"' in (tmp_path / "out" / "tensorrt_llm" / "config.pbtxt").read_text()


@pytest.mark.parametrize("kind", ["checkpoint", "engine"])
def test_cli_refuses_a_folder_of_something_else(kind: str, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for text in (None, "{}", "[1]"):
        if text is not None:
            (tmp_path / "other" / "config.json").write_text(text)
        error = run("generate", config_file, f"--{kind}", tmp_path / "other", "-o", tmp_path / "out").exception
        assert isinstance(error, InputError) and str(tmp_path / "other") in error.cause
