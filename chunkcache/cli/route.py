"""`chunkcache route`: a router in front of several servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import click
from rich.markup import escape

from chunkcache.cli.console import err
from chunkcache.cli.options import argument, command, option
from chunkcache.errors import InputError, missing_extra
from chunkcache.serve.loopback import LOOPBACK

_CONNECTIONS = 4096  # at once; more are told 503


@dataclass(frozen=True, kw_only=True)
class RouteCommand:
    """A router."""

    urls: Annotated[tuple[str, ...], argument(metavar="URL...", required=True)]
    host: Annotated[str, option(help="Address to listen at; for any other than loopback servers that ask for no key "
                                "are left out.")] = "127.0.0.1"  # fmt: skip
    port: Annotated[int, option(type=click.IntRange(1, 65535), help="Port to listen at.")] = 8080
    max_body: Annotated[str, option(help="Largest request.")] = "8MiB"
    drain: Annotated[int, option(type=click.IntRange(0), help="Seconds that answers get on SIGTERM.")] = 30


@command("route")
def route(options: RouteCommand) -> None:
    """Pass requests to the servers at URL..., each to the one that most of its chunks belong to.

    The servers are `chunkcache serve` with one model and one store, such as a Redis or a folder.
    """
    try:
        import uvicorn

        from chunkcache.serve.router import Router
    except ImportError as error:
        raise missing_extra("server", "chunkcache route", error) from error
    from chunkcache.store.budget import parse_bytes

    for url in options.urls:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url!r} is no URL of a server: pass such as http://10.0.0.5:8000")
    router = Router(options.urls, parse_bytes(options.max_body), keyed=options.host not in LOOPBACK)
    err.print(f"routing to {len(options.urls)} servers at {escape(f'http://{options.host}:{options.port}/v1')}")
    uvicorn.run(
        router, host=options.host, port=options.port, log_level="warning",
        timeout_graceful_shutdown=options.drain, limit_concurrency=_CONNECTIONS,
    )  # fmt: skip
