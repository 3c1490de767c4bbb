"""A real server on a port of this machine, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from support.llm import wrapped

from chunkcache.engine.scheduler import Limits
from chunkcache.serve.app import ServeOptions, create_app
from chunkcache.serve.service import Service

MODEL = "tiny"


@contextmanager
def served(llm: Any = None, limits: Limits | None = None, **options: Any) -> Iterator[tuple[str, Service]]:
    """Serve a tiny model; yield the server's URL and its service."""
    service = Service(llm or wrapped(), MODEL, limits)
    app = create_app(service, ServeOptions(**options))
    # FastAPI builds the routes it includes on their first use, with `warnings.catch_warnings`, which threads must not
    # share: two servers of this process would.
    for route in app.routes:
        route.matches({"type": "http", "method": "GET", "path": "/", "headers": []})
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join()
