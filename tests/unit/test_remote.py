"""Sources in object storage, over the stores' own protocols, by stand-ins: moto for S3, gcp-storage-emulator for gs.

A recorder in front of moto notes every request and lets a test stop, change or damage an answer.
"""

from __future__ import annotations

import os
import re
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

from trtkit import hf, remote
from trtkit.errors import CheckFailedError, InputError, LacksError, TrtkitError
from trtkit.remote import stores, transfer

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
PATTERNS = ["*.json", "*.safetensors", "*.txt"]
BLOCK = 4096
BODY = bytes(range(256)) * 160  # ten blocks
RUN = (
    "import sys; from pathlib import Path; from trtkit import remote; from trtkit.remote import transfer\n"
    f"transfer.BLOCK_BYTES, transfer.CONCURRENT_BLOCKS = {BLOCK}, 1\n"
    f"print(remote.snapshot(sys.argv[1], patterns={PATTERNS}))"
)


class StandInS3:
    """moto behind a recorder. `gets` holds the (key, first byte, last byte) of every ranged read, in order."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.bucket = ""
        self.reset()
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def reset(self) -> None:
        self.gets: list[tuple[str, int, int]] = []
        self.listings = 0
        self.before: Callable[[str, int], None] = lambda key, start: None
        self.damage: Callable[[str, bytes], bytes] = lambda key, body: body

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        self.listings += "list-type=2" in environ.get("QUERY_STRING", "")
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_RANGE", ""))
        if environ["REQUEST_METHOD"] != "GET" or span is None:
            return self.app(environ, start_response)
        key = environ["PATH_INFO"].rsplit("/", 1)[-1]
        self.gets.append((key, int(span[1]), int(span[2])))
        self.before(key, int(span[1]))
        answer: list[Any] = []
        chunks = self.app(environ, lambda status, headers, *_: answer.extend([status, headers]))
        body = self.damage(key, b"".join(chunks))
        headers = [(name, value) for name, value in answer[1] if name.lower() != "content-length"]
        start_response(answer[0], [*headers, ("Content-Length", str(len(body)))])
        return [body]

    def client(self, service: str = "s3") -> Any:
        import boto3

        return boto3.client(service, endpoint_url=self.url, region_name="us-east-1")

    def put(self, **files: bytes) -> None:
        """Objects below `model/`; two underscores stand for a dot."""
        for name, body in files.items():
            self.client().put_object(Bucket=self.bucket, Key=f"model/{name.replace('__', '.')}", Body=body)

    def asked(self, key: str) -> list[tuple[int, int]]:
        return [(start, end) for name, start, end in self.gets if name == key]

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
    monkeypatch.setenv("TRTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transfer, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(transfer, "ATTEMPTS", 2)


@pytest.fixture
def s3(moto: StandInS3, monkeypatch: pytest.MonkeyPatch) -> StandInS3:
    """The stand-in with a bucket of its own, named by the environment as a user would."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stand-in")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "stand-in-secret")
    moto.reset()
    moto.bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    moto.client().create_bucket(Bucket=moto.bucket)
    return moto


def snapshot(s3: StandInS3, prefix: str = "/model") -> Path:
    return remote.snapshot(f"s3://{s3.bucket}{prefix}", patterns=PATTERNS, ignored=["consolidated*"])


def partials(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.partial"))


def process(s3: StandInS3) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, f"s3://{s3.bucket}/model"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trtkit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_takes_the_files_of_a_checkpoint_and_nothing_else(s3: StandInS3) -> None:
    s3.put(config__json=b"{}", model__safetensors=BODY, empty__txt=b"")
    s3.put(pytorch_model__bin=b"pickle", modeling_evil__py=b"raise SystemExit", consolidated__safetensors=b"copy")
    for key in ("model/", "model/sub/config.json", "model-other/config.json"):
        s3.client().put_object(Bucket=s3.bucket, Key=key, Body=b"")
    seen: list[tuple[int, int]] = []
    folder = remote.snapshot(
        f"s3://{s3.bucket}/model/",
        patterns=PATTERNS,
        ignored=["consolidated*"],
        on_progress=lambda *now: seen.append(now),
    )
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert contents == {"config.json": b"{}", "model.safetensors": BODY, "empty.txt": b""}
    assert {key for key, _, _ in s3.gets} == {"config.json", "model.safetensors"}
    total = len(BODY) + 2
    assert seen == sorted(seen) and seen[-1] == (total, total) and len(seen) > 10
    asked = len(s3.gets)
    assert snapshot(s3) == folder and len(s3.gets) == asked, "a finished snapshot is used again"


def test_converts_like_the_local_folder(s3: StandInS3, tmp_path: Path) -> None:
    for file in TINY.iterdir():
        s3.client().upload_file(str(file), s3.bucket, f"team/tiny/{file.name}")
    done = cli("convert", f"s3://{s3.bucket}/team/tiny", str(tmp_path / "remote"), "--tp", "2")
    assert done.returncode == 0, done.stderr
    assert cli("convert", str(TINY), str(tmp_path / "local"), "--tp", "2").returncode == 0
    names = sorted(file.name for file in (tmp_path / "local").iterdir() if file.suffix == ".safetensors")
    assert names == ["rank0.safetensors", "rank1.safetensors"]
    for name in [*names, "config.json"]:
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"stand-in-secret" not in file.read_bytes()


def test_continues_after_a_killed_process(s3: StandInS3, tmp_path: Path) -> None:
    s3.put(config__json=b"{}", model__safetensors=BODY)
    stalled, released = threading.Event(), threading.Event()

    def stall(key: str, start: int) -> None:
        if key == "model.safetensors" and start == 5 * BLOCK:
            stalled.set()
            released.wait(60)

    s3.before = stall
    child = process(s3)
    try:
        assert stalled.wait(60), child.poll()
    finally:
        child.kill()
        child.communicate()
        released.set()
    (rest,) = partials(tmp_path)
    size = rest.stat().st_size
    assert 4 * BLOCK <= size <= 5 * BLOCK and BODY.startswith(rest.read_bytes())
    s3.reset()
    folder = snapshot(s3)
    assert (folder / "model.safetensors").read_bytes() == BODY
    assert not s3.asked("config.json")
    assert sorted(s3.asked("model.safetensors")) == [
        (start, min(start + BLOCK, len(BODY)) - 1) for start in range(size, len(BODY), BLOCK)
    ]
    assert not partials(tmp_path)


def test_an_object_that_changes_meanwhile_is_never_mixed(s3: StandInS3, tmp_path: Path) -> None:
    s3.put(config__json=b"{}", model__safetensors=BODY)
    changed = BODY[::-1]
    once = threading.Event()

    def change(key: str, start: int) -> None:
        if key == "model.safetensors" and start == 5 * BLOCK and not once.is_set():
            once.set()
            s3.put(model__safetensors=changed)

    s3.before = change
    with pytest.raises(InputError, match=r"model\.safetensors changed while it was downloaded"):
        snapshot(s3)
    assert not partials(tmp_path)
    s3.reset()
    folder = snapshot(s3)
    assert (folder / "model.safetensors").read_bytes() == changed
    assert not s3.asked("config.json"), "what did not change is kept"


def test_a_changed_object_gives_another_snapshot_that_shares_the_rest(s3: StandInS3) -> None:
    s3.put(config__json=b"{}", model__safetensors=BODY)
    first = snapshot(s3)
    s3.put(config__json=b"[]")
    s3.reset()
    second = snapshot(s3)
    assert second != first and (first / "config.json").read_bytes() == b"{}"
    assert (second / "model.safetensors").samefile(first / "model.safetensors")
    assert {key for key, _, _ in s3.gets} == {"config.json"}


def test_a_damaged_snapshot_is_made_again(s3: StandInS3) -> None:
    s3.put(config__json=b"{}", model__safetensors=BODY)
    folder = snapshot(s3)
    (folder / "model.safetensors").write_bytes(b"shorter")
    assert (snapshot(s3) / "model.safetensors").read_bytes() == BODY


def test_works_without_hard_links(s3: StandInS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    s3.put(config__json=b"{}", model__safetensors=BODY)
    folder = snapshot(s3)
    assert (folder / "model.safetensors").read_bytes() == BODY
    assert snapshot(s3) == folder


def test_processes_share_one_download(s3: StandInS3) -> None:
    s3.put(config__json=b"{}", model__safetensors=BODY)
    stalled, released = threading.Event(), threading.Event()

    def stall(key: str, start: int) -> None:
        if key == "model.safetensors" and start == 0:
            stalled.set()
            released.wait(60)

    s3.before = stall
    children = [process(s3)]
    try:
        assert stalled.wait(60)
        children.append(process(s3))
        for _ in range(600):  # until the second one has its listing and waits for the first
            if s3.listings == 2:
                break
            threading.Event().wait(0.1)
        assert s3.listings == 2
    finally:
        released.set()
        answers = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert len(s3.gets) == len(set(s3.gets)) == 11


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda body: body[:-1], InputError, "model.safetensors is truncated"),
        (lambda body: b"x" + body[1:], CheckFailedError, "does not have the object's md5"),
    ],
)
def test_damaged_content(
    damage: Callable[[bytes], bytes], error: type[TrtkitError], message: str, s3: StandInS3
) -> None:
    s3.put(config__json=b"{}", model__safetensors=BODY)
    s3.damage = lambda key, body: damage(body) if key == "model.safetensors" else body
    with pytest.raises(error, match=message):
        snapshot(s3)
    s3.reset()
    assert (snapshot(s3) / "model.safetensors").read_bytes() == BODY


def test_an_etag_of_an_encrypted_object_is_no_md5(s3: StandInS3) -> None:
    s3.put(config__json=b"{}")
    s3.client().put_object(Bucket=s3.bucket, Key="model/model.safetensors", Body=BODY, ServerSideEncryption="aws:kms")
    s3.damage = lambda key, body: b"x" + body[1:] if key == "model.safetensors" else body
    assert (snapshot(s3) / "model.safetensors").stat().st_size == len(BODY)


def test_an_object_uploaded_in_parts(s3: StandInS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 2**20)
    s3.put(config__json=b"{}")
    name = {"Bucket": s3.bucket, "Key": "model/model.safetensors"}
    upload = s3.client().create_multipart_upload(**name)["UploadId"]
    parts = [b"a" * 5 * 2**20, b"b" * 100]
    done = [
        {"PartNumber": number, **_part(s3, name, upload, number, part)} for number, part in enumerate(parts, start=1)
    ]
    s3.client().complete_multipart_upload(**name, UploadId=upload, MultipartUpload={"Parts": done})
    assert (snapshot(s3) / "model.safetensors").read_bytes() == b"".join(parts)


def _part(s3: StandInS3, name: dict[str, str], upload: str, number: int, body: bytes) -> dict[str, str]:
    return {"ETag": s3.client().upload_part(**name, UploadId=upload, PartNumber=number, Body=body)["ETag"]}


@pytest.mark.parametrize(
    "key", ["model/..", "model/../config.json", "model/bad\x7fname.json", f"model/{'x' * 300}.json"]
)
def test_names_that_are_none_for_a_file_are_refused(key: str, s3: StandInS3, tmp_path: Path) -> None:
    s3.put(config__json=b"{}")
    s3.client().put_object(Bucket=s3.bucket, Key=key, Body=b"{}")
    with pytest.raises(InputError, match="which is no file name"):
        snapshot(s3)
    assert not (tmp_path / "cache").exists()


def test_only_pickles_and_only_others(s3: StandInS3) -> None:
    s3.put(config__json=b"{}", pytorch_model__bin=b"pickle")
    with pytest.raises(InputError, match=r"holds pickled weights \(pytorch_model\.bin\)"):
        snapshot(s3)
    s3.client().delete_object(Bucket=s3.bucket, Key="model/config.json")
    s3.client().delete_object(Bucket=s3.bucket, Key="model/pytorch_model.bin")
    s3.put(notes__md=b"#")
    with pytest.raises(InputError, match=r"holds no file of a checkpoint \(notes\.md\)"):
        snapshot(s3)
    with pytest.raises(InputError, match="is an object, not a folder"):
        snapshot(s3, "/model/notes.md")
    with pytest.raises(InputError, match="does not exist"):
        snapshot(s3, "/nothing")
    with pytest.raises(InputError, match="there is no bucket 'no-such-bucket'"):
        remote.snapshot("s3://no-such-bucket/model", patterns=PATTERNS)


def test_forbidden_and_unknown_keys(s3: StandInS3, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    s3.put(config__json=b"{}")
    s3.client("iam").create_user(UserName=s3.bucket)
    key = s3.client("iam").create_access_key(UserName=s3.bucket)["AccessKey"]
    requests.post(f"{s3.url}/moto-api/reset-auth", data=b"0", timeout=10).raise_for_status()
    try:
        with pytest.raises(LacksError, match="no valid credentials") as error:
            snapshot(s3)
        assert "stand-in" not in str(error.value)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        with pytest.raises(LacksError, match="access is forbidden"):
            snapshot(s3)
    finally:
        requests.post(f"{s3.url}/moto-api/reset-auth", data=b"inf", timeout=10).raise_for_status()


def test_no_credentials_and_no_endpoint(s3: StandInS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(LacksError, match="no valid credentials") as error:
        snapshot(s3)
    assert "AWS_ACCESS_KEY_ID" in error.value.fix
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stand-in")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:secret@127.0.0.1:9")  # discard: nobody listens
    with pytest.raises(LacksError, match=r"cannot reach 127\.0\.0\.1:9 for s3://") as error:
        snapshot(s3)
    assert "secret" not in error.value.cause + error.value.fix


def test_full_disk(s3: StandInS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3.put(config__json=b"{}", model__safetensors=BODY)
    folder = snapshot(s3)
    (stored,) = [file for file in (folder.parent / "objects").iterdir() if file.samefile(folder / "model.safetensors")]
    rest = stored.with_suffix(".partial")
    for file in (stored, folder / "model.safetensors"):
        file.unlink()
    rest.symlink_to("/dev/full")  # every write says that there is no space
    with pytest.raises(LacksError, match=r"the disk of .* is full"):
        snapshot(s3)
    assert not rest.is_symlink() and not rest.exists()
    free = type("Usage", (), {"free": 10})
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: free)
    s3.reset()
    with pytest.raises(LacksError, match="the download needs"):
        snapshot(s3)
    assert not s3.gets


def test_a_cache_that_cannot_be_written(s3: StandInS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3.put(config__json=b"{}")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRTKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(LacksError, match="cannot use the cache folder"):
        snapshot(s3)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAKEY:secret@bucket/model",
        "s3://AKIAKEY:sec/ret@bucket/model",
        "s3://AKIAKEY@bucket/secret",
        "gs://bucket/model?X-Goog-Signature=secret",
        "s3://bucket/model?versionId=secret",
        "s3://bucket/../secret",
        "s3://bucket//secret",
        "s3://bucket/secret#1",
        "s3://bu cket/secret",
        "s3:///secret",
        "http://bucket/secret",
    ],
)
def test_refused_urls_are_not_repeated(url: str) -> None:
    with pytest.raises(InputError) as error:
        remote.snapshot(url, patterns=PATTERNS)
    assert "secret" not in error.value.cause + error.value.fix
    assert error.value.fix


def test_a_revision_makes_no_sense() -> None:
    with pytest.raises(InputError, match="has no revision 'main'"):
        hf.open_source("s3://bucket/model", revision="main")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_extra_is_named(scheme: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (package, f"{package}.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LacksError, match=f"'{package}' is not installed") as error:
        remote.snapshot(f"{scheme}://bucket/model", patterns=PATTERNS)
    assert f"trtkit[{scheme}]" in error.value.fix


def test_opening_sources_imports_no_store() -> None:
    code = (
        "import sys, trtkit.hf; print([name for name in ('fsspec', 's3fs', 'gcsfs', 'aiohttp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


class StandInGcs:
    """gcp-storage-emulator, in memory, on a thread.

    It gives the newest content whatever generation is asked for. Cloud Storage does not know a replaced generation any
    more (404), and neither does this.
    """

    def __init__(self) -> None:
        from gcp_storage_emulator.server import RequestHandler, create_server

        class Strict(RequestHandler):  # type: ignore[misc]
            def do_GET(self) -> None:  # noqa: N802 - named by http.server
                parts = urlsplit(self.path)
                asked = parse_qs(parts.query).get("generation")
                if found := re.fullmatch("/download/storage/v1/b/([^/]+)/o/(.+)", parts.path):
                    stored = standin.server._storage.get_file_obj(found[1], unquote(found[2]))
                    if asked and asked != [stored["generation"]]:
                        self.send_error(404)
                        return
                super().do_GET()

        standin = self
        self.server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        self.server.start()
        self.server._api._httpd.RequestHandlerClass = partial(Strict, self.server._storage)
        self.url = f"http://127.0.0.1:{self.server._api._httpd.server_port}"

    def put(self, **files: bytes) -> None:
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import storage

        options = {"api_endpoint": self.url}
        client = storage.Client("project", credentials=AnonymousCredentials(), client_options=options)
        for name, body in files.items():
            client.bucket("bucket").blob(f"model/{name.replace('__', '.')}").upload_from_string(body)


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInGcs]:
    standin = StandInGcs()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", standin.url)
    yield standin
    standin.server.stop()


def gs_snapshot(prefix: str = "bucket/model") -> Path:
    return remote.snapshot(f"gs://{prefix}", patterns=PATTERNS)


def test_cloud_storage(gs: StandInGcs) -> None:
    gs.put(config__json=b"{}", model__safetensors=BODY, evil__py=b"raise SystemExit", empty__txt=b"")
    folder = gs_snapshot()
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert contents == {"config.json": b"{}", "model.safetensors": BODY, "empty.txt": b""}
    assert gs_snapshot("bucket/model/") == folder
    gs.put(config__json=b"[]")
    assert gs_snapshot() != folder
    for missing in ("bucket/nothing", "no-such-bucket/model"):
        with pytest.raises(InputError, match="does not exist"):
            gs_snapshot(missing)


def test_cloud_storage_object_that_changes_meanwhile(gs: StandInGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    gs.put(config__json=b"{}", model__safetensors=BODY)
    read, once = stores.Gcs.read, threading.Event()

    def changing(self: Any, item: Any, start: int, end: int) -> bytes:
        if item.name == "model.safetensors" and start == 5 * BLOCK and not once.is_set():
            once.set()
            gs.put(model__safetensors=BODY[::-1])
        return read(self, item, start, end)

    monkeypatch.setattr(stores.Gcs, "read", changing)
    with pytest.raises(InputError, match="changed while it was downloaded"):
        gs_snapshot()
    assert (gs_snapshot() / "model.safetensors").read_bytes() == BODY[::-1]


def test_cloud_storage_content_is_checked(gs: StandInGcs, monkeypatch: pytest.MonkeyPatch) -> None:
    gs.put(config__json=b"{}", model__safetensors=BODY)
    read = stores.Gcs.read
    with monkeypatch.context() as patch:
        patch.setattr(stores.Gcs, "read", lambda *arguments: read(*arguments)[::-1])
        with pytest.raises(CheckFailedError, match="does not have the object's crc32c"):
            gs_snapshot()
    assert (gs_snapshot() / "model.safetensors").read_bytes() == BODY


def test_cloud_storage_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(stores, "LISTING_SECONDS", 1.0)
    with pytest.raises(LacksError, match=r"cannot reach 127\.0\.0\.1:9 for gs://bucket/model"):
        gs_snapshot()
