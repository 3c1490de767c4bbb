"""Who may ask: API keys, the tenants they stand for, and how much each may ask at once."""

from __future__ import annotations

import hashlib
import hmac
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from chunkcache.errors import InputError
from chunkcache.serve.errors import HTTPError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Tenant:
    """One who asks.

    Attributes:
        name: goes into the key of every chunk: nobody else finds these chunks, or can tell that they are there.
        requests: that may be under way at once; None for no bound of its own.
    """

    name: str = ""
    requests: int | None = None


class Tenants:
    """Keys and their tenants.

    Args:
        keys: the SHA-256 of each key in hexadecimal, with its tenant; empty where everybody may ask.
    """

    def __init__(self, keys: Mapping[str, Tenant] | None = None) -> None:
        self._keys = {digest.lower().encode(): tenant for digest, tenant in (keys or {}).items()}
        self._lock = threading.Lock()
        self._under_way: Counter[str] = Counter()

    def __bool__(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._keys)

    @property
    def all(self) -> list[Tenant]:
        """Those who have a key, each once."""
        return list({tenant.name: tenant for tenant in self._keys.values()}.values())

    @classmethod
    def of_key(cls, key: str) -> Tenants:
        """Return those of one key, which stands for everybody who has it.

        Raises:
            InputError: it is too short to be a secret.
        """
        if len(key) < 16:
            raise InputError(f"the API key has {len(key)} characters: give 16 or more")
        return cls({digest(key.strip()): Tenant()})

    @classmethod
    def read(cls, path: Path) -> Tenants:
        """Read a TOML file of `[[key]]` tables with `sha256`, `tenant` and, perhaps, `requests`.

        Raises:
            InputError: it cannot be read, or something in it is wrong.
        """
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))["key"]
            keys = {table["sha256"]: Tenant(table["tenant"], table.get("requests")) for table in tables}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no file of API keys ({type(error).__name__}: {error}); it has a table [[key]] for each, "
                'with sha256 = "..." and tenant = "..."'
            ) from None
        for name, tenant in keys.items():
            wrong = (
                not re.fullmatch("[0-9a-fA-F]{64}", str(name)) or not isinstance(tenant.name, str) or not tenant.name
            )
            if wrong or not (tenant.requests is None or (isinstance(tenant.requests, int) and tenant.requests > 0)):
                raise InputError(
                    f"{path}: each key needs a sha256 of 64 hexadecimal digits, a tenant, and requests of 1 or more"
                )
        return cls(keys)

    def find(self, authorization: str | None) -> Tenant:
        """Return whose key a request has, by its header.

        Every key is compared, each in constant time, so that how long it takes says nothing of them.

        Raises:
            HTTPError: it has none, or one that nobody has.
        """
        if not self._keys:
            return Tenant()
        scheme, _, key = (authorization or "").partition(" ")
        asked = digest(key.strip()).encode()
        found = [tenant for known, tenant in self._keys.items() if hmac.compare_digest(known, asked)]
        if scheme.lower() != "bearer" or not found:
            raise HTTPError(401, "this API key is not known here; pass one as a Bearer token", "invalid_api_key")
        return found[0]

    @contextmanager
    def admitted(self, tenant: Tenant) -> Iterator[None]:
        """Count a request of a tenant as under way in the block.

        Raises:
            HTTPError: the tenant has as many as it may have.
        """
        with self._lock:
            if tenant.requests is not None and self._under_way[tenant.name] >= tenant.requests:
                message = f"{tenant.requests} requests of this key are under way; ask again when one is done"
                raise HTTPError(429, message, "rate_limit_exceeded", retry=True)
            self._under_way[tenant.name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way[tenant.name] -= 1
                self._under_way += Counter()  # lets go of those at 0


def digest(key: str) -> str:
    """Return the SHA-256 of a key in hexadecimal: only this is kept."""
    return hashlib.sha256(key.encode()).hexdigest()
