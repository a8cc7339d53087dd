"""Asks a server whether it is ready, cheaply and leaving no connection behind. Standard library only.

A connection that is kept alive would hold up the server's exit for its whole exit timeout, so every probe closes its
own.
"""

from __future__ import annotations

import http.client
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from trtkit.errors import InputError

PROBE_TIMEOUT_S = 2.0


def connect_host(host: str) -> str:
    """Where a client reaches a server that listens on `host`: every-address means this machine too."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104 - compared, not bound


def url_host(host: str) -> str:
    """`connect_host` as it stands in a URL, IPv6 in brackets."""
    reachable = connect_host(host)
    return f"[{reachable}]" if ":" in reachable else reachable


def models_of(repository: Path) -> list[str]:
    """Names of the models in a repository: its subfolders, which the server loads all.

    Raises:
        InputError: no such folder, or no model in it.
    """
    if not repository.is_dir():
        raise InputError(f"no model repository at {repository}", "make one with `trtkit repo generate`")
    models = sorted(entry.name for entry in repository.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not models:
        raise InputError(f"no model in {repository}", "a model repository holds one folder per model")
    return models


def get_status(host: str, port: int, path: str) -> int | None:
    """HTTP status of one GET, or None when nobody answers."""
    connection = http.client.HTTPConnection(connect_host(host), port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def not_ready(host: str, port: int, models: Sequence[str]) -> list[str]:
    """What is not ready: `server` alone while it does not answer as ready, else the models that are not."""
    if get_status(host, port, "/v2/health/ready") != 200:
        return ["server"]
    return [model for model in models if get_status(host, port, f"/v2/models/{quote(model)}/ready") != 200]
