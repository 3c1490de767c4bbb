"""The command that makes encryption keys: `chunkcache store key`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated

import click

from chunkcache.cli.options import command, option


@dataclass(frozen=True, kw_only=True)
class KeyOptions:
    """A key to be made."""

    key_id: Annotated[str | None, option("--id", metavar="ID", help="What the key is called; the date and time by "
                                         "default.")] = None  # fmt: skip


@command("key")
def make_key(options: KeyOptions) -> None:
    """Make a new encryption key, a line for CHUNKCACHE_ENCRYPTION_KEYS or a file that encryption_key_file= names.

    The first line of a list encrypts, all of them decrypt: put a new key before the others. It is shown this once.
    """
    from chunkcache.store.encryption import new_key

    click.echo(new_key(time.strftime("%Y-%m-%d.%H%M%S") if options.key_id is None else options.key_id))
