"""Ports to listen on."""

from __future__ import annotations

import errno
import random
import socket

# Below the ports that Linux gives to connections by itself: a port from there can be taken before it is listened on.
RANGE = range(20000, 32768)


def free_port(host: str = "127.0.0.1") -> int:
    """A port from RANGE that nobody listens on at ``host`` now, drawn at random.

    Raises:
        OSError: none is free.
    """
    for port in random.SystemRandom().sample(RANGE, len(RANGE)):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port
    raise OSError(errno.EADDRINUSE, f"all ports from {RANGE.start} to {RANGE.stop - 1} of {host} are in use")
