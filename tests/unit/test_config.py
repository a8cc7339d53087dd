from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trtkit.config import BuildConfig
from trtkit.config_file import config_schema, load_config, parse_config
from trtkit.errors import InputError
from trtkit.hf import is_hub_id

SMALL = "name: small\nmodel: {source: owner/name}\n"


def problems(text: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_config(text, "f.yaml")
    assert caught.value.fix
    return caught.value.cause.splitlines()


def test_the_smallest_config_takes_every_default() -> None:
    config = parse_config(SMALL)
    assert config == BuildConfig.model_validate({"name": "small", "model": {"source": "owner/name"}})
    assert (config.engine.builder, config.serving.runtime, config.deploy.host) == ("docker", "tensorrtllm", "127.0.0.1")
    assert not config.model.trust_remote_code


def test_what_a_config_says_can_be_written_and_read_back() -> None:
    config = parse_config(
        SMALL + "loadtest: {slow: {request_rate: 0.5, arrival: constant}}\nserving: {streaming: false}\n"
    )
    assert parse_config(yaml.safe_dump(config.model_dump())) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\n", ["f.yaml:1: required key 'model' is missing"]),
        ("name: x\nmodel:\n  revision: a\n", ["f.yaml:2: required key 'model.source' is missing"]),
        (SMALL + "sevring: {}\n", ["f.yaml:3: unknown key 'sevring', did you mean 'serving'?"]),
        (
            SMALL + "checkpoint:\n  tp: 2\n  zzz: 1\n",
            ["f.yaml:5: unknown key 'checkpoint.zzz'; valid here: dtype, tp, pp, ep, parallel_embedding"],
        ),
        (
            SMALL + "checkpoint:\n  dtype: auto\n  tp: 65\n",
            ["f.yaml:5: checkpoint.tp: input should be less than or equal to 64 (given: 65); valid: 1 to 64"],
        ),
        (
            SMALL + "engine:\n  builder: dokcer\n",
            ["f.yaml:4: engine.builder: input should be 'local' or 'docker' (given: 'dokcer')"],
        ),
        (
            SMALL + "engine: {max_batch_size: true}\n",
            ["f.yaml:3: engine.max_batch_size: input should be a valid integer"],
        ),
        (
            SMALL + 'engine: {max_batch_size: "8"}\n',
            ["f.yaml:3: engine.max_batch_size: input should be a valid integer"],
        ),
        (SMALL + "serving: {streaming: 1}\n", ["f.yaml:3: serving.streaming: input should be a valid boolean"]),
        (
            SMALL + "loadtest:\n  a:\n    concurrency: 1\n    concurency: 3\n",
            ["f.yaml:6: unknown key 'loadtest.a.concurency', did you mean 'concurrency'?"],
        ),
        (
            SMALL + "serving:\n  preferred_batch_size:\n    - 1\n    - x\n",
            ["f.yaml:6: serving.preferred_batch_size.1: input should be a valid integer (given: 'x'); valid: 1 or"],
        ),
        (SMALL + "deploy:\n  ready_timeout_s: .nan\n", ["f.yaml:4: deploy.ready_timeout_s: input should be"]),
        (SMALL + "loadtest: {}\n", ["f.yaml:3: loadtest: at least one scenario is needed"]),
        (
            SMALL + "deploy:\n  release: 25.10\n",
            ["f.yaml:4: deploy.release: input should be a valid string (given: 25.1); put it in quotes"],
        ),
        ("name: ../x\nmodel: {source: a}\n", ["f.yaml:1: name: string should match pattern"]),
        ('name: "x\\n"\nmodel: {source: a}\n', ["f.yaml:1: name: string should match pattern"]),
    ],
)
def test_a_problem_is_named_with_its_line(text: str, expected: list[str]) -> None:
    found = problems(text)
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


def test_every_problem_is_named_at_once() -> None:
    found = problems("name: a b\nmodel: {source: ''}\nengine:\n  workers: 0\n  wokers: 1\nx: 1\n")
    assert [line.split(": ")[0] for line in found] == ["f.yaml:1", "f.yaml:2", "f.yaml:4", "f.yaml:5", "f.yaml:6"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (SMALL + "engine:\n  max_input_len: 64\n  max_seq_len: 64\n", 5, "engine: max_seq_len (64)"),
        (
            SMALL + "serving:\n  streaming: true\n  max_batch_size: 65\n",
            5,
            "serving.max_batch_size (65) exceeds engine",
        ),
        (
            SMALL + "serving:\n  streaming: true\n  preferred_batch_size: [4, 99]\n",
            5,
            "preferred_batch_size 99 exceeds",
        ),
        (SMALL + "loadtest:\n  a: {}\n", 4, "give either concurrency (closed loop) or request_rate (open loop)"),
        (SMALL + "loadtest:\n  a: {concurrency: 1, request_rate: 2.0}\n", 4, "give either concurrency"),
    ],
)
def test_settings_that_contradict_each_other(text: str, line: int, words: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"f.yaml:{line}: ")
    assert words in problem


def test_only_an_engine_limits_the_batch() -> None:
    assert parse_config(SMALL + "serving: {runtime: reference, max_batch_size: 65}\n").serving.max_batch_size == 65


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: [", "f.yaml:1: not valid YAML"),
        ("name: x\n\tmodel: 1\n", "f.yaml:2: not valid YAML"),
        ("---\n---\n", "f.yaml:2: not valid YAML"),
        ("\x00", "f.yaml: not valid YAML"),
        ("? [a]\n: 1\n", "f.yaml:1: not valid YAML"),
        ("!!python/object/apply:os.system [exit]", "f.yaml:1: not valid YAML: could not determine a constructor"),
        ("", "f.yaml: a build config is a mapping of keys"),
        ("[]", "f.yaml: a build config is a mapping of keys"),
        ("just text", "f.yaml: a build config is a mapping of keys"),
        ("[" * 5000, "f.yaml: nested too deeply"),
        ("name: a\nmodel: {source: a}\nname: b\n", "f.yaml:3: key 'name' is given twice"),
        ("name: a\nmodel:\n  source: a\n  source: b\n", "f.yaml:4: key 'source' is given twice"),
        (SMALL + "serving:\n  - {a: 1,\n     a: 2}\n", "f.yaml:5: key 'a' is given twice"),
    ],
)
def test_texts_that_are_no_config(text: str, problem: str) -> None:
    assert problems(text)[0].startswith(problem)


def test_keys_are_shown_without_their_control_characters() -> None:
    assert problems(SMALL + '"a\\eb\\nc": 1\n')[0].startswith(r"f.yaml:3: unknown key 'a\x1bb\nc'; valid here:")
    assert problems('{"a\\n": 1, "a\\n": 2}') == [r"f.yaml:1: key 'a\n' is given twice"]


def test_an_alias_that_holds_itself() -> None:
    assert problems("name: x\nmodel: &m\n  source: a\n  revision: *m\n") == [
        "f.yaml:4: model.revision: input should be a valid string"
    ]


def test_a_few_aliases_cannot_stand_for_billions_of_values() -> None:
    lines = ["a: &a0 [x]"] + [f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 40)]
    assert len(problems(SMALL + "\n".join(lines))) == 40


@settings(deadline=None)
@given(st.text(alphabet="{}[]:,&*!?|>-'\"#%@` \n\tab1.") | st.text())
def test_any_text_is_a_config_or_an_error_for_the_user(text: str) -> None:
    try:
        parse_config(text)
    except InputError as error:
        assert error.cause
        assert error.fix


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=10,
)
sections = st.sampled_from([*BuildConfig.model_fields, "mdoel", ""])
keys = st.sampled_from(
    ["source", "tp", "max_batch_size", "max_seq_len", "runtime", "release", "prompts", "default", "nonsense"]
)


@settings(deadline=None)
@given(st.dictionaries(sections, json_values | st.dictionaries(keys, json_values, max_size=3), max_size=6))
def test_wrong_values_are_errors_for_the_user(data: dict[str, Any]) -> None:
    try:
        parse_config(yaml.safe_dump(data), "f.yaml")
    except InputError as error:
        assert all(line.startswith("f.yaml") for line in error.cause.splitlines())


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        parse_config(SMALL).engine.workers = 2  # type: ignore[misc]


def test_a_source_beside_the_file_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "weights").mkdir()
    file = tmp_path / "configs" / "c.yaml"
    file.write_text("name: x\nmodel: {source: ../weights}\n")
    monkeypatch.chdir("/")
    assert load_config(file).model.source == str(tmp_path / "weights")
    (tmp_path / "weights").rmdir()
    assert load_config(file).model.source == "../weights"


def test_a_source_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    assert parse_config("name: x\nmodel: {source: ~/weights}\n").model.source == str(tmp_path / "weights")


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_a_file_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "c.yaml"
    if kind == "folder":
        file.mkdir()
    if kind == "binary":
        file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"cannot read .*c\.yaml") as caught:
        load_config(file)
    assert "trtkit config ls" in caught.value.fix


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("gpt2", True), ("meta-llama/Llama-3.1-8B", True), ("a/b_c.d-e", True),
        ("", False), ("./a", False), ("../a/b", False), ("/a/b", False), ("a/b/c", False), ("a/", False),
        ("-a/b", False), ("a b/c", False), ("a/b\n", False),
    ],
)  # fmt: skip
def test_hub_ids(source: str, expected: bool) -> None:
    assert is_hub_id(source) is expected


def test_the_schema_describes_every_key() -> None:
    schema = config_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    for part in [schema, *schema["$defs"].values()]:
        assert part["additionalProperties"] is False
        assert part["description"]


@pytest.mark.parametrize(
    ("gpus", "ids"), [("all", None), ("0", ["0"]), ("0,2", ["0", "2"]), ("GPU-1a,MIG-b", ["GPU-1a", "MIG-b"])]
)
def test_gpus_by_id(gpus: str, ids: list[str] | None) -> None:
    text = f"name: x\nmodel: {{source: a}}\ndeploy: {{gpus: '{gpus}'}}\n"
    assert parse_config(text).deploy.gpu_ids == ids


@pytest.mark.parametrize("gpus", ["", "0;rm", "0,", "device=0", "all,0"])
def test_gpus_that_docker_would_misread(gpus: str) -> None:
    with pytest.raises(InputError, match=r"deploy\.gpus"):
        parse_config(f"name: x\nmodel: {{source: a}}\ndeploy: {{gpus: '{gpus}'}}\n")
