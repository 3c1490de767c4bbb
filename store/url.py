"""Store URLs: `memory://?max_bytes=2GiB` opens a store; the options are the constructor's own arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from chunkcache.errors import StoreURLError
from chunkcache.store.base import Store

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


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


def open_store(url: str, tiers: Mapping[str, type[Store]]) -> Store:
    """Open the store that `url` describes, `tiers` mapping each scheme to its class.

    Raises:
        StoreURLError: the scheme is unknown, or an option is unknown or has a bad value.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise StoreURLError(f"{url!r} is not a URL ({error}); write for example memory://?max_bytes=2GiB") from None
    known = ", ".join(f"{scheme}://" for scheme in tiers)
    if parts.scheme not in tiers:
        raise StoreURLError(f"no store has the URL {url!r}; the known ones are {known}")
    if parts.netloc or parts.path or parts.fragment:
        raise StoreURLError(f"{parts.scheme}:// takes only options, as in {parts.scheme}://?max_bytes=2GiB: {url!r}")
    tier = tiers[parts.scheme]
    allowed = inspect.signature(tier).parameters
    options: dict[str, Any] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in allowed:
            raise StoreURLError(
                f"{parts.scheme}:// has no option {name!r}; it takes {', '.join(allowed)} (in {url!r})"
            )
        if name in options:
            raise StoreURLError(f"{name} is given twice in {url!r}; give it once")
        options[name] = value if isinstance(allowed[name].default, str) else parse_bytes(value)
    return tier(**options)
