"""What changed between two model repositories, by meaning: the text of a config does not count, what it says does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trtkit import pbtxt
from trtkit.errors import InputError
from trtkit.repository.diff_files import FileChange, compare_files
from trtkit.repository.version_policy import version_numbers

Kind = Literal["added", "removed", "changed"]
Field = tuple[Kind, str, str, str, bool]
"""A difference inside a config: kind, path, value before and after, whether clients notice."""

_KEYS = {
    "ModelInput": "name",
    "ModelOutput": "name",
    "Step": "model_name",
    "ModelWarmup": "name",
    "Resource": "name",
}
"""Messages that lists hold in any order, told apart by this field: tensors, steps, warm-ups, rate limiter resources."""

_CLIENT_FIELDS = frozenset({"data_type", "dims", "optional"})
"""Of a tensor: what a request or an answer looks like. `reshape` and the like stay inside the server."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same.

    Attributes:
        kind: `added` is in the second repository alone, `removed` in the first alone.
        model: the model's directory.
        file: inside it; empty for the model and its versions.
        path: what in the file, such as `input[text_input].dims`; empty for all of it.
        before, after: the values as text; empty where there is none.
        clients_notice: the contract changed: models, tensors by name, type and shape, decoupled, max_batch_size.
    """

    kind: Kind
    model: str
    file: str
    path: str
    before: str
    after: str
    clients_notice: bool = False

    @property
    def place(self) -> str:
        where = f"{self.model}/{self.file}" if self.file else self.model
        return f"{where}: {self.path}" if self.path else where

    def to_dict(self) -> dict[str, Any]:
        return {"place": self.place} | asdict(self)


def diff_repositories(first: Path, second: Path) -> list[Difference]:
    """The differences, by model: versions, then the config, then the files.

    Order of tensors and steps, comments, formatting, bytecode and hidden files do not count, and a default equals a
    field that is not there. A model or version that only one side has is one difference, whatever is in it.

    Raises:
        InputError: one is no folder, or a config.pbtxt cannot be read.
    """
    models = [_models(first), _models(second)]
    found: list[Difference] = []
    for name in sorted(set(models[0]) | set(models[1])):
        if name not in models[1]:
            found.append(Difference("removed", name, "", "", "model", "", clients_notice=True))
        elif name not in models[0]:
            found.append(Difference("added", name, "", "", "", "model"))
        else:
            found += _model(name, first / name, second / name)
    return found


def diff_configs(first: Any, second: Any) -> Iterator[Field]:
    """Differences between two `ModelConfig` messages."""
    yield from _messages(_normal(first), _normal(second), "")


def _models(repository: Path) -> list[str]:
    if not repository.is_dir():
        raise InputError(f"{repository} is no model repository", "give the folder that holds the model directories")
    hidden = (".", "__pycache__")
    return sorted(item.name for item in repository.iterdir() if item.is_dir() and not item.name.startswith(hidden))


def _model(name: str, first: Path, second: Path) -> list[Difference]:
    versions = [set(version_numbers(first)), set(version_numbers(second))]
    found = [
        Difference("removed", name, "", f"version {number}", str(number), "")
        if number in versions[0]
        else Difference("added", name, "", f"version {number}", "", str(number))
        for number in sorted(versions[0] ^ versions[1])
    ]
    configs = [_config(first, name), _config(second, name)]
    if configs[0] is None or configs[1] is None:
        if configs[0] is not configs[1]:
            kind: Kind = "removed" if configs[1] is None else "added"
            both = ("config", "") if kind == "removed" else ("", "config")
            found.append(Difference(kind, name, "config.pbtxt", "", *both, clients_notice=True))
    else:
        found += [
            Difference(kind, name, "config.pbtxt", path, before, after, notice)
            for kind, path, before, after, notice in diff_configs(*configs)
        ]
    alone = {str(number) for number in versions[0] ^ versions[1]}
    changes = [change for change in compare_files(first, second) if change.file.split("/")[0] not in alone]
    return found + [_of_file(name, change) for change in changes]


def _of_file(model: str, change: FileChange) -> Difference:
    kind: Kind = "added" if not change.before else "removed" if not change.after else "changed"
    return Difference(kind, model, change.file, change.path, change.before, change.after)


def _config(folder: Path, name: str) -> Any:
    """The config of a model directory, or None; a name that is not written is the directory's."""
    file = folder / "config.pbtxt"
    if not file.is_file():
        return None
    config = pbtxt.load(file)
    config.name = config.name or name
    return config


def _normal(config: Any) -> Any:
    """A copy in which what means the same looks the same."""
    normal = type(config)()
    normal.CopyFrom(config)
    policy = normal.version_policy
    if policy.WhichOneof("policy_choice") is None:
        policy.latest.num_versions = 1  # what Triton takes when nothing is said
    elif policy.HasField("specific"):
        policy.specific.versions[:] = sorted(set(policy.specific.versions))
    return normal


def _messages(first: Any, second: Any, path: str) -> Iterator[Field]:
    """Differences between two messages of one type, field by field."""
    for field in (first or second).DESCRIPTOR.fields:
        place = f"{path}.{field.name}" if path else field.name
        if _is_map(field):
            yield from _maps(getattr(first, field.name), getattr(second, field.name), place, field)
        elif _is_list(field) and field.message_type is not None:
            pair = [_keyed(getattr(message, field.name), field) for message in (first, second)]
            yield from _members(pair[0], pair[1], place)
        elif field.message_type is not None:
            yield from _submessages(first, second, place, field)
        else:
            values = [_text(getattr(message, field.name), field) for message in (first, second)]
            if values[0] != values[1]:
                yield "changed", place, values[0], values[1], _clients_notice(place)


def _submessages(first: Any, second: Any, place: str, field: Any) -> Iterator[Field]:
    """An empty message equals none, except where that it is there says something: one of several, or a reshape."""
    there = [message.HasField(field.name) for message in (first, second)]
    inner = list(_messages(getattr(first, field.name), getattr(second, field.name), place)) if any(there) else []
    speaks = field.containing_oneof is not None or field.name == "reshape"
    if there[0] != there[1] and speaks:
        if there[0]:
            yield "removed", place, _shown(getattr(first, field.name)), "", _clients_notice(place)
        else:
            yield "added", place, "", _shown(getattr(second, field.name)), _clients_notice(place)
    else:
        yield from inner


def _maps(first: Any, second: Any, place: str, field: Any) -> Iterator[Field]:
    value = field.message_type.fields_by_name["value"]
    if value.message_type is not None:
        yield from _members(dict(first), dict(second), place)
        return
    for key in sorted(set(first) | set(second)):
        before, after = (_text(side[key], value) if key in side else None for side in (first, second))
        if before != after:
            kind: Kind = "added" if before is None else "removed" if after is None else "changed"
            yield kind, f"{place}[{key}]", before or "", after or "", False


def _members(first: Mapping[str, Any], second: Mapping[str, Any], place: str) -> Iterator[Field]:
    """Messages by key: those that one side lacks, and the differences of the others."""
    for key in [*first, *(key for key in second if key not in first)]:
        inside = f"{place}[{key}]"
        if key not in second:
            yield "removed", inside, _shown(first[key]), "", place in ("input", "output")
        elif key not in first:
            notice = place == "output" or (place == "input" and not second[key].optional)
            yield "added", inside, "", _shown(second[key]), notice
        else:
            yield from _messages(first[key], second[key], inside)


def _keyed(items: Sequence[Any], field: Any) -> dict[str, Any]:
    """The messages of a list by what tells them apart: their key field, with #2 for a second of that name, or their
    place."""
    key = _KEYS.get(field.message_type.name)
    found: dict[str, Any] = {}
    for number, item in enumerate(items):
        name = str(number) if key is None else str(getattr(item, key))
        count = 2
        unique = name
        while unique in found:
            unique, count = f"{name}#{count}", count + 1
        found[unique] = item
    return found


def _is_list(field: Any) -> bool:
    repeated = getattr(field, "is_repeated", None)  # protobuf before 6.30 knows the label alone
    return bool(field.label == field.LABEL_REPEATED if repeated is None else repeated)


def _is_map(field: Any) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _clients_notice(place: str) -> bool:
    if place in ("max_batch_size", "model_transaction_policy.decoupled"):
        return True
    return place.startswith(("input[", "output[")) and place.rpartition("].")[2] in _CLIENT_FIELDS


def _text(value: Any, field: Any) -> str:
    """A value of a field as text; enums by name."""
    if _is_list(field):
        return "[" + ", ".join(_one(item, field) for item in value) + "]"
    return _one(value, field)


def _one(value: Any, field: Any) -> str:
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known else str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, (str, bytes)) else str(value)


def _shown(message: Any) -> str:
    from google.protobuf import text_format

    text = text_format.MessageToString(message, as_one_line=True, as_utf8=True)
    return "{" + (text if len(text) <= 120 else text[:117] + "...") + "}"
