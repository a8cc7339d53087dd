"""An interpreter for the embedded server whose models import from where this process does. Standard library only.

The python backend's stub starts Python isolated (pybind11, `initialize_interpreter`): it sees the site-packages of the
first `python3` on PATH and what their .pth files name, and neither PYTHONPATH nor the user's own site-packages. An
install with `pip install --target` or `--user` is found through nothing else. For such a one the server gets a virtual
environment (PEP 405) of one link and one .pth file in the user's cache, which leads to all of it.
"""

from __future__ import annotations

import hashlib
import os
import site
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trtkit
from trtkit.errors import LacksError


def unseen() -> list[Path]:
    """Folders that this process imports from and an isolated `python3` beside it would not: those on PYTHONPATH, the
    user's site-packages, and trtkit's own where only the folder that this process was started in leads to it."""
    found = [Path(folder) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    known = {Path(folder).resolve() for folder in sys.path[1:] if folder}
    user = Path(site.getusersitepackages())
    if site.ENABLE_USER_SITE and user.resolve() in known:
        found.append(user)
    own = Path(trtkit.__file__).parents[1]
    if own.resolve() not in known:
        found.append(own)
    return list(dict.fromkeys(folder.absolute() for folder in found))


def make(folders: Sequence[Path], cache: Path) -> Path:
    """A folder with a `python3` that sees `folders` behind the standard library, and what this process's has besides.

    Args:
        cache: it is made below, once per set of folders. Several processes may do so at once.

    Raises:
        LacksError: it cannot be written.
    """
    base = Path(getattr(sys, "_base_executable", sys.executable))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # Not bare lines: those would not read the .pth files in there, which editable installs live by.
    lines = [f"import site; site.addsitedir({str(folder)!r})\n" for folder in [*folders, *site.getsitepackages()]]
    files = {
        "pyvenv.cfg": f"home = {base.parent}\ninclude-system-site-packages = false\n",
        f"lib/{version}/site-packages/trtkit.pth": "".join(lines),
    }
    name = hashlib.sha256(repr((str(base), files)).encode()).hexdigest()[:16]
    root = cache / "trtkit" / "interpreters" / name
    try:
        for path, text in files.items():
            _write(root / path, text)
        (root / "bin").mkdir(exist_ok=True)
        if not (root / "bin" / "python3").exists():
            temporary = Path(tempfile.mkdtemp(dir=root)) / "python3"
            temporary.symlink_to(base)
            temporary.replace(root / "bin" / "python3")
            temporary.parent.rmdir()
    except OSError as error:
        raise LacksError(
            f"the server's Python does not see {folders[0]}, and {root} cannot be written: {error.strerror}",
            "install trtkit into a virtual environment, or set XDG_CACHE_HOME to a folder to write to",
        ) from error
    return root / "bin"


def _write(path: Path, text: str) -> None:
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
    Path(temporary).chmod(0o644)
    Path(temporary).replace(path)
