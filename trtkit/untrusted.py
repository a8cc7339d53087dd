"""Reading what somebody else wrote: plain files only, strict JSON, text that stays on one line.

A source comes from the internet, so nothing about its files is believed: a pipe in place of a file would wait for ever,
a device never ends, JSON may nest a million levels deep, and a name may carry line breaks or terminal codes.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from trtkit.errors import InputError

MAX_JSON = 100_000_000
"""Largest JSON file that is read, in bytes; the index of the largest known model has a sixth of it."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_POINTER = b"version https://git-lfs"


def open_plain(path: Path) -> BinaryIO:
    """Opens a plain file, or a link to one, for reading.

    Raises:
        InputError: it is missing, unreadable, or a folder, pipe, socket or device; names it.
    """
    try:
        # Looked at before it is opened: to open a pipe waits for a writer, and to open a device can set it off.
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "something else")
            raise InputError(f"{path} is {kind}, not a plain file", "put the file itself in its place")
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> InputError:
    """The error for a file or folder that the operating system does not let us read."""
    if error.errno == errno.ENOENT and path.is_symlink():
        return InputError(f"cannot read {path}: it is a link to a file that does not exist", "download the file again")
    fix = {errno.ENOENT: "is the download complete?", errno.ELOOP: "replace the link by the file itself"}
    cause = f"cannot read {path}: {error.strerror or type(error).__name__}"
    return InputError(cause, fix.get(error.errno or 0, "check the path and its permissions"))


def read_json(path: Path, kind: str = "a Hugging Face checkpoint") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        kind: what the file's folder should be, for the fix of a missing file.

    Raises:
        InputError: the file is missing, unreadable, too large, or holds no valid JSON object; names it.
    """
    if not os.path.lexists(path):
        raise InputError(f"cannot read {path}: {os.strerror(errno.ENOENT)}", f"is this the folder of {kind}?")
    with open_plain(path) as file:
        try:
            data = file.read(MAX_JSON + 1)
        except OSError as error:
            raise unreadable(path, error) from error
    if len(data) > MAX_JSON:
        raise InputError(f"{path}: larger than {MAX_JSON:,} bytes, which no such file is", "download the file again")
    refuse_pointer(path, data)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})", "download the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object", "download the file again")
    return value


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuses a git-lfs pointer, the little text that stands for a large file until git-lfs fetches it.

    Args:
        start: the first bytes of the file.
    """
    if start.startswith(_POINTER):
        raise InputError(
            f"{path} is a git-lfs pointer, not the file itself", f"run `git lfs pull` in {path.parent}, or download it"
        )


def parse_json(data: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8, no NaN or Infinity; and no key twice in an object, where readers would differ.

    Raises:
        ValueError: it is not; one short line says why.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it starts with a byte order mark")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def printable(value: object, limit: int = 120) -> str:
    """Text that fits in a line of an error: line breaks, terminal codes and the like escaped, cut after `limit`."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # an integer with more digits than Python converts, a bottomless list
        text = f"a huge {type(value).__name__}"
    cut = text[:limit] + "..." if len(text) > limit else text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def is_name(text: str, limit: int = 500) -> bool:
    """Whether a text can be the name of a tensor or file: not empty, not endless, nothing invisible in it."""
    return 0 < len(text) <= limit and text.isprintable()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key '{printable(key)}' appears twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
