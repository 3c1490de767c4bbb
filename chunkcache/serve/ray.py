"""The router and its servers on a Ray cluster, kept up by Ray Serve (extra `ray`).

    serve run chunkcache.serve.ray:build_app model=smollm2-135m-instruct replicas=2

Ray Serve starts servers, starts them again, and is the door. It does not choose among them: its request routers see
a request before its body is read, and chunks stand in the body; and their interface is still to change. So the
ingress is the router of `chunkcache.serve.router`, and each replica runs a `chunkcache serve` on its machine and
tells the router where.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chunkcache.errors import ChunkCacheError, InputError, missing_extra
from chunkcache.serve.probe import free_port, is_up
from chunkcache.serve.router import Router

try:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException
except ImportError as error:
    raise missing_extra("ray", "chunkcache.serve.ray", error) from error

logger = logging.getLogger("chunkcache")

LOOPBACK = "127.0.0.1"
TELL_S = 2.0  # between two looks of Ray Serve at a replica, which then tells the router where it is
FORGET_S = 20.0  # after which one that says nothing is left out for good
START_S = 600.0  # for a model to be loaded
AT_ONCE = 4096  # requests; the servers have bounds of their own


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What `build_app` takes.

    Attributes:
        model: alias, folder, GGUF file or id; on every machine.
        replicas: how many servers.
        options: more options of `chunkcache serve`, such as `["--store", "redis://10.0.0.9"]`.
        host: what servers listen at: loopback, for one machine; `0.0.0.0` lets the router reach other machines, and
            wants keys (in `options`, or CHUNKCACHE_API_KEY on every machine).
        keyed: whether servers without keys are left out; by default where they do not listen at loopback. Set it
            where Ray Serve's own proxy listens at another address.
        cpus: of each server.
        gpus: of each server.
    """

    model: str
    replicas: int = 2
    options: tuple[str, ...] = ()
    host: str = LOOPBACK
    keyed: bool | None = None
    cpus: float = 1
    gpus: float = 0


def build_app(args: Mapping[str, Any]) -> Any:
    """Return the Ray Serve application.

    Args:
        args: fields of `Fleet` by name.

    Raises:
        InputError: a field is unknown, or the model is missing.
    """
    try:
        fleet = Fleet(**{**args, "replicas": int(args.get("replicas", 2)), "options": tuple(args.get("options", ()))})
    except (TypeError, ValueError) as error:
        raise InputError(f"{dict(args)} is no application ({error}); pass model=..., and fields of Fleet") from None
    actor = {"num_cpus": fleet.cpus, "num_gpus": fleet.gpus}
    server = Server.options(num_replicas=fleet.replicas, ray_actor_options=actor)  # type: ignore[attr-defined]
    keyed = fleet.host != LOOPBACK if fleet.keyed is None else fleet.keyed
    return Door.bind(keyed, server.bind(fleet.model, list(fleet.options), fleet.host))  # type: ignore[attr-defined]


@serve.deployment(max_ongoing_requests=AT_ONCE, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Door:
    """The ingress: one router, of the servers that have told where they are.

    Args:
        keyed: as in `Fleet`.
        servers: their deployment, so that it is part of the application.
    """

    def __init__(self, keyed: bool, servers: Any) -> None:
        self._router = Router(keyed=keyed)
        self._seen: dict[str, float] = {}

    def __serve_build_asgi_app__(self) -> Router:
        """Return the application; Ray Serve calls it."""
        return self._router

    async def join(self, url: str) -> None:
        """Take note that a server is at `url`."""
        now = time.monotonic()
        new = url not in self._seen
        self._seen = {name: seen for name, seen in self._seen.items() if now - seen < FORGET_S} | {url: now}
        self._router.replicas.set(self._seen)
        if new:
            await self._router.replicas.look()


@serve.deployment(health_check_period_s=TELL_S, max_ongoing_requests=1)
class Server:
    """One `chunkcache serve`, as a process of its own.

    Args:
        model: as in `Fleet`.
        options: as in `Fleet`.
        host: as in `Fleet`.

    Raises:
        ChunkCacheError: it does not come up.
    """

    def __init__(self, model: str, options: list[str], host: str) -> None:
        port = free_port(host)
        self._url = f"http://{LOOPBACK if host == LOOPBACK else _own_address()}:{port}"
        command = [sys.executable, "-m", "chunkcache.serve.child", "serve", model]
        command += ["--host", host, "--port", str(port), *options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        end = time.monotonic() + START_S
        while not is_up(self._url):
            if self._process.poll() is not None or time.monotonic() > end:
                self._process.kill()
                raise ChunkCacheError(f"the server of {model} did not come up; its log says why")
            time.sleep(0.2)

    async def check_health(self) -> None:
        """Tell the router where the server is; Ray Serve starts another where there is none."""
        if self._process.poll() is not None:
            raise ChunkCacheError(f"the server ended with exit code {self._process.returncode}")
        try:
            door = serve.get_app_handle(serve.get_replica_context().app_name)
            await asyncio.wait_for(door.join.remote(self._url), TELL_S)
        except (RayServeException, RayError, asyncio.TimeoutError) as error:  # the server itself is well
            logger.warning("the router could not be told of %s (%s)", self._url, type(error).__name__)

    async def __del__(self) -> None:
        """Let the answers of the server come to their end, and end it."""
        self._process.terminate()
        await asyncio.to_thread(self._process.wait)


def _own_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
