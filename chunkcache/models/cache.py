"""The cache folder: what can be made again from a file is kept there, under a name that has the file's digest."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError

from chunkcache.errors import InputError


def cache_dir() -> Path:
    """Folder for what can be made again: `$CHUNKCACHE_CACHE_DIR`, or the platform's cache folder."""
    configured = os.environ.get("CHUNKCACHE_CACHE_DIR")
    return Path(configured).expanduser() if configured else user_cache_path("chunkcache", appauthor=False)


def digest_of(paths: Iterable[Path]) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the content of some files, one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]


def make_once(path: Path, what: str, make: Callable[[Path], None]) -> None:
    """Make the file or folder `path` if there is none, in one process at a time; only a whole one gets its name.

    Args:
        path: in the cache folder.
        what: it is, for the error.
        make: called with the path at which it is made before it gets its name.

    Raises:
        InputError: it cannot be written.
    """
    partial = Path(f"{path}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():  # another process may have made it while this one waited
                try:
                    make(partial)
                    partial.rename(path)
                finally:
                    _remove(partial)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"The {what} cannot be written to {path}: {error}. "
            "Free some space, or set CHUNKCACHE_CACHE_DIR to a folder that can hold it."
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
