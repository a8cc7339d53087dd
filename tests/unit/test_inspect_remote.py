"""`trtkit inspect` on sources elsewhere: the report of the whole download, from little of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from trtkit.errors import InputError, LacksError
from trtkit.inspect import SourceReport, inspect_path, remote_headers
from trtkit.inspect.source import inspect_source
from trtkit.remote.stores import Location, RemoteObject

COMMIT = "c" * 40


class StandInHub:
    """Serves a folder as owner/model, as the hub does. Weights only by ranges, and `sent` counts their bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent = 0
        self.broken = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = hub.answer(self.path.split("?")[0], self.headers.get("Range"))
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    with contextlib.suppress(ConnectionError):
                        self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def answer(self, path: str, span: str | None) -> tuple[int, dict[str, str], bytes]:
        if path == "/api/models/owner/gated/revision/main":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if not re.match(r"/(api/models/)?owner/model/", path):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        files = {file.name: file for file in sorted(self.folder.iterdir())}
        if "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": "0" * 40} for n, f in files.items()]
            return 200, {}, json.dumps(tree).encode()
        if "/revision/" in path:
            siblings = [{"rfilename": name} for name in files]
            return 200, {}, json.dumps({"id": "owner/model", "sha": COMMIT, "siblings": siblings, "tags": []}).encode()
        return self.file(path.rsplit("/", 1)[-1], span)

    def file(self, name: str, span: str | None) -> tuple[int, dict[str, str], bytes]:
        if not (self.folder / name).is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = (self.folder / name).read_bytes()
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        if not name.endswith((".safetensors", ".bin")):
            return 200, headers, body
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", span or "")
        if found is None or self.broken or name.endswith(".bin"):
            return 500, {}, b""  # nobody who wants a header asks for all of it, or for a pickle
        start, end = int(found[1]), min(int(found[2]) + 1, len(body))
        self.sent += end - start
        return 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}, body[start:end]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def hub(make_source: Any, tmp_path: Path) -> Iterator[StandInHub]:
    folder = make_source(vocab_size=20_000, hidden_size=64, num_hidden_layers=2, max_shard_size="3MB")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "original.bin").write_bytes(b"pickle")
    standin = StandInHub(folder)
    yield standin
    standin.close()


def trtkit(hub: StandInHub, tmp_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), **env}
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, "-m", "trtkit", "inspect", *args]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path, check=False
    )


def as_if_at(origin: str, folder: Path) -> dict[str, Any]:
    """The report of a whole source, as JSON, from another place."""
    report = replace(inspect_source(folder), path=origin, origin=origin)
    loaded: dict[str, Any] = json.loads(json.dumps(asdict(report)))
    return loaded


def test_hub_sends_headers_only(hub: StandInHub, tmp_path: Path) -> None:
    done = trtkit(hub, tmp_path, "owner/model", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "reading headers of owner/model\n"
    assert json.loads(done.stdout) == as_if_at(f"hub:owner/model@{COMMIT}", hub.folder)
    weights = sum(file.stat().st_size for file in hub.folder.glob("*.safetensors"))
    assert 0 < hub.sent <= remote_headers.FIRST_BYTES * len(list(hub.folder.glob("*.safetensors"))) < weights


def test_hub_without_a_connection(hub: StandInHub, tmp_path: Path) -> None:
    done = trtkit(hub, tmp_path, "owner/model", HF_HUB_OFFLINE="1")
    assert done.returncode == 3 and "cannot reach the hub" in done.stderr
    assert trtkit(hub, tmp_path, "owner/model").returncode == 0
    done = trtkit(hub, tmp_path, "owner/model", HF_HUB_OFFLINE="1")
    assert done.returncode == 3 and "its local cache holds only small files" in done.stderr
    snapshot = next((tmp_path / "cache").glob("hub/*/snapshots/*"))
    for file in hub.folder.glob("*.safetensors"):  # as `trtkit convert owner/model` leaves them
        shutil.copy(file, snapshot)
    done = trtkit(hub, tmp_path, "owner/model", "--json", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == as_if_at(f"hub:owner/model@{COMMIT}", hub.folder)


@pytest.mark.parametrize(
    ("repo", "code", "message"),
    [
        ("owner/gated", 3, "'owner/gated' is gated"),
        ("owner/missing", 2, "'owner/missing' is neither a local folder nor a model on the hub"),
        ("owner/a--b", 2, "'owner/a--b' is neither a local folder nor a possible hub id"),
    ],
)
def test_what_the_hub_refuses(repo: str, code: int, message: str, hub: StandInHub, tmp_path: Path) -> None:
    done = trtkit(hub, tmp_path, repo)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "fix: " in done.stderr


def test_headers_that_cannot_be_read(hub: StandInHub, tmp_path: Path) -> None:
    hub.broken = True
    done = trtkit(hub, tmp_path, "owner/model")
    assert done.returncode == 3
    assert re.search(r"error: cannot read the header of model-\S+ of 'owner/model'", done.stderr)


def test_problems_name_the_source_not_the_temporary_folder(hub: StandInHub, tmp_path: Path, edit_config: Any) -> None:
    victim = min(hub.folder.glob("*.safetensors"))
    victim.unlink()
    done = trtkit(hub, tmp_path, "owner/model")
    assert done.returncode == 0
    assert f"problem: hub:owner/model@{COMMIT}/{victim.name} is missing" in done.stdout
    assert "trtkit-inspect-" not in done.stdout


class StandInStore:
    """A folder in object storage, as `remote.stores.Store` shows it; `sent` counts the bytes that were read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = Location("s3", "bucket", "model")
        self.sent = 0
        self.error: Exception | None = None

    def listing(self) -> list[RemoteObject]:
        return [RemoteObject(f.name, f.stat().st_size, "etag", 0, None) for f in sorted(self.folder.iterdir())]

    def read(self, item: RemoteObject, start: int, end: int) -> bytes:
        assert 0 <= start < end <= item.size
        if self.error is not None:
            raise self.error
        self.sent += end - start
        return (self.folder / item.name).read_bytes()[start:end]

    def endpoint(self) -> str:
        return "http://127.0.0.1:1"


@pytest.fixture
def store(make_source: Any, monkeypatch: pytest.MonkeyPatch) -> StandInStore:
    standin = StandInStore(make_source(vocab_size=20_000))
    (standin.folder / "README.md").write_text("hello")
    monkeypatch.setattr(remote_headers, "open_store", lambda location: standin)
    return standin


@pytest.mark.parametrize("first", [100, 100_000])
def test_object_storage_sends_headers_only(first: int, store: StandInStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_headers, "FIRST_BYTES", first)
    report = inspect_path("s3://bucket/model/")
    assert isinstance(report, SourceReport)
    wanted = replace(inspect_source(store.folder), path="s3://bucket/model", origin="s3://bucket/model")
    assert report == wanted
    assert store.sent < 200_000 < report.bytes


def test_object_storage_that_fails(store: StandInStore) -> None:
    store.error = PermissionError("no")
    with pytest.raises((InputError, LacksError)) as caught:
        inspect_path("s3://bucket/model")
    assert "s3://bucket/model" in caught.value.cause and caught.value.fix


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40, (50).to_bytes(8, "little") + b"{"])
def test_what_is_no_safetensors_file_is_judged_as_the_whole_would_be(content: bytes, store: StandInStore) -> None:
    (store.folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"^s3://bucket/model/model\.safetensors: not a safetensors file"):
        inspect_path("s3://bucket/model")


def test_headers_keep_the_size_and_nothing_else(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"U8","shape":[1000000],"data_offsets":[0,1000000]}}'
    content = len(header).to_bytes(8, "little") + header + b"\x01" * 1_000_000
    remote_headers.write_header(tmp_path / "x", len(content), lambda start, end: content[start:end])
    written = (tmp_path / "x").read_bytes()
    assert len(written) == len(content) and written[: 8 + len(header)] == content[: 8 + len(header)]
    assert not any(written[8 + len(header) :])
