"""What a container must see beside the model repository: the engine or checkpoint that its models name. Only reads."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trtkit import pbtxt
from trtkit.docker_cli import Mount
from trtkit.engine_files import read_engine
from trtkit.errors import InputError
from trtkit.findings import Finding
from trtkit.hf import is_hub_id

HUB = "/hub"
"""Where a container finds models of the hub's cache."""
HUB_ENVIRONMENT = {"HF_HUB_CACHE": HUB, "HF_HUB_OFFLINE": "1"}
"""Variables with which huggingface_hub reads from there, and neither writes nor asks the hub."""


@dataclass(frozen=True)
class Named:
    """A model that a repository names.

    Attributes:
        file, key: where it says so.
        value: absolute path as the server sees it, or hub id.
        revision: of a hub id.
    """

    file: Path
    key: str
    value: str
    revision: str = "main"

    @property
    def what(self) -> str:
        return "engine" if self.key == "gpt_model_path" else "checkpoint"

    def __str__(self) -> str:
        return f"{self.file} looks for the {self.what} at '{self.value}' ({self.key})"


def check(
    repository: Path, given: Path | None, target: str | None, adapters: Sequence[str] = ()
) -> tuple[list[Mount], dict[str, str], list[Finding]]:
    """What to mount, all of it read-only; variables that lead to it; and what does not exist yet, as warnings.

    Without a folder given, one that is named is mounted at its own path, where this machine has it there.

    Args:
        repository: model repository.
        given: folder of the engine or checkpoint, if any.
        target: absolute path for it inside the container; None is its own.
        adapters: folders of LoRA adapters as the server sees them.

    Raises:
        InputError: what exists contradicts: no complete engine or checkpoint in a folder, or the repository looks
            elsewhere.
    """
    mounts, environment, findings = [], {}, []
    if not repository.is_dir():
        fix = "make one with `trtkit repo generate`"
        findings.append(Finding("TK761", "warning", str(repository), f"no model repository at {repository}", fix))
    named = [one for one in named_in(repository) if not Path(posixpath.normpath(one.value)).is_relative_to(repository)]
    if given is not None:
        mounts.append(Mount(given, target or str(given)))
        findings += _check_given(given, mounts[0].target, named)
    for one in named:
        if not one.value.startswith("/"):
            found = _in_hub_cache(one)
            environment = HUB_ENVIRONMENT
            mounts += [found] if isinstance(found, Mount) else []
            findings += [found] if isinstance(found, Finding) else []
        elif given is None:
            mounts.append(_own_path(one))
    mounts += [Mount(Path(folder), folder) for folder in adapters if folder.startswith("/") and Path(folder).is_dir()]
    return list(dict.fromkeys(mounts)), environment, findings


def _check_given(folder: Path, target: str, named: Sequence[Named]) -> list[Finding]:
    """Whether the folder is what the repository names, and lies where it looks."""
    what = named[0].what if named else "engine"
    for one in named:
        if posixpath.normpath(one.value) != posixpath.normpath(target):
            fix = f"--model-path-in-container {one.value}, or generate the repository again"
            raise InputError(
                f"{one}, and it is mounted at '{target}'",
                fix if folder.is_dir() else f"give --{what} the folder: there is nothing at {folder}",
            )
    if not folder.is_dir():
        fix = "compile one with `trtkit build`" if what == "engine" else "give the folder of a Hugging Face checkpoint"
        return [Finding("TK762", "warning", str(folder), f"no {what} at {folder}", fix)]
    _check_content(folder, what)
    return []


def _own_path(named: Named) -> Mount:
    """The mount of what lies on this machine where the server looks for it."""
    folder = Path(posixpath.normpath(named.value))
    if not folder.is_dir():
        raise InputError(f"{named}, and none is given", f"give --{named.what} DIR")
    _check_content(folder, named.what)
    return Mount(folder, str(folder))


def _check_content(folder: Path, what: str) -> None:
    if what == "engine":
        read_engine(folder)
    elif not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json", "give the folder of a Hugging Face checkpoint")


def _in_hub_cache(named: Named) -> Mount | Finding:
    """The mount of a model's folder in the hub's cache of this machine. Its files are links within that folder."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{named.value.replace('/', '--')}"
    if any((folder / kind / named.revision).exists() for kind in ("refs", "snapshots")):
        return Mount(folder, f"{HUB}/{folder.name}")
    at = "" if named.revision == "main" else f" --revision {named.revision}"
    return Finding(
        "TK763",
        "warning",
        str(folder),
        f"'{named.value}' ({named.file}) is not in the hub's cache at {folder.parent}, which the container reads",
        f"download it: hf download {named.value}{at}",
    )


def named_in(repository: Path) -> Iterator[Named]:
    """The engines and checkpoints that the models of a repository name, each once."""
    seen = set()
    for one in (*_in_parameters(repository), *_in_arguments(repository)):
        absolute = one.value.startswith("/")
        if (absolute or (one.key == "model" and is_hub_id(one.value))) and one.value not in seen:
            seen.add(one.value)
            yield one


def _in_parameters(repository: Path) -> Iterator[Named]:
    """`gpt_model_path` of engines, and `model` of the model `llm`."""
    for name in ("tensorrt_llm", "llm"):
        file = repository / name / "config.pbtxt"
        given = pbtxt.load(file).parameters if file.is_file() else {}
        for key in ("gpt_model_path", "model"):
            if key in given:
                arguments = given["engine_args"].string_value if "engine_args" in given else "{}"
                try:
                    yield _named(file, key, given[key].string_value, json.loads(arguments or "{}"))
                except ValueError as error:
                    cause = f"{file}: parameter 'engine_args' is no JSON: {error}"
                    raise InputError(cause, "generate the repository again") from error


def _in_arguments(repository: Path) -> Iterator[Named]:
    """model.yaml of NVIDIA's LLM-API model and model.json of the vLLM backend, of every version."""
    for pattern in ("tensorrt_llm/[0-9]*/model.yaml", "vllm_model/[0-9]*/model.json"):
        for file in sorted(repository.glob(pattern)):
            try:
                arguments = yaml.safe_load(file.read_text(encoding="utf-8"))  # which reads JSON too
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise InputError(f"{file} cannot be read: {error}", "generate the repository again") from error
            if isinstance(arguments, dict) and isinstance(arguments.get("model"), str):
                yield _named(file, "model", arguments["model"], arguments)


def _named(file: Path, key: str, value: str, arguments: Any) -> Named:
    revision = arguments.get("revision") if isinstance(arguments, dict) else None
    return Named(file, key, value, revision if isinstance(revision, str) else "main")
