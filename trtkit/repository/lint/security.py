"""Lint rules about who can run code in the server.

NVIDIA's advice: triton-inference-server/server, docs/customization_guide/deploy.md (secure deployment).
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from trtkit.findings import Finding
from trtkit.repository.lint.code import TRUST, parse
from trtkit.repository.lint.llmapi import read_yaml
from trtkit.repository.lint.repository import Model, Server
from trtkit.repository.lint.rules import finding
from trtkit.repository.lint.vllm import read_json_object

_CODE = (".py", ".so", ".pyc")
_OUTSIDE = ("tokenizer_dir", "lora_prefetch_dir", "xgrammar_tokenizer_info_path", "hf_model_path")
"""Parameters that name a file or folder which a python model or the backend reads."""


def lint_security(model: Model) -> Iterator[Finding]:
    """Findings about one model."""
    if model.is_ensemble:
        return
    for key, item in model.config.parameters.items():
        if key.lower() == TRUST and item.string_value.strip().lower() in ("true", "1", "yes"):
            yield finding("TK181", model.place(key), f"{key} is {item.string_value}", _UNTRUST)
    for key in _OUTSIDE:
        value = model.parameters.get(key, "")
        if value.startswith("/") and model.path.parent.resolve() not in Path(value).parents:
            cause = f"{key} {value} is outside the repository, where somebody else may change it"
            fix = "put a copy into the version's folder and name it relative to that, or make it read-only"
            yield finding("TK185", model.place(key), cause, fix, severity="info")
    for version in model.served_versions():
        yield from _files(model, version)


_UNTRUST = "remove it: with it, code in the model's or tokenizer's folder is executed in the server"


def _files(model: Model, version: int) -> Iterator[Finding]:
    folder = model.path / str(version)
    for where, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            suffix = Path(name).suffix
            if suffix in _CODE or name in {"model.yaml", "model.json"}:
                file = Path(where) / name
                yield from _file(file, f"{model.name}/{file.relative_to(model.path).as_posix()}", suffix)
    if folder.stat().st_mode & stat.S_IWOTH:
        cause = "every user of this machine can put files into the folder, and the server runs what is there"
        yield finding("TK183", f"{model.name}/{version}", cause, f"chmod o-w {model.name}/{version}")


def _file(file: Path, place: str, suffix: str) -> Iterator[Finding]:
    if suffix in _CODE and file.stat().st_mode & stat.S_IWOTH:
        cause = "every user of this machine can change the file, and the server runs it"
        yield finding("TK183", place, cause, f"chmod o-w {place}")
    if suffix == ".py":
        for line in parse(file.read_bytes()).trusts:
            yield finding("TK181", f"{place}:{line}", f"{TRUST}=True", _UNTRUST)
    elif suffix in {".yaml", ".json"}:
        yield from _settings(file, place)


def _settings(file: Path, place: str) -> Iterator[Finding]:
    data = file.read_bytes()
    settings = read_yaml(data) if file.suffix == ".yaml" else read_json_object(data)
    if isinstance(settings, dict) and settings.get(TRUST) is True:
        before = data[: data.find(TRUST.encode())]
        line = before.count(b"\n") + 1
        yield finding("TK181", f"{place}:{line}", f"{TRUST} is on", _UNTRUST)


def lint_server(server: Server) -> Iterator[Finding]:
    """Findings about the server itself, as far as it is known."""
    if server.model_control != "none" and not _is_loopback(server.host):
        what = "anybody who reaches" if server.model_control == "explicit" else "whoever can write the repository of"
        cause = f"model control is '{server.model_control}', and {what} {server.host} makes the server run code"
        severity = None if server.model_control == "explicit" else "warning"
        fix = "listen on loopback, or set model control to none, or restrict the API `model-repository`"
        yield finding("TK182", "server", cause, fix, severity=severity)  # type: ignore[arg-type]
    folder = server.backend_directory
    if folder is not None and folder.is_dir():
        for path in (folder, *sorted(item for item in folder.iterdir() if item.is_dir())):
            if path.stat().st_mode & (stat.S_IWOTH | stat.S_IWGRP):
                cause = "other users of this machine can change backends, and the server runs them"
                yield finding("TK184", str(path), cause, f"chmod go-w {path}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
