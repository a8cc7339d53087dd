"""Hub ids, against a stand-in for the model hub: same paths and headers, on loopback, two commits of one model."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from trtkit import hf
from trtkit.errors import LacksError

COMMITS = {"main": "b" * 40, "a" * 40: "a" * 40, "b" * 40: "b" * 40}


class StandInHub:
    """Serves `{commit: folder}` as the repository owner/model and records every path that was asked for."""

    def __init__(self, commits: dict[str, Path]) -> None:
        self.commits = commits
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.breaks: dict[str, int] = {}  # file -> bytes after which its next download breaks off
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                path = self.path.split("?")[0]
                status, headers, body = hub.answer(path, commits)
                if status == 200 and (wanted := self.headers.get("Range")):
                    hub.ranges.append(wanted)
                    start = int(wanted.removeprefix("bytes=").split("-")[0])
                    headers = {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
                    status, body = 206, body[start:]
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body[: hub.breaks.pop(Path(path).name, len(body))])

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
        folder = commits[commit]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [str(file.relative_to(folder)) for file in files]
        if kind == "tree":
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in zip(names, files, strict=True)
            ]
            return 200, {}, json.dumps(tree).encode()
        siblings = [{"rfilename": name} for name in names]
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
        (folder / "consolidated.safetensors").write_bytes(b"a second copy of the weights")
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.safetensors").write_bytes(b"a third one")
        (folder / "original" / "deep").mkdir(parents=True)
        (folder / "original" / "deep" / "params.json").write_text("{}")
    standin = StandInHub(folders)
    yield standin
    standin.close()


def convert(
    hub: StandInHub, repo: str, out: Path, *options: str, stderr: int = subprocess.PIPE, **env: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(out.parent / "cache"), **env}
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, "-m", "trtkit", "convert", repo, str(out), *options, "--json"]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=120,
        env=environment,
        cwd=out.parent,
        check=False,
    )


def layers(out: Path) -> int:
    return int(json.loads((out / "config.json").read_text())["num_hidden_layers"])


def test_downloads_the_pinned_revision_and_nothing_executable(hub: StandInHub, tmp_path: Path) -> None:
    done = convert(hub, "owner/model", tmp_path / "pinned", "--revision", "a" * 40)
    assert done.returncode == 0, done.stderr
    assert layers(tmp_path / "pinned") == 1
    assert not [path for path in hub.asked if path.endswith((".bin", ".py"))]
    assert not [path for path in hub.asked if "consolidated" in path or "onnx" in path or "original" in path]
    assert {Path(path).name for path in hub.asked if "/resolve/" in path} >= {"config.json", "model.safetensors"}
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
        ("owner/a--b", [], 2, "'owner/a--b' is neither a local folder nor a possible hub id"),
        ("owner/" + "x" * 97, [], 2, "is neither a local folder nor a possible hub id"),
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


def test_broken_download_goes_on_where_it_broke(hub: StandInHub, tmp_path: Path) -> None:
    (hub.commits["b" * 40] / "tokenizer.json").write_bytes(b" " * (25 << 20))  # it keeps what came in steps of 10 MiB
    hub.breaks["tokenizer.json"] = 15 << 20
    done = convert(hub, "owner/model", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert layers(tmp_path / "out") == 2
    assert hub.ranges == [f"bytes={10 << 20}-"]


def test_progress_is_for_terminals_and_stdout_stays_json(hub: StandInHub, tmp_path: Path) -> None:
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    seen = bytearray()

    def watch() -> None:
        with contextlib.suppress(OSError):  # the end of a terminal
            while data := os.read(primary, 4096):
                seen.extend(data)

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = convert(hub, "owner/model", tmp_path / "terminal", stderr=secondary, TERM="xterm")
    os.close(secondary)
    watcher.join(timeout=60)
    os.close(primary)
    assert done.returncode == 0, bytes(seen)
    assert json.loads(done.stdout)["architecture"] == "LlamaForCausalLM"
    assert b"Fetching" in seen and b"100%" in seen
    shutil.rmtree(tmp_path / "cache")
    done = convert(hub, "owner/model", tmp_path / "pipe")
    assert done.returncode == 0, done.stderr
    assert "Fetching" not in done.stderr
    assert json.loads(done.stdout)["architecture"] == "LlamaForCausalLM"


def test_cache_that_cannot_be_written(hub: StandInHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = convert(hub, "owner/model", tmp_path / "out", HF_HOME=str(tmp_path / "file" / "cache"))
    assert done.returncode == 3
    assert "cannot write 'owner/model' to " in done.stderr and "Not a directory" in done.stderr
    assert "fix: set HF_HOME to a folder that you can write to" in done.stderr


@pytest.fixture
def failing_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Exception], LacksError]:
    """What `open_source` makes of an exception of huggingface_hub."""
    import huggingface_hub

    monkeypatch.chdir(tmp_path)

    def run(error: Exception) -> LacksError:
        def fail(*args: Any, **options: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(LacksError) as caught:
            hf.open_source("owner/model", revision="main")
        return caught.value

    return run


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free disk space"),
        (errno.EDQUOT, "disk quota"),
        (errno.EACCES, "set HF_HOME"),
        (errno.EROFS, "set HF_HOME"),
    ],
)
@pytest.mark.parametrize("chained", [False, True])
def test_trouble_of_this_machine_is_not_the_hubs(number: int, fix: str, chained: bool, failing_download: Any) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    trouble: Exception = OSError(number, os.strerror(number), "/cache/blobs/x")
    if chained:
        outer = LocalEntryNotFoundError("not in the cache")
        outer.__cause__ = trouble
        trouble = outer
    error = failing_download(trouble)
    assert error.cause == f"cannot write 'owner/model' to /cache/blobs/x: {os.strerror(number)}"
    assert fix in error.fix


def test_connection_that_breaks_for_good(failing_download: Any) -> None:
    import huggingface_hub.errors

    for trouble in (
        OSError("Consistency check failed: file should be of size 5 but has size 3 (x).\nPlease retry."),
        huggingface_hub.errors.HTTPError("the peer\nclosed the connection"),
    ):
        error = failing_download(trouble)
        assert error.cause.startswith("the download of 'owner/model' at revision 'main' broke off (")
        assert "\n" not in error.cause and "run again" in error.fix


def test_origin_is_the_commit(hub: StandInHub, tmp_path: Path) -> None:
    code = "import json; from trtkit import hf; s = hf.open_source('owner/model')"
    code += "; print(json.dumps([s.origin, s.identity()]))"
    seen = []
    for number in (1, 2):
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / f"cache{number}")}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120, check=True
        )
        seen.append(json.loads(done.stdout))
    assert seen[0] == seen[1], "two machines disagree about one commit"
    assert seen[0][0] == f"hub:owner/model@{'b' * 40}" == seen[0][1]["origin"]
