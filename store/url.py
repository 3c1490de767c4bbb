"""Stores described in text: a URL, several of them, or a TOML file.

`disk:///var/cache/kv?max_bytes=20GiB` opens a tier; the options are the constructor's own arguments. Several tiers,
nearest first, are written `tiered:memory://?max_bytes=2GiB|disk:///var/cache/kv`.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from chunkcache.errors import StoreURLError
from chunkcache.kv.options import call_with_options, converter, option_types
from chunkcache.store.base import Store

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Opener = Callable[..., Store]
Openers = Mapping[str, Opener | str]
TIERED = "tiered:"
_PLACES = ("url", "path", "tiers")  # arguments that are no options
_KINDS: dict[Any, str] = {float: "a number (of seconds)", int: "a whole number"}


def open_store(text: str, tiers: Openers, compose: Opener) -> Store:
    """Open the store that `text` describes.

    Args:
        text: a URL, `tiered:` and URLs with `|` between them, or the path of a TOML file.
        tiers: by URL scheme the class of the tier, or where it is, as in `package.module:Class`.
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


def open_tier(url: str, tiers: Openers, more: Mapping[str, Any] | None = None) -> Store:
    """Open the single tier of `url`, with `more` options besides those in it."""
    try:
        parts = urlsplit(url)
    except ValueError:  # which may say the password
        raise StoreURLError(f"{redacted(url)!r} is not a URL; write for example memory://?max_bytes=2GiB") from None
    if parts.scheme not in tiers:
        known = ", ".join(f"{scheme}://" for scheme in tiers)
        raise StoreURLError(f"no store has the URL {redacted(url)!r}; the known ones are {known} and {TIERED}")
    tier = tiers[parts.scheme]
    opener: Opener = pkgutil.resolve_name(tier) if isinstance(tier, str) else tier
    takes = option_types(opener)
    typed = _typed({**_query(parts.query, url), **(more or {})}, takes, parts.scheme, url)
    if "url" in takes:  # a server: the tier reads its own address
        return call_with_options(opener, {"url": parts._replace(query="").geturl(), **typed})
    if parts.fragment or parts.netloc or ("path" not in takes and parts.path):
        hint = f"{parts.scheme}:///folder?max_bytes=2GiB" if "path" in takes else f"{parts.scheme}://?max_bytes=2GiB"
        raise StoreURLError(f"{redacted(url)!r} has parts that {parts.scheme}:// does not take; write {hint}")
    if "path" in takes:
        if not parts.path:
            raise StoreURLError(
                f"{redacted(url)!r} names no folder; write for example {parts.scheme}:///var/cache/kv"
            )
        typed["path"] = unquote(parts.path)
    return call_with_options(opener, typed)


def redacted(url: str) -> str:
    """Return `url` without the passwords in it."""
    url = re.sub(r"(//[^/@|:]*:)[^|]*@", r"\1***@", url)
    return re.sub(r"((?:secret|password)=)[^&|]*", r"\1***", url)


def _typed(options: Mapping[str, Any], takes: Mapping[str, Any], scheme: str, url: str) -> dict[str, Any]:
    """Return options with values of the types that `takes` says, by name."""
    typed: dict[str, Any] = {}
    for name, value in options.items():
        if name not in takes or name in _PLACES:
            allowed = ", ".join(name for name in takes if name not in _PLACES)
            raise StoreURLError(f"{scheme}:// has no option {name!r}; it takes {allowed} (in {redacted(url)!r})")
        convert = converter(takes[name])
        try:
            typed[name] = convert(str(value))
        except StoreURLError:
            raise
        except ValueError:
            raise StoreURLError(f"{name}={value!r} is not {_KINDS[convert]}") from None
    return typed


def _query(query: str, url: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in options:
            raise StoreURLError(f"{name} is given twice in {redacted(url)!r}; give it once")
        options[name] = value
    return options


def _open_toml(path: Path, tiers: Openers, compose: Opener) -> Store:
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
    described: list[tuple[str, dict[str, Any]]], options: Mapping[str, Any], tiers: Openers, compose: Opener
) -> Store:
    typed = _typed(options, option_types(compose), TIERED.rstrip(":"), TIERED)
    with ExitStack() as opened:  # if one cannot be opened, the others are closed
        store = compose([opened.enter_context(open_tier(url, tiers, more)) for url, more in described], **typed)
        opened.pop_all()
    return store
