"""Replicas as processes, and a router in a thread."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from support.llm import QUESTION
from support.server import MODEL

from chunkcache.serve.placement import ranked, weights_of
from chunkcache.serve.probe import free_port, is_up
from chunkcache.serve.router import Router

CHAT = "/v1/chat/completions"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, "temperature": 0}
LONG = {**ASK, "logit_bias": {"2": -100}, "max_tokens": 380, "stream": True}


@contextmanager
def routed(*urls: str, **options: Any) -> Iterator[tuple[str, Router]]:
    """Run a router; yield its URL and itself."""
    router = Router(urls, **options)
    with running(router) as url:
        yield url, router


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Run an ASGI application; yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


class ServeProcess:
    """`chunkcache serve` on a port that it keeps when it is started again."""

    def __init__(self, model: str, *options: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "chunkcache", "serve", model, "--port", str(port), "--name", "tiny"]
        self._command = [*command, *options]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    def ready(self) -> None:
        end = time.monotonic() + 120
        while not is_up(self.url):
            assert self._process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._url, self._body = url, body
        self.events: list[str] = []
        self.status: int | None = None
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url + CHAT, json=self._body, timeout=60) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line[6:])

    @property
    def has_text(self) -> bool:
        return len(self.events) > 2

    def texts(self) -> str:
        choices = [json.loads(event).get("choices") for event in self.events if event.startswith("{")]
        return "".join(each[0]["delta"].get("content") or "" for each in choices if each)


def for_each(urls: Iterable[str], **asked: Any) -> dict[str, dict[str, Any]]:
    """Return a request for each URL whose chunks belong there."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(200):
        documents = [f"Report {number} is about the number {number} and no other."]
        body = {**ASK, "documents": documents, **asked}
        found.setdefault(ranked(weights_of(json.dumps(body).encode()), dict.fromkeys(urls, 0))[0], body)
    assert found.keys() == set(urls)
    return found


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
