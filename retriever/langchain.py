"""Deprecated: this plug-in is `chunkcache.integrations.langchain`; this path goes with the next release."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

_NEW = "chunkcache.integrations.langchain"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    warnings.warn(f"{__name__} has moved: import {name} from {_NEW}", DeprecationWarning, stacklevel=2)
    return getattr(import_module(_NEW), name)
