"""Push and pull over the stores' own protocols, by stand-ins: moto for S3, gcp-storage-emulator for gs.

Both are made to let a test look at, stop or damage single requests; the second also learns the conditional writes that
Cloud Storage has and it lacks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from trtkit import pbtxt
from trtkit.errors import CheckFailedError, InputError, LacksError
from trtkit.remote import transfer
from trtkit.repository import remote, versions
from trtkit.repository.diff import diff_repositories
from trtkit.repository.version_policy import policy_text, version_numbers

CONFIG = """# what the model is for
name: "{name}"
backend: "python"
max_batch_size: 4
input [{{name: "x" data_type: TYPE_INT32 dims: [-1]}}]
output [{{name: "y" data_type: TYPE_INT32 dims: [-1]}}]
"""
ENSEMBLE = """name: "front"
platform: "ensemble"
max_batch_size: 4
input [{name: "x" data_type: TYPE_INT32 dims: [-1]}]
output [{name: "y" data_type: TYPE_INT32 dims: [-1]}]
ensemble_scheduling {
  step [{model_name: "llm" model_version: -1 input_map {key: "x" value: "x"} output_map {key: "y" value: "y"}}]
}
"""
BODY = bytes(range(256)) * 64


class StandInS3:
    """moto. `puts` holds the keys that were written, in order; `before` may stall or stop a write."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.one_at_a_time = threading.Lock()  # moto checks a condition and writes in two steps
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.reset()

    def reset(self) -> None:
        self.puts: list[str] = []
        self.gets: list[str] = []
        self.before: Callable[[str], None] = lambda key: None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        key = environ["PATH_INFO"].partition(f"{self.bucket}/")[2]
        if environ["REQUEST_METHOD"] == "GET" and key:
            self.gets.append(key)
        if environ["REQUEST_METHOD"] == "PUT" and key:
            self.before(key)
            self.puts.append(key)
            with self.one_at_a_time:
                return self.app(environ, start_response)
        return self.app(environ, start_response)

    bucket = ""

    def client(self) -> Any:
        import boto3

        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")

    def names(self) -> list[str]:
        found = self.client().list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return [item["Key"].removeprefix("team/llm/") for item in found]

    def put(self, name: str, body: bytes) -> None:
        self.client().put_object(Bucket=self.bucket, Key=f"team/llm/{name}", Body=body)

    def read(self, name: str) -> bytes:
        return bytes(self.client().get_object(Bucket=self.bucket, Key=f"team/llm/{name}")["Body"].read())

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture(scope="module")
def moto() -> Iterator[StandInS3]:
    standin = StandInS3()
    yield standin
    standin.close()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of this machine's user, no instance metadata, small blocks."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "FSSPEC_", "STORAGE_EMULATOR")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(transfer, "ATTEMPTS", 2)


@pytest.fixture
def s3(moto: StandInS3, monkeypatch: pytest.MonkeyPatch) -> StandInS3:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stand-in")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "stand-in-secret")
    moto.bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    moto.client().create_bucket(Bucket=moto.bucket)
    moto.reset()
    return moto


class StandInGcs:
    """gcp-storage-emulator, in memory, with ifGenerationMatch (412 when another generation is there)."""

    def __init__(self) -> None:
        from gcp_storage_emulator.server import RequestHandler, create_server

        lock = threading.Lock()

        class Strict(RequestHandler):  # type: ignore[misc]
            def do_POST(self) -> None:  # noqa: N802 - named by http.server
                parts = urlsplit(self.path)
                asked = parse_qs(parts.query)
                with lock:
                    if "ifGenerationMatch" in asked:
                        bucket = parts.path.split("/")[5]
                        there = standin.generation(unquote(bucket), asked["name"][0])
                        if there != asked["ifGenerationMatch"][0]:
                            self.rfile.read(int(self.headers.get("Content-Length") or 0))
                            self.send_error(412)
                            return
                    super().do_POST()

        standin = self
        self.server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        self.server.start()
        self.server._api._httpd.RequestHandlerClass = partial(Strict, self.server._storage)
        self.url = f"http://127.0.0.1:{self.server._api._httpd.server_port}"

    def generation(self, bucket: str, name: str) -> str:
        from gcp_storage_emulator.exceptions import NotFound

        try:
            return str(self.server._storage.get_file_obj(bucket, name)["generation"])
        except NotFound:
            return "0"


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInGcs]:
    standin = StandInGcs()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", standin.url)
    yield standin
    standin.server.stop()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    add(root, "llm", 1)
    (root / "llm" / "config.pbtxt").write_text(CONFIG.format(name="llm"))
    (root / "llm" / "labels.txt").write_text("a\nb\n")
    (root / "front" / "1").mkdir(parents=True)
    (root / "front" / "config.pbtxt").write_text(ENSEMBLE)
    (root / "trtkit-repository.json").write_text('{"generator": "trtkit"}')
    return root


def add(root: Path, model: str, number: int, body: bytes = BODY) -> Path:
    folder = root / model / str(number)
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model.py").write_text(f"VERSION = {number}\n")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "weights.bin").write_bytes(body)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"bytecode")
    return folder


def url(s3: StandInS3) -> str:
    return f"s3://{s3.bucket}/team/llm"


def states(done: remote.Transfer) -> dict[tuple[str, int], str]:
    return {(one.model, one.version): one.state for one in done.versions}


def policy(s3: StandInS3, model: str = "llm") -> str:
    return policy_text(pbtxt.loads(s3.read(f"{model}/config.pbtxt").decode()))


def process(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trtkit", "repo", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_there_and_back(s3: StandInS3, models: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = remote.push(models, url(s3), on_progress=lambda *now: seen.append(now))
    assert states(done) == {("front", 1): "moved", ("llm", 1): "moved"}
    assert seen[-1][0] == seen[-1][1] == sum(one.bytes for one in done.versions)
    assert sorted(s3.names()) == [
        "front/1/.gitkeep",
        "front/config.pbtxt",
        "llm/1/model.py",
        "llm/1/tokenizer/tokenizer.json",
        "llm/1/weights.bin",
        "llm/config.pbtxt",
        "llm/labels.txt",
        "trtkit-claim.front.1.json",
        "trtkit-claim.llm.1.json",
        "trtkit-repository.json",
        "trtkit-version.front.1.json",
        "trtkit-version.llm.1.json",
    ]
    folders = {key.split("/")[0] for key in s3.names() if "/" in key}
    assert folders == {"llm", "front"}, "Triton takes every folder for a model"
    order = [key.removeprefix("team/llm/") for key in s3.puts]
    complete, config = order.index("trtkit-version.llm.1.json"), order.index("llm/config.pbtxt")
    assert max(order.index(key) for key in order if key.startswith("llm/1/")) < complete < config
    assert config < order.index("front/config.pbtxt"), "an ensemble comes after its steps"

    out = tmp_path / "out"
    pulled = remote.pull(url(s3), out)
    assert states(pulled) == states(done)
    assert diff_repositories(models, out) == []
    assert (out / "llm" / "labels.txt").read_text() == "a\nb\n"
    assert (out / "front" / "1").is_dir()
    assert list(out.parent.glob(".out.*")) == [] and list(out.rglob("*.parts")) == []


def test_pushed_again_nothing_is_written(s3: StandInS3, models: Path) -> None:
    remote.push(models, url(s3))
    s3.reset()
    again = remote.push(models, url(s3))
    assert set(states(again).values()) == {"present"}
    assert again.configs == ()
    assert set(s3.puts) <= {f"team/llm/trtkit-claim.{name}.1.json" for name in ("llm", "front")}


def test_a_version_is_never_overwritten(s3: StandInS3, models: Path, tmp_path: Path) -> None:
    remote.push(models, url(s3))
    before = {key: s3.read(key) for key in s3.names()}
    (models / "llm" / "1" / "model.py").write_text("VERSION = 'other'\n")
    s3.reset()
    with pytest.raises(InputError, match="version 1 of 'llm' is there with other content"):
        remote.push(models, url(s3))
    assert s3.puts == []
    assert {key: s3.read(key) for key in s3.names()} == before
    with pytest.raises(InputError, match="has other content than what was pushed"):
        remote.pull(url(s3), models)
    (models / "llm" / "1" / "model.py").write_text("VERSION = 1\n")
    s3.put("llm/7/model.py", b"by hand")
    add(models, "llm", 7)
    with pytest.raises(InputError, match="llm/7 holds files that trtkit did not push"):
        remote.push(models, url(s3), models=["llm"], dry_run=True)


@pytest.mark.parametrize("at", ["llm/1/weights.bin", "trtkit-version.llm.1.json", "llm/config.pbtxt"])
def test_goes_on_after_a_killed_push(s3: StandInS3, models: Path, tmp_path: Path, at: str) -> None:
    stalled, released = threading.Event(), threading.Event()

    def stall(key: str) -> None:
        if key.endswith(at):
            stalled.set()
            released.wait(60)
            raise ConnectionResetError("the pusher is gone")

    s3.before = stall
    child = process("push", models, url(s3))
    try:
        assert stalled.wait(60), child.communicate()
    finally:
        child.kill()
        child.communicate()
        released.set()
    assert "llm/config.pbtxt" not in s3.names(), "Triton serves nothing of it"
    if at == "llm/config.pbtxt":
        with pytest.raises(InputError, match=r"has no config\.pbtxt yet"):
            remote.pull(url(s3), tmp_path / "out")
    else:
        assert "trtkit-version.llm.1.json" not in s3.names(), "pull takes nothing of it"
    there = {key for key in s3.names() if key.startswith("llm/1/")}
    s3.reset()
    remote.push(models, url(s3))
    assert not {key.removeprefix("team/llm/") for key in s3.puts} & there, "what was there is not sent again"
    remote.pull(url(s3), tmp_path / "out")
    assert diff_repositories(models, tmp_path / "out") == []


def test_others_do_not_finish_what_was_interrupted_with_other_content(s3: StandInS3, models: Path) -> None:
    manifest = remote.manifest_of(models / "llm" / "1", "llm", 1)
    s3.put(manifest.name("claim"), manifest.dumps())
    (models / "llm" / "1" / "model.py").write_text("VERSION = 'other'\n")
    with pytest.raises(InputError, match="is being pushed with other content") as error:
        remote.push(models, url(s3))
    assert "trtkit-claim.llm.1.json" in error.value.fix


def test_of_two_pushers_exactly_one_wins(s3: StandInS3, models: Path, tmp_path: Path) -> None:
    """Both have seen that nothing is there before either claims."""
    other = tmp_path / "other"
    add(other, "llm", 1, BODY[::-1])
    (other / "llm" / "config.pbtxt").write_text(CONFIG.format(name="llm"))
    both = threading.Barrier(2)

    def meet(key: str) -> None:
        if "claim.llm" in key:
            both.wait(60)

    s3.before = meet
    results: list[object] = []

    def run(root: Path) -> None:
        try:
            remote.push(root, url(s3), models=["llm"])
            results.append(root)
        except InputError as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(root,)) for root in (models, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [result for result in results if isinstance(result, Path)]
    (loser,) = [result for result in results if isinstance(result, InputError)]
    assert len(winners) == 1 and "other content" in loser.cause
    s3.reset()
    remote.pull(url(s3), tmp_path / "out")
    assert (tmp_path / "out/llm/1/weights.bin").read_bytes() == (winners[0] / "llm/1/weights.bin").read_bytes()


def test_two_pushers_of_two_versions_both_come_into_the_config(s3: StandInS3, models: Path, tmp_path: Path) -> None:
    roots = []
    for number in (2, 3):
        root = tmp_path / f"models{number}"
        add(root, "llm", number)
        (root / "llm" / "config.pbtxt").write_text(CONFIG.format(name="llm") + "version_policy {all {}}\n")
        roots.append(root)
    both = threading.Barrier(2)

    def meet(key: str) -> None:
        if key.endswith("config.pbtxt") and len([put for put in s3.puts if put.endswith("config.pbtxt")]) < 1:
            both.wait(60)

    s3.before = meet
    threads = [threading.Thread(target=remote.push, args=(root, url(s3))) for root in roots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert policy(s3) == "specific:2,3"


def test_triton_is_told_of_complete_versions_only(s3: StandInS3, models: Path, tmp_path: Path) -> None:
    """The policy of the source is spelt out there, and comes back with a pull."""
    (models / "llm" / "config.pbtxt").write_text(
        CONFIG.format(name="llm") + "version_policy {latest {num_versions: 2}}\n"
    )
    remote.push(models, url(s3))
    assert policy(s3) == "specific:1"
    s3.put("llm/2/model.py", b"a version that is being filled")
    s3.put("trtkit-claim.llm.2.json", b"{}")
    add(models, "llm", 3)
    remote.push(models, url(s3), models=["llm"])
    assert policy(s3) == "specific:1,3"
    remote.pull(url(s3), tmp_path / "out")
    assert policy_text(pbtxt.load(tmp_path / "out/llm/config.pbtxt")) == "latest:2"
    assert version_numbers(tmp_path / "out/llm") == (1, 3)
    versions.set_policy(models, "llm", "specific:1")
    assert remote.push(models, url(s3)).configs == ("llm",)
    assert policy(s3) == "specific:1"
    config = models / "llm" / "config.pbtxt"
    config.write_text(CONFIG.format(name="llm") + "version_policy {specific {versions: [9]}}\n")
    s3.reset()
    with pytest.raises(InputError, match="policy specific:9 of 'llm' serves none of the versions"):
        remote.push(models, url(s3))
    assert s3.puts == [], "refused before anything was written"


def test_pull_into_a_repository_adds_what_is_missing(s3: StandInS3, models: Path, tmp_path: Path) -> None:
    (models / "front" / "labels.txt").write_text("c\n")
    remote.push(models, url(s3))
    out = tmp_path / "out"
    remote.pull(url(s3), out, models=["llm"])
    assert not (out / "front").exists()
    (out / "llm" / "labels.txt").unlink()
    inode = (out / "llm" / "1" / "model.py").stat().st_ino
    add(models, "llm", 2)
    versions.set_policy(models, "llm", "all")
    remote.push(models, url(s3))
    planned = remote.pull(url(s3), out, dry_run=True)
    assert not (out / "front").exists()
    pulled = remote.pull(url(s3), out)
    assert states(pulled) == states(planned) == {("front", 1): "moved", ("llm", 1): "present", ("llm", 2): "moved"}
    assert diff_repositories(models, out) == []
    assert (out / "llm" / "1" / "model.py").stat().st_ino == inode
    assert list(tmp_path.glob(".out.*")) == []
    again = remote.pull(url(s3), out)
    assert set(states(again).values()) == {"present"} and again.configs == ()


def test_a_pull_that_is_killed_goes_on(s3: StandInS3, models: Path, tmp_path: Path) -> None:
    remote.push(models, url(s3))
    out = tmp_path / "out"
    app, stalled, released = s3.app, threading.Event(), threading.Event()

    def stall(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith("weights.bin"):
            stalled.set()
            released.wait(60)
        return app(environ, start_response)

    s3.app = stall
    child = process("pull", url(s3), out)
    try:
        assert stalled.wait(60), child.communicate()
        for _ in range(600):
            if list(tmp_path.rglob("model.py")) and list(tmp_path.glob(".out.partial-*/llm/1/model.py")):
                break
            threading.Event().wait(0.05)
    finally:
        child.kill()
        child.communicate()
        released.set()
        s3.app = app
    assert not out.exists()
    s3.reset()
    remote.pull(url(s3), out)
    assert diff_repositories(models, out) == []
    assert not any(key.endswith("llm/1/model.py") for key in s3.gets), "what was here is not asked for again"
    assert list(tmp_path.glob(".out.*")) == []


def test_damage_is_found(s3: StandInS3, models: Path, tmp_path: Path) -> None:
    remote.push(models, url(s3))
    s3.put("llm/1/weights.bin", BODY[::-1])
    with pytest.raises(CheckFailedError, match=r"weights\.bin is not what was pushed"):
        remote.pull(url(s3), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for damage in (b"{", b'{"format": 1}', _with_file(s3, "../../evil"), _with_file(s3, "/etc/evil")):
        s3.put("trtkit-version.llm.1.json", damage)
        with pytest.raises(InputError, match=r"trtkit-version\.llm\.1\.json is damaged"):
            remote.pull(url(s3), tmp_path / "out")


def _with_file(s3: StandInS3, name: str) -> bytes:
    data = json.loads(s3.read("trtkit-claim.llm.1.json"))
    data["files"][name] = {"size": 0, "sha256": "0" * 64}
    return json.dumps(data).encode()


def test_dry_run_and_wrong_input(s3: StandInS3, models: Path, tmp_path: Path) -> None:
    planned = remote.push(models, url(s3), dry_run=True)
    assert states(planned) == {("front", 1): "moved", ("llm", 1): "moved"} and not planned.done
    assert s3.puts == [] and s3.names() == []
    with pytest.raises(InputError, match="holds no version that trtkit pushed"):
        remote.pull(url(s3), tmp_path / "out")
    with pytest.raises(InputError, match="has no model 'nope'"):
        remote.push(models, url(s3), models=["nope"])
    with pytest.raises(InputError, match=r"no bucket|does not exist"):
        remote.push(models, "s3://no-such-bucket-here/x")
    with pytest.raises(InputError, match="no s3:// or gs:// address"):
        remote.push(models, "http://bucket/x")
    (models / "llm" / "1" / "link").symlink_to(models)
    with pytest.raises(InputError, match="neither a file nor a folder"):
        remote.push(models, url(s3))


def test_without_credentials(s3: StandInS3, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(LacksError, match="no valid credentials") as error:
        remote.push(models, url(s3))
    assert "stand-in-secret" not in str(error.value)


def test_cloud_storage(gs: StandInGcs, models: Path, tmp_path: Path) -> None:
    address, out = "gs://bucket/team/llm", tmp_path / "out"
    assert set(states(remote.push(models, address)).values()) == {"moved"}
    assert set(states(remote.push(models, address)).values()) == {"present"}
    remote.pull(address, out)
    assert diff_repositories(models, out) == []
    add(models, "llm", 2, b"")
    assert remote.push(models, address).configs == ("llm",)
    pulled = remote.pull(address, out)
    assert states(pulled)[("llm", 2)] == "moved"
    assert diff_repositories(models, out) == []
    (models / "llm" / "2" / "model.py").write_text("VERSION = 'other'\n")
    with pytest.raises(InputError, match="versions are never overwritten"):
        remote.push(models, address)
    with pytest.raises(InputError, match=r"does not exist|no bucket"):
        remote.push(models, "gs://no-such-bucket-here/x")


def test_the_commands(s3: StandInS3, models: Path, tmp_path: Path) -> None:
    pushed = process("push", models, url(s3), "--json")
    out, err = pushed.communicate(timeout=60)
    assert pushed.returncode == 0, err
    assert [one["state"] for one in json.loads(out)["versions"]] == ["moved", "moved"]
    assert "stand-in-secret" not in out + err
    pulled = process("pull", url(s3), tmp_path / "out")
    out, err = pulled.communicate(timeout=60)
    assert pulled.returncode == 0, err
    assert "pulled" in out
    assert "config.pbtxt written: front, llm" in err
