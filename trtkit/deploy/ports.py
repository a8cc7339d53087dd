"""TCP ports: free ones, and whether one is taken. Standard library only."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from contextlib import ExitStack

from trtkit.errors import InputError, LacksError

_LOOPBACK = "use 127.0.0.1, which only this machine reaches"


def choose(host: str, wanted: Sequence[int]) -> list[int]:
    """Ports for `wanted`, where 0 stands for a free one. All of them are held at once, so they differ.

    They are free when this returns, and nothing keeps them free after that: whoever starts a server on them checks
    that it is this server that listens there, and asks again when it is not.

    Raises:
        LacksError: a fixed port is taken or may not be used.
        InputError: the host is no address of this machine, or a port is wanted twice.
    """
    fixed = [port for port in wanted if port]
    if len(set(fixed)) != len(fixed):
        given = ", ".join(map(str, wanted))
        raise InputError(f"the same port is given twice: {given}", "HTTP, gRPC and metrics need one each")
    with ExitStack() as held:
        # The fixed ones first, so that no free one takes their place.
        taken = {port: _bind(host, port, held) for port in fixed}
        return [taken[port] if port else _bind(host, 0, held) for port in wanted]


def _bind(host: str, port: int, held: ExitStack) -> int:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InputError(f"deploy.host '{host}' is not an address: {error.strerror}", _LOOPBACK) from None
    listener = held.enter_context(socket.socket(family, kind, protocol))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
    try:
        listener.bind(address)
        listener.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(f"deploy.host '{host}' is not an address of this machine", _LOOPBACK) from None
        reason = "already in use" if error.errno == errno.EADDRINUSE else str(error.strerror).lower()
        raise LacksError(f"port {port} on {host}: {reason}", "choose another port, or 0 for a free one") from None
    return int(listener.getsockname()[1])
