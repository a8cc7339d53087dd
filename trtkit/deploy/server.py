"""Finds a tritonserver on this machine and prepares what its process needs: the python stub and the environment."""

from __future__ import annotations

import filecmp
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trtkit.deploy import interpreter
from trtkit.errors import InputError, LacksError, missing_extra

STUB = "triton_python_backend_stub"
# What a server may know of the caller's environment. Everything else stays out, above all tokens and passwords.
_PASSED = ("HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "USER", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")
_PASSED_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "UCX_", "OMPI_", "OPAL_", "PMIX_", "TRTLLM_", "TLLM_", "OMP_", "MKL_")
_SECRET = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|APIKEY"
    r"|(^|_)(KEYS?|PASS|PWD|PAT|PIN|AUTH|CREDS?|CERT|COOKIE|LOGIN)(_|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Server:
    """A tritonserver and what it needs.

    Attributes:
        binary: the executable.
        backends, caches: folders for `--backend-directory` and `--cache-directory`; None keeps the server's defaults.
        stub: the python backend's stub for this Python, which must lie in the python backend's folder.
        path: folders that must come first on PATH.
        library_path: folders that must come first on LD_LIBRARY_PATH.
    """

    binary: Path
    backends: Path | None = None
    caches: Path | None = None
    stub: Path | None = None
    path: tuple[Path, ...] = ()
    library_path: tuple[Path, ...] = ()


def find_server(tritonserver: str | None = None) -> Server:
    """The server to use: `tritonserver`, else `$TRITONSERVER`, else on PATH, else in /opt/tritonserver, else the one in
    the nvidia-pytriton package. Changes nothing.

    Raises:
        InputError: the one that was named is not an executable.
        LacksError: there is none, or the embedded one lacks something.
    """
    named = tritonserver or os.environ.get("TRITONSERVER")
    if named:
        found = shutil.which(named)
        if found is None:
            fix = "check --tritonserver and the variable TRITONSERVER"
            raise InputError(f"no tritonserver executable at {named}", fix)
        return _installed(Path(found))
    for candidate in (shutil.which("tritonserver"), shutil.which("/opt/tritonserver/bin/tritonserver")):
        if candidate:
            return _installed(Path(candidate))
    package = importlib.util.find_spec("pytriton")  # finds it without importing it
    if package is None or not package.submodule_search_locations:
        raise missing_extra("nvidia-pytriton", "local")
    return _embedded(Path(next(iter(package.submodule_search_locations))) / "tritonserver")


def prepared(server: Server) -> Server:
    """The server with the stub for this Python in its python backend's folder: the original folder, or a copy in the
    user's cache where that cannot be written; and with a Python that finds trtkit. Safe to run several times at once.

    Raises:
        LacksError: the copy, or what leads to trtkit, cannot be written either.
    """
    stub, backends = server.stub, server.backends
    if stub is None or backends is None:
        return server
    if folders := interpreter.unseen():
        server = replace(server, path=(interpreter.make(folders, _cache()), *server.path))
    try:
        _install(stub, backends / "python" / STUB)
    except OSError:  # read-only site-packages, or another user's
        return _private_copy(server, stub, backends)
    return server


def _private_copy(server: Server, stub: Path, backends: Path) -> Server:
    """The server with its python backend in the user's cache."""
    # One copy per installation and Python: size and time of the library change with the package.
    library = (backends / "python" / "libtriton_python.so").stat()
    copy = _cache() / "trtkit" / "backends" / f"py{stub.parent.name}-{library.st_size:x}-{library.st_mtime_ns:x}"
    try:
        for source in sorted((backends / "python").iterdir()):
            if source.is_file() and source.name != STUB:
                _install(source, copy / "python" / source.name)
        _install(stub, copy / "python" / STUB)
    except OSError as error:
        raise LacksError(
            f"cannot write {copy}: {error.strerror}", "set XDG_CACHE_HOME to a folder to write to"
        ) from error
    return replace(server, backends=copy)


def environment(server: Server, extra: Mapping[str, str], pass_names: Sequence[str] = ()) -> dict[str, str]:
    """The environment of the server's process: little, and nothing that looks like a secret unless it is named.

    Args:
        extra: set on top.
        pass_names: variables of the caller to hand on whatever their name.
    """
    chosen = {
        name: value
        for name, value in os.environ.items()
        if (name in _PASSED or name.startswith(_PASSED_PREFIXES)) and not _SECRET.search(name)
    }
    chosen.setdefault("HOME", str(Path.home()))
    chosen.setdefault("LANG", "C.UTF-8")
    path = [str(folder) for folder in server.path]
    path += [part for part in os.environ.get("PATH", "").split(os.pathsep) if part] or ["/usr/bin", "/bin"]
    libraries = [str(folder) for folder in server.library_path]
    libraries += [part for part in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part]
    chosen["PATH"] = os.pathsep.join(dict.fromkeys(path))
    if libraries:
        chosen["LD_LIBRARY_PATH"] = os.pathsep.join(dict.fromkeys(libraries))
    # Serving reads what is on disk: a tokenizer that is missing shall fail at once and not be fetched.
    chosen |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    chosen |= {name: os.environ[name] for name in pass_names if name in os.environ}
    return chosen | dict(extra)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _installed(binary: Path) -> Server:
    root = binary.resolve().parent.parent
    if (root / "python_backend_stubs").is_dir():
        return _embedded(root)
    backends, caches = root / "backends", root / "caches"
    return Server(binary, backends if backends.is_dir() else None, caches if caches.is_dir() else None)


def _embedded(root: Path) -> Server:
    """The server inside nvidia-pytriton. Its python backend wants a stub for this Python beside its library, finds
    site-packages through the first `python3` on PATH, and loads libpython."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = root / "python_backend_stubs"
    stub = stubs / version / STUB
    if not stub.is_file():
        known = sorted((entry.name for entry in stubs.iterdir()), key=lambda name: int(name.rpartition(".")[2]))
        raise LacksError(f"no python stub for Python {version} in {stubs}", f"use Python {', '.join(known)}")
    binaries = Path(sys.executable).parent
    if not os.access(binaries / "python3", os.X_OK):
        raise LacksError(
            f"no python3 in {binaries}, where the python backend looks for this interpreter",
            f"ln -s {Path(sys.executable).name} {binaries / 'python3'}",
        )
    # The bundled libraries are found from site-packages by themselves, but not from a copy of the backend.
    libraries = (_libpython_folder(version), root.parent.parent / "nvidia_pytriton.libs")
    return Server(root / "bin" / "tritonserver", root / "backends", root / "caches", stub, (binaries,), libraries)


def _libpython_folder(version: str) -> Path:
    """Folder of the shared libpython, preferably that of this interpreter."""
    name = f"libpython{version}.so.1.0"
    variables = sysconfig.get_config_vars()
    places = [variables.get("LIBDIR"), variables.get("LIBPL"), f"{sys.base_prefix}/lib"]
    if variables.get("MULTIARCH"):
        places += [f"{place}/{variables['MULTIARCH']}" for place in (variables.get("LIBDIR"), "/usr/lib", "/lib")]
    places += ["/usr/lib64", "/usr/lib", "/usr/local/lib"]
    for place in places:
        if place and (Path(place) / name).exists():
            return Path(place)
    looked = ", ".join(dict.fromkeys(str(place) for place in places if place))
    raise LacksError(
        f"no {name} for the python backend; looked in {looked}",
        f"install it (Debian, Ubuntu: apt install libpython{version}), or use a Python built with --enable-shared",
    )


def _install(source: Path, target: Path) -> None:
    """Copies a file in one step, unless the target holds the same bytes. Several processes may do so at once."""
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    os.close(handle)
    try:
        shutil.copyfile(source, temporary)
        Path(temporary).chmod(0o755)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
