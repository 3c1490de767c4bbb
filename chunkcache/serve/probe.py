"""Where a server can listen, and whether one answers."""

from __future__ import annotations

import socket

import httpx


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def is_up(url: str) -> bool:
    """Return whether a server answers."""
    try:
        return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx.TransportError:
        return False
