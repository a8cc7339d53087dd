"""What a server's log says about why it does not serve. Standard library only."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trtkit.errors import LacksError

# glog's form, which Triton writes: severity, month and day, time, process, file:line] "text"
_LINE = re.compile(r'^([IWEF])\d{4} [\d:.]+ +\d+ [\w./-]+:\d+\] "?(.*?)"?$')
# Protocol Buffers' own parser, which alone knows line and column in a config.pbtxt
_PARSER = re.compile(r"^\[libprotobuf ERROR [^\]]*\] (.*)$")
_LOADING = re.compile(r"loading: ([^\s:]+):\d+")
_LOADED = re.compile(r"successfully loaded '([^']+)'")
# Never the reason for anything: the first three are said at every start without a GPU.
# The last one only says that there is a reason elsewhere.
_NOISE = ("CudaDriverHelper", "NVML", "DCGM", "failed to load all models")
_NO_ADDRESS = "Name or service not known"  # which gRPC then reports as a port in use
_DIED = re.compile(r"^terminate called after throwing an instance of '([^']+)'\n(?:  what\(\):  (.*))?", re.MULTILINE)
_TAKEN = re.compile(r"already in use|address already in use", re.IGNORECASE)


@dataclass(frozen=True)
class Loading:
    """How far loading is: models whose load began, and those that are done."""

    begun: tuple[str, ...]
    done: tuple[str, ...]


def begin(log: Path) -> None:
    """An empty log that only its owner reads; the last one is kept beside it.

    Raises:
        LacksError: it cannot be written.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists() and log.stat().st_size:
            log.replace(log.with_name(log.name + ".previous"))
        os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        raise LacksError(f"cannot write the log {log}: {error.strerror}", "choose another folder") from error


def read_end(path: Path, limit: int = 1 << 20) -> str:
    """The last `limit` bytes of a log as text; empty when there is no log."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - limit))
            return stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log; none when there is no log."""
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return [line.rstrip("\n") for line in deque(stream, maxlen=lines)]
    except OSError:
        return []


def follow(path: Path, lines: int, alive: Callable[[], bool]) -> Iterator[str]:
    """The last lines of a log, and then those that come, until `alive` says no and all is told."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        begun = ""
        pieces: Iterable[str] = deque(stream, maxlen=lines)
        ending = False
        while True:
            for piece in pieces:
                begun += piece
                if begun.endswith("\n"):
                    yield begun.rstrip("\n")
                    begun = ""
            if ending:
                break
            time.sleep(0.2)
            ending = not alive()  # asked before the last look, so that nothing said meanwhile is lost
            pieces = stream
    if begun:
        yield begun


def port_taken(text: str) -> bool:
    """Whether the server gave up because another process has one of its ports."""
    return _NO_ADDRESS not in text and any(_TAKEN.search(line) for line in _errors(text))


def is_triton(text: str) -> bool:
    """Whether a Triton server spoke at all: it logs in its own form before it does anything."""
    return any(_LINE.match(line) for line in text.splitlines())


def died(text: str) -> str | None:
    """How a process of the server was ended by an exception that nobody caught, such as a model's stub.

    The server itself may never notice and wait for the stub for ever.
    """
    found = _DIED.search(text)
    return None if found is None else f"terminated by {found[1]}" + (f": {found[2].strip()}" if found[2] else "")


def loading(text: str) -> Loading:
    """Progress of loading, from the log so far."""
    begun = dict.fromkeys(_LOADING.findall(text))
    done = dict.fromkeys(_LOADED.findall(text))
    return Loading(tuple(begun), tuple(done))


def reasons(text: str, limit: int = 4) -> list[str]:
    """The server's own words for why it failed, the most telling first, at most `limit` lines, or none.

    These are the reasons in the table of unavailable models, then errors that say something else. Python exceptions
    are part of both.
    """
    found = _table_reasons(text)
    for error in _errors(text):
        if error and not any(_core(known) in error or error in known for known in found):
            found.append(error)
    return [_shortened(line) for line in found[:limit]]


def _core(reason: str) -> str:
    """A table's reason without the model's name and the status word, as the server repeats it in other lines."""
    return re.sub(r"^[^:]+: ([A-Z][a-z ]+: )?", "", reason)


def _errors(text: str) -> list[str]:
    """What error lines say, with the lines that continue them (a traceback has many)."""
    found: list[list[str]] = []
    open_entry = False
    for line in text.splitlines():
        said = _said(line)
        if said is not None:
            open_entry = said != ""
            if open_entry:
                found.append([said])
        elif open_entry and line.strip() and not line.startswith(("+", "|")):
            found[-1].append(line)
        else:
            open_entry = False
    return [_plain(" ".join(entry)) for entry in found]


def _said(line: str) -> str | None:
    """The text of an error line, "" for a line of another kind that begins an entry, None for one that begins none."""
    entry = _LINE.match(line)
    if entry is not None:
        said = entry[2] if entry[1] in "EF" else ""
    elif (parser := _PARSER.match(line)) is not None:
        said = parser[1]
    elif line.startswith(("error: ", "Error: ")):
        said = line.split(": ", 1)[1]
    else:
        return None
    return "" if any(noise in said for noise in _NOISE) else said


def _table_reasons(text: str) -> list[str]:
    """`model: reason` from the rows `| name | version | UNAVAILABLE: reason |`, whose cells may span several lines."""
    found: list[str] = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|", 2)] if line.startswith("|") else []
        if len(cells) != 3:
            inside = False
        elif cells[2].startswith("UNAVAILABLE"):
            found.append(f"{cells[0]}: {cells[2].removeprefix('UNAVAILABLE').lstrip(': ')}")
            inside = True
        elif inside and not cells[0] and not cells[1]:
            found[-1] += " " + cells[2]
        else:
            inside = False
    return [_plain(reason) for reason in found]


def _plain(text: str) -> str:
    """One line: real and written-out line ends become blanks."""
    return " ".join(text.replace("\\n", " ").strip('"').split())


def _shortened(line: str, limit: int = 500) -> str:
    return line if len(line) <= limit else line[: limit // 2] + " ... " + line[-limit // 2 :]
