"""A plain second name for a model repository. Standard library only.

Triton hands the repository's path to the python backend's stub as one word of a command line that a shell splits
(python_backend, src/stub_launcher.cc), and the stub's Python decodes it as ASCII: a blank in it ends the stub, an
accent ends the model's import. Such a repository is served through a symbolic link whose name has neither.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from trtkit.errors import LacksError

_PLAIN = re.compile(r"[A-Za-z0-9_./+-]+")
_PREFIX = "trtkit-alias-"
_LINK = "models"


def make(repository: Path, folder: Path) -> Path | None:
    """The link to serve instead of `repository`, in a new folder that only its owner enters; None when its own path
    will do. It lies in the deployment's `folder`, or among the temporary files where that has no plain path either.

    Raises:
        LacksError: there is no place for it.
    """
    if _PLAIN.fullmatch(str(repository)):
        return None
    fix = f"move {repository} to a path of letters, digits and _ . / + -, or set TMPDIR to one"
    place = next((path for path in (folder, Path(tempfile.gettempdir())) if _PLAIN.fullmatch(str(path))), None)
    if place is None:
        raise LacksError(f"the python backend cannot read models from '{repository}', nor through a link to it", fix)
    try:
        link = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place)) / _LINK
        link.symlink_to(repository, target_is_directory=True)
    except OSError as error:
        raise LacksError(f"cannot link to '{repository}' from {place}: {error.strerror}", fix) from error
    return link


def remove(alias: str | None) -> None:
    """Removes a link that `make` made, and its folder. Whatever else the path names is left alone."""
    link = Path(alias or "")
    if link.name == _LINK and link.parent.name.startswith(_PREFIX) and link.is_symlink():
        shutil.rmtree(link.parent, ignore_errors=True)  # takes the link away and never follows it
