"""The commands that fill a store and move it: `chunkcache store warm | export | import`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import click

from chunkcache.cli.console import err, progress, size_text, status
from chunkcache.cli.options import (
    AsJson,
    ChunkTokens,
    FilterOptions,
    ModelOptions,
    PolicyName,
    StoreOptions,
    System,
    argument,
    command,
    count,
    option,
)
from chunkcache.cli.store import find_where, opened
from chunkcache.errors import ChunkCacheError, InputError

if TYPE_CHECKING:  # torch takes seconds to import: only a command that runs does
    from chunkcache.store.transfer import Exported, Imported
    from chunkcache.warm import WarmReport

CPUS_PER_WORKER = 4
FILE = click.Path(path_type=Path, allow_dash=True)


@dataclass(frozen=True, kw_only=True)
class WarmOptions:
    """Documents whose KV are computed."""

    docs: Annotated[Path, argument(metavar="DIR")]
    store: StoreOptions
    model: ModelOptions
    chunk_tokens: ChunkTokens = 256
    policy: PolicyName = "query"
    system: System = None
    tenant: Annotated[str, option(metavar="NAME", help="For requests of this tenant only.")] = ""
    lead: Annotated[str, option(type=click.Choice(["packaged", "neighbours"]), help="What stands before a chunk "
                                "while it is computed: a packaged text, or the chunks most like it, "
                                "too.")] = "packaged"  # fmt: skip
    address: Annotated[str | None, option("--ray", metavar="ADDRESS", help="Share the work out over this Ray "
                                          "cluster; local starts one here.")] = None  # fmt: skip
    workers: Annotated[int | None, count("Copies of the model on the cluster; as many as fit by default.")] = None
    cpus_per_worker: Annotated[int | None, count(f"CPUs of each; {CPUS_PER_WORKER} by default.")] = None
    as_json: AsJson = False


@command("warm")
def warm(options: WarmOptions) -> None:
    """Compute the KV of all documents under DIR ahead of requests.

    What is stored already is left as it is, so an interrupted run goes on where it was, and after an edit only what
    changed is computed. KV of what is no longer in a document is deleted. A document's id is its path below DIR.
    """
    from chunkcache.blend import parse_policy
    from chunkcache.retriever import load_documents
    from chunkcache.warm import WarmConfig, local_pool
    from chunkcache.warm import warm as run
    from chunkcache.warm.ray import ray_pool

    cpus = options.cpus_per_worker
    if options.address is None and (options.workers or cpus):
        raise InputError("--workers and --cpus-per-worker need --ray ADDRESS: pass that, too, or leave them out")
    parse_policy(options.policy)
    with opened(options.store.url, persistent=True):
        pass  # bad input shows before any work
    documents = load_documents(options.docs)
    config = WarmConfig(
        options.model.model_name,
        options.store.url,
        options.model.device,
        options.model.dtype,
        options.policy,
        options.system,
        options.tenant,
        options.chunk_tokens,
        lead="neighbours" if options.lead == "neighbours" else "packaged",
    )
    started = time.perf_counter()
    try:
        with progress(f"loading {config.model}") as bar:
            pool = (
                local_pool(config, bar.say)
                if options.address is None
                else ray_pool(config, options.address, options.workers, cpus or CPUS_PER_WORKER, bar.say)
            )
            with pool as workers:
                bar.say("precomputing chunks")
                report = run(config, documents, workers, bar)
    except KeyboardInterrupt:
        err.print(
            "[yellow]interrupted: what was computed is stored, and the same command goes on from there[/]",
            soft_wrap=True,
        )
        raise
    _show_report(report, time.perf_counter() - started, options.as_json)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Entries to be exported."""

    file: Annotated[Path, argument(type=FILE)]
    store: StoreOptions
    where: FilterOptions
    as_json: AsJson = False


@command("export")
def export_file(options: ExportOptions) -> None:
    """Write entries to FILE, an uncompressed tar file; - for stdout. Exits with 1 if one could not be read."""
    from chunkcache.store.transfer import export_entries

    if options.as_json and str(options.file) == "-":
        raise InputError("--json and FILE - both write to stdout: name a file, or leave out --json")
    with opened(options.store.url) as store:
        where = find_where(store, options.where)
        with _open_to_write(options.file) as target, progress("exporting entries") as on_entry:
            counts = export_entries(store, target, where, on_entry)
    _show_exported(counts, options.as_json)
    if counts.lost:
        raise ChunkCacheError(f"{counts.lost} entries could not be read and are not in the file; see store verify")


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Entries to be imported."""

    file: Annotated[Path, argument(type=FILE)]
    store: StoreOptions
    as_json: AsJson = False


@command("import")
def import_file(options: ImportOptions) -> None:
    """Put the entries of FILE, which export wrote, into the store; - for stdin.

    Every entry is verified, and a damaged one left out; the exit code is 1 then. Only with CHUNKCACHE_SECRET set is
    an entry known to come from somebody who has the secret: without it, import files that you trust. Encrypted
    entries need their key in CHUNKCACHE_ENCRYPTION_KEYS, or in the store's encryption_key_file.
    """
    from chunkcache.store.transfer import import_entries

    with (
        opened(options.store.url, persistent=True) as store,
        _open_to_read(options.file) as source,
        status("importing entries") as on_status,
    ):
        counts = import_entries(
            store,
            source,
            lambda so_far: on_status(f"importing entries: {so_far.entries}, {size_text(so_far.nbytes)}"),
        )
    _show_imported(counts, options.as_json)


@contextmanager
def _open_to_write(file: Path) -> Iterator[BinaryIO]:
    """Open a file to write to; it gets its name when it is whole."""
    if str(file) == "-":
        if sys.stdout.isatty():
            raise InputError("FILE - would print binary data on the terminal: pipe it, or name a file")
        yield sys.stdout.buffer
        return
    partial = file.with_name(file.name + ".partial")
    try:
        with partial.open("wb") as target:
            yield target
        os.replace(partial, file)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror}); pass another file") from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _open_to_read(file: Path) -> Iterator[BinaryIO]:
    if str(file) == "-":
        yield sys.stdin.buffer
        return
    try:
        source = file.open("rb")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); pass a file that export wrote") from None
    with source:
        yield source


def _show_exported(counts: Exported, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"entries": counts.entries, "bytes": counts.nbytes, "lost": counts.lost}, indent=2))
    else:
        err.print(f"exported {counts.entries} entries, {size_text(counts.nbytes)}")


def _show_imported(counts: Imported, as_json: bool) -> None:
    """Say what was imported, and fail if something was not."""
    if as_json:
        facts = asdict(counts)
        facts["bytes"] = facts.pop("nbytes")
        click.echo(json.dumps(facts, indent=2))
    else:
        err.print(f"imported {counts.entries} entries, {size_text(counts.nbytes)}")
        if counts.expired or counts.other:
            err.print(
                f"[dim]left out: {counts.expired} expired entries, {counts.other} members that are no entries[/]"
            )
    if counts.damaged:
        raise ChunkCacheError(
            f"{counts.damaged} entries of the file are damaged, or sealed or encrypted otherwise: left out; see "
            "CHUNKCACHE_SECRET and CHUNKCACHE_ENCRYPTION_KEYS"
        )
    if not counts.complete:
        raise ChunkCacheError("the file has no end: it was cut off, and entries behind the cut are missing")
    if counts.refused:
        raise ChunkCacheError(
            f"the store did not take {counts.refused} entries: it is too small or in trouble, or they were deleted "
            "from it after they were computed, which is for good"
        )


def _show_report(report: WarmReport, seconds: float, as_json: bool) -> None:
    """Say what was computed, and fail if the store may lack some of it."""
    facts = {
        "documents": report.documents,
        "chunks": report.chunks,
        "skipped": report.skipped,
        "too_long": report.too_long,
        "computed": report.computed,
        "near": report.near,
        "tokens": report.computed_tokens,
        "bytes": report.nbytes,
        "deleted": report.deleted,
        "evicted": report.store["evictions"],
        "seconds": round(seconds, 3),
        "chunks_per_s": round(report.computed / seconds, 3),
        "workers": report.workers,
        "lost_workers": report.lost_workers,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        err.print(
            f"{report.chunks} chunks of {report.documents} documents: {report.skipped} were stored already, "
            f"{report.computed} computed ({report.computed_tokens} tokens, {size_text(report.nbytes)}) "
            f"in {seconds:.1f} s, {facts['chunks_per_s']:.1f} chunks/s",
            soft_wrap=True,
        )
        if report.near:
            err.print(f"{report.near} of them were computed behind their nearest chunks")
        if report.deleted:
            err.print(f"{report.deleted} entries deleted that are no longer in their documents")
        if report.too_long:
            err.print(f"[yellow]{report.too_long} chunks are longer than the model's context, and are left out[/]")
        if report.lost_workers:
            err.print(f"[yellow]{report.lost_workers} of {report.workers} workers died; others did their work[/]")
    if report.store["evictions"]:
        err.print(
            f"[yellow]{report.store['evictions']} entries had to go for room: raise max_bytes of the store[/]",
            soft_wrap=True,
        )
    if report.failures:
        raise ChunkCacheError(
            f"{report.failures} operations of the store failed, so it may lack chunks: run it again"
        )
