"""What `repo diff` sees: meaning, and nothing else."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from trtkit import pbtxt
from trtkit.cli.repo import command
from trtkit.errors import InputError
from trtkit.repository.diff import Difference, diff_configs, diff_repositories

CONFIG = """
name: "llm"
backend: "python"
max_batch_size: 8
version_policy { specific { versions: [1, 3] } }
input [
  {name: "text" data_type: TYPE_STRING dims: [1]},
  {name: "seed" data_type: TYPE_UINT64 dims: [1] reshape {} optional: true}
]
output [{name: "answer" data_type: TYPE_STRING dims: [-1]}]
instance_group [{count: 2 kind: KIND_CPU rate_limiter {resources [{name: "R1" count: 2}] priority: 3}}]
dynamic_batching { preferred_batch_size: [4, 8] max_queue_delay_microseconds: 100
  default_queue_policy {timeout_action: DELAY max_queue_size: 7} }
parameters { key: "a" value {string_value: "1"} }
parameters { key: "b" value {string_value: "2"} }
model_transaction_policy {decoupled: true}
model_warmup [{name: "w" batch_size: 1 inputs {key: "text" value {data_type: TYPE_STRING dims: [1] zero_data: true}}}]
response_cache {enable: false}
"""
ENSEMBLE = """
name: "front"
platform: "ensemble"
max_batch_size: 8
input [{name: "text" data_type: TYPE_STRING dims: [1]}]
output [{name: "answer" data_type: TYPE_STRING dims: [-1]}]
ensemble_scheduling { step [
  {model_name: "pre" model_version: -1 input_map {key: "Q" value: "text"} output_map {key: "I" value: "ids"}},
  {model_name: "llm" model_version: -1 input_map {key: "ids" value: "ids"} output_map {key: "out" value: "answer"}}
] }
"""
KEYS = ("ModelInput", "ModelOutput", "Step", "ModelWarmup", "Resource")


def config(text: str = CONFIG) -> Any:
    return pbtxt.loads(text)


def paths(first: Any, second: Any) -> list[str]:
    return [path for _, path, *_ in diff_configs(first, second)]


def leaves(message: Any, path: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """(path as `diff` names it, message, field, key of a map) of every scalar that a message sets."""
    for field, value in message.ListFields():
        place = f"{path}.{field.name}" if path else field.name
        repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
        if field.message_type is None:
            named = field.name in ("name", "model_name") and message.DESCRIPTOR.name in KEYS
            if not named:
                yield place, message, field, None
        elif field.message_type.GetOptions().map_entry:
            for key in value:
                if field.message_type.fields_by_name["value"].message_type is None:
                    yield f"{place}[{key}]", message, field, key
                else:
                    yield from leaves(value[key], f"{place}[{key}]")
        elif repeated:
            for number, item in enumerate(value):
                name = {"Step": "model_name"}.get(field.message_type.name, "name")
                known = field.message_type.name in KEYS
                yield from leaves(item, f"{place}[{getattr(item, name) if known else number}]")
        else:
            yield from leaves(value, place)


def mutate(message: Any, field: Any, key: Any) -> None:
    value = getattr(message, field.name)
    repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
    if key is not None:
        value[key] += "x"
    elif repeated:
        value.append(value[-1] + 1 if not isinstance(value[-1], str) else value[-1] + "x")
    elif field.enum_type is not None:
        setattr(message, field.name, next(number for number in field.enum_type.values_by_number if number != value))
    elif isinstance(value, bool):
        setattr(message, field.name, not value)
    else:
        setattr(message, field.name, value + ("x" if isinstance(value, str) else 1))


@pytest.mark.parametrize("text", [CONFIG, ENSEMBLE])
@given(data=st.data())
def test_any_single_mutation_gives_its_path(text: str, data: st.DataObject) -> None:
    first, second = config(text), config(text)
    every = list(leaves(second))
    assert len(every) > 10
    path, message, field, key = data.draw(st.sampled_from(every))
    mutate(message, field, key)
    assert paths(first, second) == [path]
    assert paths(second, first) == [path]


@pytest.mark.parametrize("text", [CONFIG, ENSEMBLE])
@given(seed=st.integers(0, 10**6), one_line=st.booleans())
def test_order_and_format_do_not_count(text: str, seed: int, one_line: bool) -> None:
    first, second = config(text), config(text)
    shuffle = random.Random(seed).shuffle
    for field in ("input", "output"):
        items = list(getattr(second, field))
        shuffle(items)
        second.ClearField(field)
        getattr(second, field).extend(items)
    steps = list(second.ensemble_scheduling.step) if second.HasField("ensemble_scheduling") else []
    if steps:
        shuffle(steps)
        second.ensemble_scheduling.ClearField("step")
        second.ensemble_scheduling.step.extend(steps)
    again = "# a comment\n" + text_format.MessageToString(second, as_one_line=one_line)
    assert paths(first, config(again)) == []
    assert paths(first, first) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("", "max_batch_size: 0"),
        ("", "model_transaction_policy {}"),
        ("", "model_transaction_policy {decoupled: false}"),
        ("", "response_cache {enable: false}"),
        ("", "optimization {}"),
        ("", "version_policy {latest {num_versions: 1}}"),
        ("version_policy {specific {versions: [3, 1, 1]}}", "version_policy {specific {versions: [1, 3]}}"),
        ("", "default_model_filename: ''"),
    ],
)
def test_what_says_the_same(first: str, second: str) -> None:
    assert paths(config(first), config(second)) == []


@pytest.mark.parametrize(
    ("first", "second", "path", "notice"),
    [
        ("", "dynamic_batching {}", "dynamic_batching", False),
        ("", "version_policy {all {}}", "version_policy.all", False),
        (
            "input {name: 'a' dims: [1]}",
            "input {name: 'a' dims: [1] reshape {}}",
            "input[a].reshape",
            False,
        ),
        ("max_batch_size: 1", "max_batch_size: 2", "max_batch_size", True),
        ("", "model_transaction_policy {decoupled: true}", "model_transaction_policy.decoupled", True),
        ("input {name: 'a' dims: [1]}", "input {name: 'a' dims: [-1]}", "input[a].dims", True),
        ("output {name: 'a'}", "output {name: 'a' data_type: TYPE_INT8}", "output[a].data_type", True),
        ("input {name: 'a'}", "input {name: 'a' optional: true}", "input[a].optional", True),
        ("input {name: 'a'}", "input {name: 'a' allow_ragged_batch: true}", "input[a].allow_ragged_batch", False),
        ("", "input {name: 'a' optional: true}", "input[a]", False),
        ("", "input {name: 'a'}", "input[a]", True),
        ("output {name: 'a'}", "", "output[a]", True),
        ("input {name: 'a'}", "input {name: 'a'} input {name: 'a'}", "input[a#2]", True),
        ("", "parameters {key: 'k' value {string_value: 'v'}}", "parameters[k]", False),
        ("", "instance_group {count: 1}", "instance_group[0]", False),
    ],
)
def test_who_notices(first: str, second: str, path: str, notice: bool) -> None:
    found = [item for item in diff_configs(config(first), config(second)) if item[1] != "version_policy.latest"]
    assert [(item[1], item[4]) for item in found] == [(path, notice)]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal repositories."""
    first = tmp_path / "first"
    tokenizer = first / "llm" / "1" / "tokenizer"
    tokenizer.mkdir(parents=True)
    (first / "llm" / "config.pbtxt").write_text(CONFIG)
    (first / "llm" / "1" / "model.py").write_text("x = 1\n")
    (first / "llm" / "1" / "model.json").write_text('{"model": "m", "tensor_parallel_size": 1}')
    (first / "llm" / "1" / "model.yaml").write_text("kv_cache_config: {free_gpu_memory_fraction: 0.8}\n")
    added = [{"id": 2, "content": "<s>", "special": True}]
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    (tokenizer / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added, "decoder": None}))
    (tokenizer / "tokenizer_config.json").write_text('{"bos_token": "<s>", "chat_template": "{{ messages }}"}')
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    (first / "front" / "1").mkdir(parents=True)
    (first / "front" / "config.pbtxt").write_text(ENSEMBLE)
    second = tmp_path / "second"
    shutil.copytree(first, second)
    return first, second


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=3))


def shown(found: list[Difference]) -> list[tuple[str, str]]:
    return [(one.kind, one.place) for one in found]


def test_equal_whatever_they_look_like(pair: tuple[Path, Path]) -> None:
    first, second = pair
    assert diff_repositories(first, first) == []
    text = text_format.MessageToString(config(), as_one_line=True)
    (second / "llm" / "config.pbtxt").write_text(text.replace('name: "llm"', "", 1))
    edit(second / "llm/1/model.json", lambda data: None)
    edit(second / "llm/1/tokenizer/tokenizer.json", lambda data: None)
    (second / "llm/1/model.yaml").write_text("# comment\nkv_cache_config:\n  free_gpu_memory_fraction: 0.80\n")
    (second / "llm/1/__pycache__").mkdir()
    (second / "llm/1/__pycache__/model.pyc").write_bytes(b"x")
    (second / ".hidden").mkdir()
    assert diff_repositories(first, second) == []


@pytest.mark.parametrize(
    ("file", "change", "place"),
    [
        ("tokenizer.json", lambda data: data["model"]["vocab"].update(c=3), "vocabulary size"),
        ("tokenizer.json", lambda data: data["model"]["vocab"].update(b=0, a=1), "model.vocab"),
        ("tokenizer.json", lambda data: data["added_tokens"][0].update(special=False), "special_tokens[<s>]"),
        ("tokenizer.json", lambda data: data.update(decoder={"type": "ByteLevel"}), "decoder"),
        ("tokenizer_config.json", lambda data: data.update(bos_token="<b>"), "bos_token"),  # noqa: S106
        ("tokenizer_config.json", lambda data: data.update(chat_template="{{ x }}"), "chat_template"),
        ("../model.json", lambda data: data.update(tensor_parallel_size=2), "tensor_parallel_size"),
        ("../model.json", lambda data: data.pop("model"), "model"),
    ],
)
def test_keys_of_files(pair: tuple[Path, Path], file: str, change: Any, place: str) -> None:
    first, second = pair
    edit((second / "llm/1/tokenizer" / file).resolve(), change)
    found = diff_repositories(first, second)
    assert place in [one.path for one in found]
    assert {one.path for one in found} <= {place, "model.vocab"}
    assert not any(one.clients_notice for one in found)


def test_files_versions_and_models(pair: tuple[Path, Path]) -> None:
    first, second = pair
    (second / "llm/1/model.py").write_text("x = 2\n")
    (second / "llm/1/model.yaml").write_text("kv_cache_config: {free_gpu_memory_fraction: 0.9}\n")
    (second / "llm/1/tokenizer/chat_template.jinja").write_text("{{ x }}")
    (second / "llm/1/new.bin").write_bytes(b"1")
    shutil.copytree(second / "llm/1", second / "llm/2")
    shutil.copytree(second / "front", second / "other")
    (second / "other" / "config.pbtxt").write_text(ENSEMBLE.replace("front", "other"))
    found = diff_repositories(first, second)
    assert shown(found) == [
        ("added", "llm: version 2"),
        ("changed", "llm/1/model.py"),
        ("changed", "llm/1/model.yaml: kv_cache_config.free_gpu_memory_fraction"),
        ("added", "llm/1/new.bin"),
        ("changed", "llm/1/tokenizer/chat_template.jinja: chat_template"),
        ("added", "other"),
    ]
    assert not any(one.clients_notice for one in found)
    back = diff_repositories(second, first)
    assert [one.clients_notice for one in back if one.model == "other"] == [True]


def test_the_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = map(str, pair)
    run = CliRunner().invoke
    assert run(command, ["diff", first, second]).output == "no differences\n"
    file = Path(second) / "llm" / "config.pbtxt"
    file.write_text(CONFIG.replace("max_batch_size: 8", "max_batch_size: 4"))
    done = run(command, ["diff", first, second])
    assert done.exit_code == 1
    assert "llm/config.pbtxt: max_batch_size" in done.output and "1 difference; clients notice" in done.output
    done = run(command, ["diff", first, second, "--json"])
    answer = json.loads(done.output)
    assert (done.exit_code, answer["equal"], answer["clients_notice"]) == (1, False, True)
    (difference,) = answer["differences"]
    assert (difference["before"], difference["after"]) == ("8", "4")
    file.write_text("nonsense {")
    with pytest.raises(InputError):
        diff_repositories(*pair)
    with pytest.raises(InputError, match="is no model repository"):
        diff_repositories(pair[0], tmp_path / "none")
