"""Finding a tritonserver, preparing its stub, and its environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trtkit.deploy import server
from trtkit.deploy.server import STUB, Server, environment, find_server, prepared
from trtkit.errors import InputError, LacksError

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def embedded(tmp_path: Path) -> Path:
    """The folders of nvidia-pytriton's server, with other content."""
    root = tmp_path / "site" / "pytriton" / "tritonserver"
    for file in ("bin/tritonserver", f"python_backend_stubs/{VERSION}/{STUB}", "python_backend_stubs/3.8/" + STUB):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(file)
        (root / file).chmod(0o755)
    (root / "backends" / "python").mkdir(parents=True)
    (root / "backends" / "python" / "libtriton_python.so").write_text("library")
    (root / "caches").mkdir()
    return root


@pytest.fixture(autouse=True)
def no_server_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITONSERVER", raising=False)


def test_the_named_one_comes_first(tritonserver: str, embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSERVER", str(embedded / "bin" / "tritonserver"))
    assert find_server(tritonserver) == Server(Path(tritonserver))
    assert find_server().backends == embedded / "backends"
    monkeypatch.delenv("TRITONSERVER")
    monkeypatch.setenv("PATH", str(Path(tritonserver).parent))
    assert find_server().binary == Path(tritonserver)
    with pytest.raises(InputError, match="no tritonserver executable at /no/such"):
        find_server("/no/such")


def test_without_any_server_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.shutil, "which", lambda name: None)
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LacksError, match="nvidia-pytriton") as lacking:
        find_server()
    assert "trtkit[local]" in lacking.value.fix


def test_the_embedded_one_gets_the_stub_of_this_python(embedded: Path) -> None:
    found = find_server(str(embedded / "bin" / "tritonserver"))
    stub = embedded / "backends" / "python" / STUB
    assert not stub.exists()  # finding changes nothing
    assert prepared(found).backends == embedded / "backends"
    assert stub.read_text() == f"python_backend_stubs/{VERSION}/{STUB}"
    assert stub.stat().st_mode & 0o111
    before = stub.stat()
    prepared(found)
    assert (stub.stat().st_ino, stub.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # left alone
    stub.write_text("of another Python")
    prepared(found)
    assert stub.read_text() == f"python_backend_stubs/{VERSION}/{STUB}"
    assert found.path == (Path(sys.executable).parent,)
    assert (found.library_path[0] / f"libpython{VERSION}.so.1.0").exists()


def test_many_processes_may_prepare_at_once(embedded: Path) -> None:
    """While four processes install the stub over and over, a reader never sees a part of it or none of it."""
    content = "x" * 3_000_000
    (embedded / "python_backend_stubs" / VERSION / STUB).write_text(content)
    target = embedded / "backends" / "python" / STUB
    found = find_server(str(embedded / "bin" / "tritonserver"))
    prepared(found)
    code = (
        "import sys; from pathlib import Path; from trtkit.deploy import server\n"
        "source, target = map(Path, sys.argv[1:])\n"
        "server.filecmp.cmp = lambda *args, **options: False  # install every time\n"
        "for _ in range(30): server._install(source, target)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(found.stub), str(target)]) for _ in range(4)]
    reads = 0
    try:
        while any(writer.poll() is None for writer in writers):
            assert len(target.read_text()) == len(content)
            reads += 1
    finally:
        for writer in writers:
            writer.kill()  # those that have ended do not mind
            writer.wait()
    assert reads
    assert [writer.returncode for writer in writers] == [0] * 4
    assert sorted(path.name for path in target.parent.iterdir()) == ["libtriton_python.so", STUB]


def test_a_private_copy(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install = server._install

    def read_only(source: Path, target: Path) -> None:
        if target.is_relative_to(embedded):
            raise PermissionError(13, "Permission denied")
        install(source, target)

    monkeypatch.setattr(server, "_install", read_only)  # the tests may run as root, whom no permission stops
    copy = prepared(find_server(str(embedded / "bin" / "tritonserver")))
    assert copy.backends is not None
    assert copy.backends.is_relative_to(tmp_path / "cache")
    assert sorted(path.name for path in (copy.backends / "python").iterdir()) == ["libtriton_python.so", STUB]
    assert not (embedded / "backends" / "python" / STUB).exists()
    assert copy.library_path[-1] == embedded.parent.parent / "nvidia_pytriton.libs"
    again = prepared(find_server(str(embedded / "bin" / "tritonserver")))
    assert again.backends == copy.backends


def test_what_the_embedded_one_lacks(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = str(embedded / "bin" / "tritonserver")
    with monkeypatch.context() as patch:
        patch.setattr(server.sys, "executable", str(tmp_path / "python"))
        with pytest.raises(LacksError, match=f"no python3 in {tmp_path}"):
            find_server(binary)
    with monkeypatch.context() as patch:
        patch.setattr(server.sysconfig, "get_config_vars", lambda: {"LIBDIR": str(tmp_path)})
        patch.setattr(server.sys, "base_prefix", str(tmp_path))
        patch.setattr(server.Path, "exists", lambda path: False)
        with pytest.raises(LacksError, match=rf"no libpython{VERSION}\.so\.1\.0") as lacking:
            find_server(binary)
        assert str(tmp_path) in lacking.value.cause
    (embedded / "python_backend_stubs" / VERSION / STUB).unlink()
    with pytest.raises(LacksError, match=f"no python stub for Python {VERSION}"):
        find_server(binary)


def test_the_environment_is_small_and_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "NVIDIA_API_KEY", "NVIDIA_TOKEN", "CUDA_PASSWORD", "OMPI_KEY"]
    secrets += ["NVIDIA_NGC_PAT", "NCCL_AUTH", "UCX_PASS", "OMPI_MCA_auth_x", "CUDA_CREDS", "NVIDIA_NGC_APIKEY"]
    for name in secrets:
        monkeypatch.setenv(name, "leaked")
    harmless = (
        "NCCL_DEBUG",
        "OMPI_MCA_mca_base_param_path",
        "CUDA_PATH",
        "NCCL_PATTERN",
    )  # only whole words are secret
    for name in ("HF_HOME", "CUDA_VISIBLE_DEVICES", *harmless, "UNRELATED"):
        monkeypatch.setenv(name, name.lower())
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/some/lib")
    given = Server(Path("/s"), path=(Path("/venv/bin"),), library_path=(Path("/py/lib"),))
    found = environment(given, {"MARK": "1"}, ["HF_TOKEN", "ABSENT"])
    assert "leaked" not in [value for name, value in found.items() if name != "HF_TOKEN"]
    assert found["HF_TOKEN"] == "leaked"  # noqa: S105
    assert (found["PATH"], found["LD_LIBRARY_PATH"]) == ("/venv/bin:/usr/bin", "/py/lib:/some/lib")
    assert (found["CUDA_VISIBLE_DEVICES"], found["HF_HUB_OFFLINE"], found["MARK"]) == ("cuda_visible_devices", "1", "1")
    assert all(found[name] == name.lower() for name in harmless)
    assert "UNRELATED" not in found
    assert "ABSENT" not in found
