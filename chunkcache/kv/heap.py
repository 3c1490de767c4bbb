"""What the C library keeps of freed memory, given back to the system."""

from __future__ import annotations

import ctypes


def trim() -> bool:
    """Give back what is free, in milliseconds; return whether the C library can, as glibc does."""
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # TypeError on Windows, which has no library of that kind
        return False
    malloc_trim(ctypes.c_size_t(0))
    return True
