"""`chunkcache serve`: an OpenAI-compatible server."""

from __future__ import annotations

import math
import os
import signal
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
from rich.markup import escape

from chunkcache.cli.console import err
from chunkcache.cli.inputs import load
from chunkcache.cli.options import FOLDER, STORE_VARIABLE, ChunkTokens, PolicyName, argument, command, count, option
from chunkcache.errors import InputError, missing_extra
from chunkcache.serve.loopback import LOOPBACK

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
KEY_VARIABLE = "CHUNKCACHE_API_KEY"
_CONNECTIONS = 8  # for each request that is answered or waits; more are told 503
TRACE_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


@dataclass(frozen=True, kw_only=True)
class ServeCommand:
    """A server."""

    model_name: Annotated[str, argument(metavar="MODEL")]
    host: Annotated[str, option(help="Address to listen at; any other than loopback needs keys.")] = "127.0.0.1"
    port: Annotated[int, option(help="Port to listen at.")] = 8000
    name: Annotated[str | None, option(help="What clients call the model; by default MODEL.")] = None
    policy: PolicyName = "query"
    store: Annotated[str, option(envvar=STORE_VARIABLE, show_envvar=True, help="URL of the chunk KV store.")] = (
        "memory://?max_bytes=2GiB"
    )
    keys: Annotated[Path | None, option(type=FILE, help="TOML file of API keys and their tenants; else the key in "
                                        f"{KEY_VARIABLE}, if it is set.")] = None  # fmt: skip
    running: Annotated[int, count("Sequences that decode together.")] = 8
    waiting: Annotated[int, count("Requests that may wait; more are answered with 429.")] = 64
    max_kv_bytes: Annotated[str | None, option(help="KV of all sequences that run, such as 4GiB.")] = None
    max_body: Annotated[str, option(help="Largest request.")] = "8MiB"
    timeout: Annotated[float | None, option(help="Seconds after which an answer ends.")] = None
    index: Annotated[tuple[str, ...], option(metavar="NAME=PATH", help="Index of a folder or file of documents for "
                                             "requests with `rag`; with --keys TENANT/NAME=PATH.")] = ()  # fmt: skip
    chunk_tokens: ChunkTokens = 256
    precompute_tokens: Annotated[int, count("Tokens of documents or chunks in one request.")] = 65_536
    drain: Annotated[float, option(help="Seconds that running answers get on SIGTERM.")] = 30.0
    log_format: Annotated[str, option(type=click.Choice(["text", "json"]), help="Form of the log.")] = "text"
    otlp_endpoint: Annotated[str | None, option(help="Where traces go, such as http://localhost:4318; by default "
                                                "what OTEL_EXPORTER_OTLP_ENDPOINT says.")] = None  # fmt: skip
    dashboard: Annotated[bool, option(help="Show requests with their prompts, and the store, on a page at /.")] = (
        False
    )
    threads: Annotated[int | None, count("CPU threads of PyTorch, for a prefill and for a decoding step each; they "
                                         "run beside one another. By default OMP_NUM_THREADS, or half of the cores.")
    ] = None  # fmt: skip
    adapters: Annotated[tuple[str, ...], option("--adapter", metavar="NAME=PATH", help="Adapter of peft, served as "
                                                "model NAME. May be given several times.")] = ()  # fmt: skip
    adapter_dir: Annotated[Path | None, option(type=FOLDER, help="Folder of adapters that requests may load.")] = None
    allow_adapter_updates: Annotated[bool, option(help="Admins load and unload adapters by requests.")] = False
    device: Annotated[str | None, option(help="cpu, cuda, cuda:1, mps; the fastest there is by default.")] = None
    dtype: Annotated[str, option(help="auto, float32, bfloat16 or float16.")] = "auto"


@command("serve")
def serve(options: ServeCommand) -> None:
    """Serve MODEL over HTTP, as OpenAI's API; chunks of requests are reused.

    A key is asked for where CHUNKCACHE_API_KEY or --keys is set, and must be for any address but loopback.
    """
    # uvicorn drains on SIGTERM, and then raises it again: what is behind it here still has to be closed. While the
    # model is loaded, SIGTERM ends the server at once.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, before)
        _serve(options, stack)


def default_threads() -> int:
    """Return how many CPU threads a prefill and a decoding step have each: together no more than there are cores."""
    import torch

    threads = torch.get_num_threads()
    return threads if "OMP_NUM_THREADS" in os.environ else max(1, threads // 2)


def _serve(options: ServeCommand, stack: ExitStack) -> None:
    try:
        import uvicorn

        from chunkcache.cli.indexes import fill_indexes, read_indexes
        from chunkcache.serve.app import ServeOptions, create_app
        from chunkcache.serve.logs import configure
        from chunkcache.serve.rag import IndexLimits
        from chunkcache.serve.service import Service
        from chunkcache.serve.tenants import Tenants
    except ImportError as error:
        raise missing_extra("server", "chunkcache serve", error) from error
    import torch

    from chunkcache.blend import parse_policy
    from chunkcache.engine.scheduler import Limits
    from chunkcache.llm import CachedLLM
    from chunkcache.store import open_store
    from chunkcache.store.budget import parse_bytes

    key = os.environ.get(KEY_VARIABLE)
    tenants = Tenants.read(options.keys) if options.keys else Tenants.of_key(key) if key else Tenants()
    if not tenants and options.host not in LOOPBACK:
        raise InputError(
            f"--host {options.host} lets others in: set {KEY_VARIABLE}, or pass --keys, or listen at {LOOPBACK[0]}"
        )
    given = read_indexes(options.index, tenants)
    most = None if options.max_kv_bytes is None else parse_bytes(options.max_kv_bytes)
    limits = Limits(options.running, options.waiting, most)
    observers = _observers(options.otlp_endpoint)
    adapters = [_adapter(given) for given in options.adapters]
    if options.allow_adapter_updates and options.adapter_dir is None:
        raise InputError("--allow-adapter-updates wants --adapter-dir, the folder that adapters are loaded from")
    served = ServeOptions(
        tenants=tenants,
        body_bytes=parse_bytes(options.max_body),
        timeout_s=options.timeout,
        drain_s=options.drain,
        observers=observers,
        dashboard=options.dashboard,
        precompute_tokens=options.precompute_tokens,
        adapter_dir=options.adapter_dir,
        adapter_updates=options.allow_adapter_updates,
    )
    torch.set_num_threads(options.threads or default_threads())
    policy, store = parse_policy(options.policy), open_store(options.store)
    stack.enter_context(closing(store))
    model, tokenizer = load(options.model_name, options.device, options.dtype)
    llm = stack.enter_context(CachedLLM(model, tokenizer, store=store, policy=policy))
    service = Service(llm, options.name or options.model_name, limits)
    for name, folder in adapters:
        service.adapters.load(name, folder)
    app = create_app(service, served)
    service.indexes.limits = IndexLimits(chunk_tokens=options.chunk_tokens)
    service.warm(tenants.all)
    fill_indexes(service, given)
    err.print(f"serving {escape(service.name)} at http://{options.host}:{options.port}/v1")
    configure(options.log_format)
    uvicorn.run(
        app, host=options.host, port=options.port, log_config=None,
        timeout_graceful_shutdown=math.ceil(options.drain),
        limit_concurrency=_CONNECTIONS * (options.running + options.waiting),
    )  # fmt: skip


def _observers(endpoint: str | None) -> list[Any]:
    """Return what sends traces, if there is an address to send them to."""
    if endpoint is None and not any(os.environ.get(name) for name in TRACE_VARIABLES):
        return []
    try:
        from chunkcache.serve.tracing import tracer
    except ImportError as error:
        raise missing_extra("otel", "sending traces", error) from error
    return [tracer(endpoint)]


def _adapter(given: str) -> tuple[str, Path]:
    name, _, path = given.partition("=")
    if not name or not Path(path).is_dir() or not path:
        raise InputError(f"--adapter {given!r} is no NAME=PATH of a folder with an adapter")
    return name, Path(path)
