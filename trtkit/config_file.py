"""Build configs as YAML files: reading them, with errors that name the file, the line and what would be valid."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from trtkit.config import BuildConfig
from trtkit.errors import InputError, LacksError


def load_config(path: str | Path) -> BuildConfig:
    """Reads and checks a build config.

    A relative `model.source` that exists beside the config file becomes an absolute path, so a config works from any
    working directory.

    Raises:
        InputError: the file is missing, is not YAML, or breaks the schema: every problem with its line.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a device may never end
            raise InputError(f"cannot read {path}: not a file", "`trtkit config ls` lists ready-made configs")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}", "`trtkit config ls` lists ready-made configs") from error
    return parse_config(text, str(path), base=path.parent)


def parse_config(text: str, name: str = "<config>", base: Path | None = None) -> BuildConfig:
    """Like `load_config`, for text. `name` stands in for the file in errors; `base` resolves a relative source."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise InputError(f"{name}{line}: not valid YAML: {problem}", "mend the syntax") from error
    except RecursionError:
        raise InputError(f"{name}: nested too deeply", "a build config has four levels; mend the brackets") from None
    if not isinstance(data, dict) or root is None:
        raise InputError(f"{name}: a build config is a mapping of keys", "start from one that `trtkit config ls` lists")
    duplicate = _duplicate_key(root)
    if duplicate is not None:
        raise InputError(f"{name}:{duplicate[1]}: key '{duplicate[0]}' is given twice", "keep one of them")
    try:
        config = BuildConfig.model_validate(data)
    except ValidationError as error:
        problems = [_describe(problem, root, name) for problem in error.errors()]
        raise InputError("\n".join(problems), "`trtkit config schema` shows every key, its type and range") from None
    return _with_absolute_paths(config, base)


def with_serving(config: BuildConfig, **changes: Any) -> BuildConfig:
    """`config` with other values under `serving`, checked again as a whole.

    Raises:
        InputError: the rest of the config does not go with them.
    """
    data = config.model_dump()
    data["serving"].update(changes)
    try:
        return BuildConfig.model_validate(data)
    except ValidationError as error:
        told = ", ".join(f"serving.{key} '{value}'" for key, value in changes.items())
        problems = []
        for problem in error.errors():
            key, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
            problems.append(f"with {told}: {key + ': ' if key else ''}{message}")
        raise InputError("\n".join(problems), "change the build config, or leave the option out") from None


def ready_made_configs() -> dict[str, Path]:
    """The build configs that come with trtkit, by name.

    Raises:
        LacksError: the installation is incomplete.
    """
    files = sorted(_config_folder().glob("*.yaml"), key=lambda file: file.stem)
    if not files:
        raise LacksError(f"no build configs in {_config_folder()}", "install trtkit again: the package is incomplete")
    return {file.stem: file for file in files}


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a build config, for editors and `trtkit config schema`."""
    return BuildConfig.model_json_schema()


def _config_folder(package: Path = Path(__file__).parent) -> Path:
    """Inside the package when it is installed, beside it in a working copy."""
    installed = package / "_data" / "build_configs"
    return installed if installed.is_dir() else package.parent / "build_configs"


def _with_absolute_paths(config: BuildConfig, base: Path | None) -> BuildConfig:
    """The config with files that its paths name relative to `base`; what is no file stays: the id of something."""
    quantization = config.checkpoint.quantization
    text = _absolute(quantization.calibration.text, base)
    calibration = quantization.calibration.model_copy(update={"text": text})
    quantization = quantization.model_copy(update={"calibration": calibration})
    serving = config.serving
    files = {
        "chat_template": _absolute(serving.chat_template, base),
        "onnx": serving.onnx.model_copy(update={"model": _absolute(serving.onnx.model, base)}),
        "python": serving.python.model_copy(update={"model": _absolute(serving.python.model, base)}),
    }
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"source": _absolute(config.model.source, base)}),
            "checkpoint": config.checkpoint.model_copy(update={"quantization": quantization}),
            "serving": serving.model_copy(update=files),
        }
    )


def _absolute(name: str | None, base: Path | None) -> str | None:
    if name is None:
        return None
    path = Path(name).expanduser()
    local = path if path.is_absolute() else (base or Path()) / path
    return str(local.resolve()) if local.exists() else name


def _duplicate_key(root: yaml.Node) -> tuple[str, int] | None:
    """A key that a mapping holds twice (YAML silently keeps the last one), with its line."""
    waiting: list[yaml.Node] = [root]
    visited: set[int] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in visited:  # an alias may name its own parent, and a few of them one node billions of times
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen:
                    return _printable(str(key.value)), key.start_mark.line + 1
                seen.add(key.value)
            waiting += [value for _, value in reversed(node.value)]
        elif isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)
    return None


def _describe(problem: Any, root: yaml.Node, name: str) -> str:
    """One line for one schema violation: place, key, what is wrong, what is valid."""
    location = [part for part in problem["loc"] if part != "[key]"]
    line = _line_of(root, location)
    key = ".".join(_printable(str(part)) for part in location)
    prefix = f"{name}:{line}: "
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _valid_keys(location[:-1]), n=1, cutoff=0.5)
        hint = f", did you mean '{near[0]}'?" if near else f"; valid here: {', '.join(_valid_keys(location[:-1]))}"
        return f"{prefix}unknown key '{key}'{hint}"
    if problem["type"] == "missing":
        return f"{prefix}required key '{key}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = problem.get("input")
    shown = "" if isinstance(given, (dict, list)) or given is None else f" (given: {given!r})"
    if shown and problem["type"] == "string_type":
        shown += "; put it in quotes"  # YAML reads 25.10 as a number and 2024-01-01 as a date
    if problem["type"] == "value_error":  # a message of our own, which begins with the key that it is about
        line = _line_of(root, [*location, *message.split(" ", 1)[0].split(".")])
    return f"{name}:{line}: {key + ': ' if key else ''}{message}{shown}{_range_of(location)}"


def _line_of(root: yaml.Node, location: list[Any]) -> int:
    """Line of the deepest node of `location` that the document has, counted from 1."""
    node, line = root, root.start_mark.line
    for part in location:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = (node.value[part], node.value[part])
        if found is None:
            break
        line, node = found[0].start_mark.line, found[1]
    return line + 1


def _printable(key: str) -> str:
    """A key as an error shows it: line breaks and terminal controls escaped."""
    return key if key.isprintable() else repr(key)[1:-1]


_schema = functools.cache(config_schema)


def _schema_at(location: list[Any]) -> dict[str, Any]:
    """The part of the JSON Schema that describes `location`; empty where there is none."""
    schema = _schema()
    definitions = schema.get("$defs", {})

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            node = definitions[node["$ref"].rsplit("/", 1)[-1]]
        return node

    node = resolve(schema)
    for part in location:
        if isinstance(part, int):
            node = resolve(node.get("items", {}))
        elif part in node.get("properties", {}):
            node = resolve(node["properties"][part])
        elif "patternProperties" in node:  # a mapping whose keys are free names
            node = resolve(next(iter(node["patternProperties"].values())))
        else:
            return {}
    return node


def _valid_keys(location: list[Any]) -> list[str]:
    return list(_schema_at(location).get("properties", {}))


def _range_of(location: list[Any]) -> str:
    """The permitted range of a number, as text such as `; valid: 1 to 64`."""
    node = _schema_at(location)
    branches = [node, *node.get("anyOf", [])]
    low = next((f"{b['minimum']}" for b in branches if "minimum" in b), None) or next(
        (f"more than {b['exclusiveMinimum']}" for b in branches if "exclusiveMinimum" in b), None
    )
    high = next((f"{b['maximum']}" for b in branches if "maximum" in b), None) or next(
        (f"less than {b['exclusiveMaximum']}" for b in branches if "exclusiveMaximum" in b), None
    )
    if low and high:
        return f"; valid: {low} to {high}"
    if low:
        return f"; valid: {low} or more"
    return ""
