"""Ports that a program may listen on some seconds after it was given them."""

from __future__ import annotations

import socket

import pytest

from megatron_aligndistil.parallel import ports


def test_it_can_be_listened_on():
    port = ports.free_port()
    assert 20000 <= port < 32768  # a connection of anybody's takes one from 32768
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()


def test_one_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as listener:
        first = ports.free_port()
        listener.bind(("127.0.0.1", first))
        listener.listen()
        other = next(port for port in ports.RANGE if port != first)
        monkeypatch.setattr(ports, "RANGE", [first, other])
        assert {ports.free_port() for _ in range(20)} == {other}
        monkeypatch.setattr(ports, "RANGE", range(first, first + 1))
        with pytest.raises(OSError, match=f"all ports from {first} to {first} of 127.0.0.1 are in use"):
            ports.free_port()


def test_a_host_that_is_not_here():
    with pytest.raises(OSError, match="assign requested address"):
        ports.free_port("192.0.2.1")  # RFC 5737: nobody's
