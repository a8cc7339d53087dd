"""What Linux says about processes: identity, leftovers, listening sockets. Standard library only.

Source of the file formats: proc(5), the Linux manual page of /proc.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path

MARKER = "TRTKIT_DEPLOYMENT"
"""Environment variable that every process of a deployment inherits; its value is the token of one start."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is none or it is a zombie.

    A pid together with its start time names one process for good, whereas a pid alone is used again.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def members(
    token: str, *, session: int | None = None, parent: int | None = None, spare: Collection[int] = ()
) -> list[int]:
    """Pids that belong to a deployment, and all their descendants.

    They carry its marker, sit in the session that its server leads, or are children of `parent`: a model may start
    programs that escape one or two of these, hardly all. `spare` and this very process are left out.
    """
    wanted = f"{MARKER}={token}".encode()
    seeds, children = set(), defaultdict(list)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        fields = _stat(pid)
        if fields is None or fields[0] in "ZX" or pid == os.getpid() or pid in spare:
            continue
        children[int(fields[1])].append(pid)
        if int(fields[3]) == session or int(fields[1]) == parent or wanted in _environment(entry):
            seeds.add(pid)
    found, unseen = set(seeds), list(seeds)
    while unseen:
        born = [pid for pid in children[unseen.pop()] if pid not in found]
        found.update(born)
        unseen += born
    return sorted(found)


def kill_members(
    token: str, *, session: int | None = None, parent: int | None = None, spare: Collection[int] = ()
) -> list[int]:
    """Sends SIGKILL to what `members` finds until nothing is left; returns the pids of those that got it.

    Bounded at about ten seconds: a process stuck in the kernel dies when the kernel lets go of it, and one of another
    user does not die at all.
    """
    killed: set[int] = set()
    for _ in range(500):
        alive = members(token, session=session, parent=parent, spare=spare)
        if not alive:
            break
        killed.update(pid for pid in alive if send(pid, signal.SIGKILL))
        time.sleep(0.02)
    return sorted(killed)


def send(pid: int, number: int) -> bool:
    """Sends a signal; False when the process is gone, or is another user's and may not be signalled."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def listening_ports(pid: int) -> set[int]:
    """TCP ports on which this very process listens: its socket inodes, looked up among the listening ones."""
    inodes = set()
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = _read_link(link)
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
    except OSError:
        return set()
    ports = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            if columns[3] == _LISTEN and columns[9] in inodes:
                ports.add(int(columns[1].rsplit(":", 1)[1], 16))
    return ports


def die_with_parent() -> Callable[[], None]:
    """A function for the child side of a fork: the kernel then kills the child when the forking thread dies.

    The forking thread must live as long as its process, so fork from the main thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died between fork and prctl
            os._exit(1)

    return in_child


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants' orphans, so that it can wait for every one of them."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def remove_shared_memory(prefix: str, folder: Path = Path("/dev/shm")) -> list[str]:  # noqa: S108 - it is the place
    """Removes the shared-memory regions whose name begins with `prefix`; returns their names."""
    removed = []
    for region in folder.glob(prefix + "*") if prefix and folder.is_dir() else ():
        region.unlink(missing_ok=True)
        removed.append(region.name)
    return sorted(removed)


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third (state) on; the second, a name in brackets, may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _environment(entry: Path) -> list[bytes]:
    try:
        return (entry / "environ").read_bytes().split(b"\0")
    except OSError:  # gone, or of another user
        return []


def _read_link(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""
