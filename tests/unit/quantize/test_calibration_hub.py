"""Calibration text from the hub: the real client libraries against a stand-in for the hub, on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtkit.quantize import documents

pytest.importorskip("datasets")

COMMIT = "c" * 40
ROWS = "".join(json.dumps({"text": f"Document number {number} of the hub."}) + "\n" for number in range(300))
DATASETS = {
    "owner/texts": {"README.md": b"---\nlicense: apache-2.0\n---\n", "train.jsonl": ROWS.encode()},
    "owner/columns": {"README.md": b"# none\n", "test.jsonl": b'{"article": "a", "id": 1}\n'},
    "owner/program": {"README.md": b"# none\n", "program.py": b"raise SystemExit('this ran')"},
}

ASK = """
import json, sys
from trtkit.errors import TrtkitError
from trtkit.quantize.calibration import load_tokens
answers = {}
for name in sys.argv[2:]:
    try:
        found = load_tokens(sys.argv[1], name, samples=4, length=64)
        answers[name] = [found.origin, found.digest, found.tokens.tolist()]
    except TrtkitError as error:
        answers[name] = [type(error).__name__, error.cause, error.fix]
print(json.dumps(answers))
"""


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, for the datasets above; strict: what it does not know is 404."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, headers, answer = self.answer(self.path.split("?")[0].strip("/").split("/"), body)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(answer))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def answer(self, parts: list[str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        api = parts[:2] == ["api", "datasets"]
        if not api and parts[:1] != ["datasets"]:
            return 404, {}, b"{}"
        name, rest = "/".join(parts[2:4] if api else parts[1:3]), parts[4:] if api else parts[3:]
        files = DATASETS.get(name)
        if files is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        return self.about(name, files, rest) if api else self.file(files, rest)

    def about(self, name: str, files: dict[str, bytes], rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        if rest and rest[0] in ("revision", "tree") and rest[1] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if rest and rest[0] == "tree":
            if len(rest) > 2:
                return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
            tree = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
            return 200, {}, json.dumps(tree).encode()
        info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files], "tags": []}
        return 200, {}, json.dumps(info).encode()

    def file(self, files: dict[str, bytes], rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        data = files.get("/".join(rest[2:])) if rest[:2] == ["resolve", COMMIT] else None
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}  # noqa: S324
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            stop = min(int(last or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{stop}/{len(data)}"
            return 206, headers, data[int(first) : stop + 1]
        return 200, headers, data

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def ask(hub: str, home: Path, *names: str) -> dict[str, list[Any]]:
    """What `load_tokens` says to each name, in a process of its own: the client reads its settings when imported."""
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    env = {**os.environ, **settings}
    source = Path(__file__).parents[3] / "examples" / "tiny-llama"
    command = [sys.executable, "-c", ASK, str(source), *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    answers: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_streamed_at_a_commit(hub: str, tmp_path: Path) -> None:
    names = ("owner/texts", "owner/texts@main:train", f"owner/texts@{COMMIT}")
    found = ask(hub, tmp_path, *names)
    assert [found[name][0] for name in names] == [f"hub:owner/texts@{COMMIT}:train"] * 3
    assert len({found[name][1] for name in names}) == 1
    assert np.array(found["owner/texts"][2]).shape == (4, 64)


@pytest.mark.slow
def test_what_the_hub_does_not_have(hub: str, tmp_path: Path) -> None:
    wanted = {
        "owner/nothing": ("InputError", "neither a file here nor a dataset on the hub"),
        "owner/texts@v9": ("InputError", "has no revision 'v9'"),
        "owner/texts:test": ("InputError", "test"),
        "owner/texts/german": ("InputError", "german"),
        "owner/columns:test": ("InputError", "row 1: neither 'text' (a string) nor 'messages'"),
        "owner/program": ("InputError", "is a program, not data"),
    }
    found = ask(hub, tmp_path, *wanted)
    for name, (kind, cause) in wanted.items():
        assert found[name][0] == kind and cause in found[name][1] and found[name][2], (name, found[name])


def test_without_a_connection(tmp_path: Path) -> None:
    kind, cause, fix = ask("http://127.0.0.1:9", tmp_path, "owner/texts")["owner/texts"]
    assert kind == "LacksError" and "cannot reach the hub for dataset 'owner/texts'" in cause and "built-in" in fix


def test_an_old_client_that_may_run_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "3.6.0")
    with pytest.raises(documents.LacksError, match=r"datasets 3\.6\.0 may run code"):
        documents.open_documents("owner/texts", tokens=1, seed=0, held_out=False)
