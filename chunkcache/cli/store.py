"""The commands on stored chunk KV: `chunkcache store stats | ls | verify | purge`."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import click

from chunkcache.cli.console import err, out, progress, size_text, span_text, table, wide
from chunkcache.cli.options import AsJson, FilterOptions, StoreOptions, command, option
from chunkcache.errors import ChunkCacheError, InputError

if TYPE_CHECKING:  # torch takes seconds to import: only a command that runs does
    from chunkcache.store import Entry, EntryFilter, Store, Tier

SHOWN = 50  # entries that `ls` shows of its own accord
_TROUBLE = ("errors", "skipped")
_WRONG = ("mismatches", "damaged", "expired", "refused", "evictions", *_TROUBLE)
_SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SORTS: dict[str, Callable[[Entry], float]] = {
    "used": lambda entry: -entry.used,
    "uses": lambda entry: -entry.uses,
    "age": lambda entry: entry.created,
    "size": lambda entry: -entry.nbytes,
}


@click.group("store")
def store_commands() -> None:
    """Look into a store of chunk KV, fill it, check it, and move it.

    The store is named by --store, or by the environment variable CHUNKCACHE_STORE.
    """


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    """A store to be summed up."""

    store: StoreOptions
    as_json: AsJson = False


@command("stats")
def stats(options: StatsOptions) -> None:
    """Show what each tier holds, and how it was used.

    Hits, misses and what went wrong are counted by each process for itself, so here they are this command's own.
    What a tier remembers is how often each entry was used.
    """
    with opened(options.store.url) as store:
        facts = {name: _facts(tier) for name, tier in store.tiers().items()}
    if options.as_json:
        click.echo(json.dumps({"tiers": facts}, indent=2))
        return
    names = next(iter(facts.values()))
    rows = [[_label(name), *(_shown(name, tier[name]) for tier in facts.values())] for name in names]
    out.print(table("", ["tier", *facts], rows))
    err.print("[dim]from hits on: counted since this command opened the store[/]")


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Entries to be listed."""

    store: StoreOptions
    where: FilterOptions
    sort: Annotated[
        str, option(type=click.Choice(list(_SORTS)), help="Last or most used, oldest, or largest first.")
    ] = "used"
    limit: Annotated[int | None, option(type=click.IntRange(1), help=f"Entries to show; {SHOWN} by default, all with "
                                        "--json.")] = None  # fmt: skip
    full: Annotated[bool, option(help="Show keys, models and tenants in full.")] = False
    as_json: AsJson = False


@command("ls")
def list_entries(options: ListOptions) -> None:
    """List entries. Names of tenants and documents are not in a store, only hashes of them."""
    with opened(options.store.url) as store:
        where = find_where(store, options.where)
        held: dict[str, list[str]] = {}  # names of tiers, by key
        entries: dict[str, Entry] = {}
        for name, tier in store.tiers().items():
            for entry in tier.entries(where):
                held.setdefault(entry.key.digest, []).append(name)
                entries.setdefault(entry.key.digest, entry)
        several = len(store.tiers()) > 1
    ordered = sorted(entries.values(), key=_SORTS[options.sort])
    shown = ordered[: options.limit or (None if options.as_json else SHOWN)]
    if options.as_json:
        rows = [{**asdict(e), "key": e.key.digest, "tiers": held[e.key.digest]} for e in shown]
        click.echo(json.dumps({"entries": rows, "total": len(ordered)}, indent=2))
        return
    columns = _columns(shown, options.full)
    if several:
        columns["tiers"] = [" ".join(held[e.key.digest]) for e in shown]
    columns = {name: cells for name, cells in columns.items() if any(cells)}  # most stores have no tenants, TTL, pins
    total = size_text(sum(e.nbytes for e in ordered))
    title = f"{len(ordered)} entries, {total}" + (f"; the first {len(shown)}" if len(shown) < len(ordered) else "")
    wide(table(title, list(columns), list(zip(*columns.values(), strict=True))))


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Entries to be verified."""

    store: StoreOptions
    where: FilterOptions
    as_json: AsJson = False


@command("verify")
def verify(options: VerifyOptions) -> None:
    """Read every entry, check every byte, and delete what is damaged. Exits with 1 if anything was."""
    with opened(options.store.url) as store:
        where = find_where(store, options.where)
        counts = {name: _verify(name, tier, where) for name, tier in _tiers(store).items()}
    if options.as_json:
        click.echo(json.dumps({"tiers": counts}, indent=2))
    else:
        rows = [
            [name, str(r["entries"]), size_text(r["bytes"]), *(str(r[c]) for c in list(r)[2:])]
            for name, r in counts.items()
        ]
        columns = ["tier", "entries", "size", "intact", "damaged", "gone meanwhile", "not readable"]
        out.print(table("verified", columns, rows))
    damaged, unreadable = (sum(r[trouble] for r in counts.values()) for trouble in ("damaged", "unreadable"))
    if damaged:
        raise ChunkCacheError(f"{damaged} entries were damaged, and are deleted: they are computed again when needed")
    if unreadable:
        raise ChunkCacheError(f"{unreadable} entries could not be read: the store is in trouble; run it again later")


@dataclass(frozen=True, kw_only=True)
class PurgeOptions:
    """Entries to be deleted."""

    store: StoreOptions
    keys: Annotated[tuple[str, ...], option("--key", help="This entry: its key or the start of it. May be given "
                                            "several times.")] = ()  # fmt: skip
    where: FilterOptions
    older_than: Annotated[str | None, option(metavar="AGE", help="Only those computed longer ago, such as 30d, "
                                             "12h or 90m.")] = None  # fmt: skip
    everything: Annotated[bool, option("--all", help="Everything in the store.")] = False
    yes: Annotated[bool, option(help="Do not ask.")] = False
    as_json: AsJson = False


@command("purge")
def purge(options: PurgeOptions) -> None:
    """Delete from every tier the entries that agree with all that is given."""
    keys, where_, age = options.keys, options.where, options.older_than
    narrowed = bool(keys) or any(given is not None for given in (where_.model, where_.tenant, where_.document, age))
    if narrowed == options.everything:
        raise InputError(
            "--all together with other conditions contradicts itself: leave one of them out"
            if options.everything
            else "nothing says what to delete: pass --key, --model, --tenant, --document, --older-than, or --all"
        )
    before = time.time() - parse_span(age) if age is not None else None
    with opened(options.store.url) as store:
        where = find_where(store, options.where)
        wanted = _digests(store, keys)

        def is_selected(entry: Entry) -> bool:
            return (not keys or entry.key.digest in wanted) and (before is None or entry.created < before)

        tiers = _tiers(store)
        listed = {
            name: [entry for entry in tier.entries(where) if is_selected(entry)] for name, tier in tiers.items()
        }
        if any(listed.values()) and not options.yes:
            _confirm(listed)
        deleted = {}
        for name, tier in tiers.items():
            with _fail_if_in_trouble(name, tier):
                whole = not keys and before is None
                deleted[name] = tier.purge(where) if whole else sum(tier.delete(e.key) for e in listed[name])
    if options.as_json:
        click.echo(json.dumps({"deleted": deleted}, indent=2))
    else:
        out.print("deleted: " + ", ".join(f"{count} in {name}" for name, count in deleted.items()))


def _tiers(store: Store) -> dict[str, Tier]:
    from chunkcache.store import Tier

    return {name: tier for name, tier in store.tiers().items() if isinstance(tier, Tier)}


def _digests(store: Store, keys: tuple[str, ...]) -> set[str]:
    held = {entry.key.digest for entry in store.entries()} if keys else set()
    return {_only("key", key, held) for key in keys}


def _facts(tier: Store) -> dict[str, Any]:
    entries = list(tier.entries())
    counted = tier.stats()
    now, ages = time.time(), [entry.created for entry in entries]
    asked = counted.hits + counted.misses
    return {
        "entries": counted.entries,
        "bytes": counted.nbytes,
        "budget": counted.max_bytes,
        "models": len({entry.model for entry in entries}),
        "tenants": len({entry.tenant for entry in entries if entry.tenant}),
        "pinned": sum(entry.pinned for entry in entries),
        "oldest_age_s": now - min(ages) if ages else None,
        "newest_age_s": now - max(ages) if ages else None,
        "entries_used": sum(entry.uses > 0 for entry in entries),
        "uses": sum(entry.uses for entry in entries),
        "hits": counted.hits,
        "misses": counted.misses,
        "hit_rate": counted.hits / asked if asked else None,
        **{name: getattr(counted, name) for name in _WRONG},
    }


def _label(name: str) -> str:
    return name.removesuffix("_s").replace("_", " ")


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "none" if name == "budget" else ""
    if name in ("bytes", "budget"):
        return size_text(value)
    if name.endswith("_s"):
        return span_text(value)
    return f"{value:.1%}" if name == "hit_rate" else f"{value:.0f}"


def _columns(entries: list[Entry], full: bool) -> dict[str, list[str]]:
    now = time.time()
    return {
        "key": [e.key.digest if full else str(e.key) for e in entries],
        "tokens": [str(e.tokens) for e in entries],
        "size": [size_text(e.nbytes) for e in entries],
        "model": [e.model if full else e.model[:8] for e in entries],
        "tenant": [e.tenant if full else e.tenant[:8] for e in entries],
        "docs": [str(len(e.documents)) for e in entries],
        "age": [span_text(now - e.created) for e in entries],
        "used": [span_text(now - e.used) if e.used else "" for e in entries],
        "uses": [f"{e.uses:.0f}" for e in entries],
        "pinned": ["yes" if e.pinned else "" for e in entries],
        "TTL": ["" if e.expires is None else span_text(e.expires - now) for e in entries],
    }


def _verify(name: str, tier: Tier, where: EntryFilter) -> dict[str, int]:
    """Read all of a tier; return the counts."""
    from chunkcache.errors import EntryLostError

    before = tier.stats()
    entries = list(tier.entries(where))
    intact = 0
    with progress(f"verifying {name}") as on_progress:
        for count, entry in enumerate(entries, 1):
            kv = tier.peek(entry.key)
            with suppress(EntryLostError):  # logged and counted by the tier
                for _layer_verified in kv.layers if kv is not None else ():
                    pass
                intact += kv is not None
            on_progress(count, len(entries))
    after = tier.stats()
    damaged = after.damaged - before.damaged  # also headers, which the listing reads
    unreadable = sum(getattr(after, trouble) - getattr(before, trouble) for trouble in _TROUBLE)
    return {
        "entries": len(entries),
        "bytes": sum(entry.nbytes for entry in entries),
        "intact": intact,
        "damaged": damaged,
        "gone": max(0, len(entries) - intact - damaged - unreadable),
        "unreadable": unreadable,
    }


def _confirm(listed: dict[str, list[Entry]]) -> None:
    what = " and ".join(
        f"{len(entries)} entries ({size_text(sum(e.nbytes for e in entries))}) from {name}"
        for name, entries in listed.items()
    )
    if not sys.stdin.isatty():
        raise InputError(f"this would delete {what}: pass --yes to do it")
    if not click.confirm(f"Delete {what}?", err=True):
        raise ChunkCacheError("nothing was deleted")


@contextmanager
def _fail_if_in_trouble(name: str, tier: Tier) -> Iterator[None]:
    """Fail if the tier is in trouble within: it may still hold what was to be deleted."""
    before = tier.stats()
    yield
    after = tier.stats()
    if any(getattr(after, trouble) > getattr(before, trouble) for trouble in _TROUBLE):
        raise ChunkCacheError(f"the {name} tier is in trouble and may still hold some of it: run it again later")


@contextmanager
def opened(url: str, persistent: bool = False) -> Iterator[Store]:
    """Open the store of a command, or only its persistent tiers; it is closed at the end."""
    from chunkcache.store import open_store
    from chunkcache.store.lasting import open_persistent

    with open_persistent(url) if persistent else open_store(url) as store:
        yield store


def find_where(store: Store, options: FilterOptions) -> EntryFilter:
    """Return the condition that the options name."""
    from chunkcache.kv import hashed_label
    from chunkcache.store import EntryFilter

    return EntryFilter(
        None if options.model is None else _only("model", options.model, {entry.model for entry in store.entries()}),
        None if options.tenant is None else hashed_label("tenant", options.tenant),
        None if options.document is None else hashed_label("document", options.document),
    )


def _only(kind: str, start: str, known: set[str]) -> str:
    """Return the one of `known` that begins with `start`."""
    matches = sorted(name for name in known if name.startswith(start.lower())) if start else []
    if len(matches) == 1:
        return matches[0]
    if matches:
        shown = ", ".join(name[:16] for name in matches[:3])
        raise InputError(f"--{kind} {start!r} fits {len(matches)} of them ({shown}, ...): give more digits")
    raise InputError(f"no entry of the store has the {kind} {start!r}: see chunkcache store ls --full")


def parse_span(text: str) -> float:
    """Return the seconds that a span such as `30d`, `12h`, `90m` or `45s` stands for.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", text)
    if match is None:
        raise InputError(f"{text!r} is no span of time; write for example 30d, 12h, 90m or 45s")
    return float(match[1]) * _SPANS[match[2]]
