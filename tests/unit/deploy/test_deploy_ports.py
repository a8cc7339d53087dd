"""Choosing ports."""

from __future__ import annotations

import socket

import pytest

from trtkit.deploy import ports
from trtkit.deploy.readiness import connect_host, get_status, url_host
from trtkit.errors import InputError, LacksError


def test_free_ports_differ_and_can_be_bound() -> None:
    chosen = ports.choose("127.0.0.1", (0, 0, 0))
    assert len(set(chosen)) == 3
    for port in chosen:
        socket.create_server(("127.0.0.1", port)).close()


def test_fixed_ports_stay_and_a_taken_one_is_named() -> None:
    (free,) = ports.choose("127.0.0.1", (0,))
    assert ports.choose("127.0.0.1", (0, free, 0))[1] == free
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LacksError, match=f"port {port} on 127.0.0.1: already in use"):
            ports.choose("127.0.0.1", (0, port, 0))


@pytest.mark.parametrize(
    ("host", "wanted", "said"),
    [
        ("127.0.0.1", (5, 5, 0), "the same port is given twice"),
        ("no such host", (0,), "is not an address"),
        ("192.0.2.1", (0,), "is not an address of this machine"),  # TEST-NET-1, which nobody has
    ],
)
def test_what_cannot_be(host: str, wanted: tuple[int, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ports.choose(host, wanted)


def test_where_clients_connect() -> None:
    assert connect_host("0.0.0.0") == "127.0.0.1"  # noqa: S104
    assert (url_host("::"), url_host("::1"), url_host("127.0.0.1")) == ("[::1]", "[::1]", "127.0.0.1")


def test_nobody_answers() -> None:
    (port,) = ports.choose("127.0.0.1", (0,))
    assert get_status("127.0.0.1", port, "/") is None
