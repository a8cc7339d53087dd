"""Hub ids, against a stand-in for the model hub: same paths and headers, on loopback, two commits of one model."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMITS = {"main": "b" * 40, "a" * 40: "a" * 40, "b" * 40: "b" * 40}


class StandInHub:
    """Serves `{commit: folder}` as the repository owner/model and records every path that was asked for."""

    def __init__(self, commits: dict[str, Path]) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                status, headers, body = hub.answer(self.path.split("?")[0], commits)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def answer(self, path: str, commits: dict[str, Path]) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            kind, revision = parts[4:6] if len(parts) > 5 else ("revision", "main")
            return self.info("/".join(parts[2:4]), kind, revision, commits)
        if len(parts) < 5 or parts[2] != "resolve":
            return 404, {}, b"{}"
        repo, commit, file = "/".join(parts[:2]), COMMITS.get(parts[3]), "/".join(parts[4:])
        if repo != "owner/model" or commit is None or not (commits[commit] / file).is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = (commits[commit] / file).read_bytes()
        return 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit}, body

    def info(self, repo: str, kind: str, revision: str, commits: dict[str, Path]) -> tuple[int, dict[str, str], bytes]:
        if repo == "owner/gated":
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if repo != "owner/model":
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if revision not in COMMITS:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        commit = COMMITS[revision]
        files = sorted(commits[commit].iterdir())
        if kind == "tree":
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            return 200, {}, json.dumps(tree).encode()
        siblings = [{"rfilename": file.name} for file in files]
        return 200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings, "tags": []}).encode()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def hub(make_source: Any) -> Iterator[StandInHub]:
    folders = {"a" * 40: make_source(num_hidden_layers=1), "b" * 40: make_source(num_hidden_layers=2)}
    for folder in folders.values():
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        (folder / "modeling_evil.py").write_text("raise SystemExit")
    standin = StandInHub(folders)
    yield standin
    standin.close()


def convert(hub: StandInHub, repo: str, out: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(out.parent / "cache"), **env}
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, "-m", "trtkit", "convert", repo, str(out), *options, "--json"]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, cwd=out.parent, check=False
    )


def layers(out: Path) -> int:
    return int(json.loads((out / "config.json").read_text())["num_hidden_layers"])


def test_downloads_the_pinned_revision_and_nothing_executable(hub: StandInHub, tmp_path: Path) -> None:
    done = convert(hub, "owner/model", tmp_path / "pinned", "--revision", "a" * 40)
    assert done.returncode == 0, done.stderr
    assert layers(tmp_path / "pinned") == 1
    assert not [path for path in hub.asked if path.endswith((".bin", ".py"))]
    assert convert(hub, "owner/model", tmp_path / "latest").returncode == 0
    assert layers(tmp_path / "latest") == 2


def test_cache_serves_when_the_hub_is_gone(hub: StandInHub, tmp_path: Path) -> None:
    assert convert(hub, "owner/model", tmp_path / "first", "--revision", "a" * 40).returncode == 0
    done = convert(hub, "owner/model", tmp_path / "offline", "--revision", "a" * 40, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert layers(tmp_path / "offline") == 1
    done = convert(hub, "owner/other", tmp_path / "never", HF_HUB_OFFLINE="1")
    assert done.returncode == 3
    assert (
        "cannot reach the hub, and 'owner/other' is neither a folder here nor in the hub's local cache" in done.stderr
    )


@pytest.mark.parametrize(
    ("repo", "options", "code", "message"),
    [
        ("owner/missing", [], 2, "'owner/missing' is neither a local folder nor a model on the hub"),
        ("owner/gated", [], 3, "'owner/gated' is gated"),
        ("owner/model", ["--revision", "nope"], 2, "'owner/model' has no revision 'nope'"),
    ],
)
def test_what_the_hub_refuses(
    repo: str, options: list[str], code: int, message: str, hub: StandInHub, tmp_path: Path
) -> None:
    done = convert(hub, repo, tmp_path / "out", *options)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "fix:" in done.stderr
    assert not (tmp_path / "out").exists()
