"""Stores described in text: a URL, several of them, or a TOML file.

`disk:///var/cache/kv?max_bytes=20GiB` opens a tier; the options are the constructor's own arguments. Several tiers,
nearest first, are written `tiered:memory://?max_bytes=2GiB|disk:///var/cache/kv`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from chunkcache.errors import StoreURLError
from chunkcache.store.base import Store

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Opener = Callable[..., Store]
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
TIERED = "tiered:"
_PLACES = ("url", "path", "tiers")  # arguments that are no options


def parse_bytes(text: str) -> int:
    """Return the number of bytes that a size such as `2GiB`, `500 MB` or `1048576` stands for.

    Raises:
        StoreURLError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or not (size := int(Decimal(match[1]) * unit)):
        raise StoreURLError(f"{text!r} is not a size in bytes; write for example 2GiB, 500MB or 1048576")
    return size


def open_store(text: str, tiers: Mapping[str, Opener], compose: Opener) -> Store:
    """Open the store that `text` describes.

    Args:
        text: a URL, `tiered:` and URLs with `|` between them, or the path of a TOML file.
        tiers: what opens a tier, by URL scheme.
        compose: makes one store of a list of tiers.

    Raises:
        StoreURLError: the scheme or file is unknown, or an option is unknown or has a bad value.
    """
    if text.endswith(".toml"):
        return _open_toml(Path(text), tiers, compose)
    if not text.startswith(TIERED):
        return open_tier(text, tiers)
    first, *rest = text.removeprefix(TIERED).split("|")
    options: dict[str, str] = {}
    if first.startswith("?"):
        options = _query(first[1:], text)
    else:
        rest = [first, *rest]
    return _compose([(url, {}) for url in rest], options, tiers, compose)


def open_tier(url: str, tiers: Mapping[str, Opener], more: Mapping[str, Any] | None = None) -> Store:
    """Open the single tier of `url`, with `more` options besides those in it."""
    try:
        parts = urlsplit(url)
    except ValueError:  # which may say the password
        raise StoreURLError(f"{redacted(url)!r} is not a URL; write for example memory://?max_bytes=2GiB") from None
    if parts.scheme not in tiers:
        known = ", ".join(f"{scheme}://" for scheme in tiers)
        raise StoreURLError(f"no store has the URL {redacted(url)!r}; the known ones are {known} and {TIERED}")
    opener = tiers[parts.scheme]
    takes = inspect.signature(opener).parameters
    options: dict[str, Any] = {**_query(parts.query, url), **(more or {})}
    if "url" in takes:  # a server: the tier reads its own address
        return opener(parts._replace(query="").geturl(), **_typed(options, takes, parts.scheme, url))
    if parts.fragment or parts.netloc or ("path" not in takes and parts.path):
        hint = f"{parts.scheme}:///folder?max_bytes=2GiB" if "path" in takes else f"{parts.scheme}://?max_bytes=2GiB"
        raise StoreURLError(f"{redacted(url)!r} has parts that {parts.scheme}:// does not take; write {hint}")
    typed = _typed(options, takes, parts.scheme, url)
    if "path" in takes:
        if not parts.path:
            raise StoreURLError(
                f"{redacted(url)!r} names no folder; write for example {parts.scheme}:///var/cache/kv"
            )
        typed["path"] = unquote(parts.path)
    return opener(**typed)


def redacted(url: str) -> str:
    """Return `url` without the passwords in it."""
    url = re.sub(r"(//[^/@|:]*:)[^|]*@", r"\1***@", url)
    return re.sub(r"((?:secret|password)=)[^&|]*", r"\1***", url)


def _typed(
    options: Mapping[str, Any], takes: Mapping[str, inspect.Parameter], scheme: str, url: str
) -> dict[str, Any]:
    typed: dict[str, Any] = {}
    for name, value in options.items():
        if name not in takes or name in _PLACES:
            allowed = ", ".join(name for name in takes if name not in _PLACES)
            raise StoreURLError(f"{scheme}:// has no option {name!r}; it takes {allowed} (in {redacted(url)!r})")
        kind = str(takes[name].annotation)
        if kind.startswith("str"):
            typed[name] = str(value)
        elif kind.startswith("float"):
            typed[name] = _number(name, value)
        else:
            typed[name] = parse_bytes(str(value))
    return typed


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (ValueError, TypeError):
        raise StoreURLError(f"{name}={value!r} is not a number (of seconds)") from None


def _query(query: str, url: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in options:
            raise StoreURLError(f"{name} is given twice in {redacted(url)!r}; give it once")
        options[name] = value
    return options


def _open_toml(path: Path, tiers: Mapping[str, Opener], compose: Opener) -> Store:
    """Open what a file describes: `[store]` with options, and per tier `[[store.tiers]]` with `url` and options."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))["store"]
        described = [dict(tier) for tier in table.pop("tiers")]
        urls = [str(tier.pop("url")) for tier in described]
    except OSError as error:
        raise StoreURLError(f"{path} cannot be read ({error.strerror}); pass a TOML file or a store URL") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreURLError(
            f"{path} does not describe a store ({type(error).__name__}: {error}); it needs [store] and, for each "
            'tier, [[store.tiers]] with a line such as url = "disk:///var/cache/kv"'
        ) from None
    return _compose(list(zip(urls, described, strict=True)), table, tiers, compose)


def _compose(
    described: list[tuple[str, dict[str, Any]]],
    options: Mapping[str, Any],
    tiers: Mapping[str, Opener],
    compose: Opener,
) -> Store:
    typed = _typed(options, inspect.signature(compose).parameters, TIERED.rstrip(":"), TIERED)
    with ExitStack() as opened:  # if one cannot be opened, the others are closed
        store = compose([opened.enter_context(open_tier(url, tiers, more)) for url, more in described], **typed)
        opened.pop_all()
    return store
