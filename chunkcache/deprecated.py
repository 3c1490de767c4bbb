"""Names of the release before, which work until the next."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that `old` is now `new`."""
    warnings.warn(f"{old} is now {new}; the old name goes with the next release", DeprecationWarning, stacklevel)


def renamed_options(options: dict[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return keyword arguments under their new names.

    Args:
        options: keyword arguments that a function does not know.
        names: new names, by old ones.
        where: what the function is called.

    Raises:
        TypeError: one of them is unknown.
    """
    for name in options:
        if name not in names:
            raise TypeError(f"{where} got an unexpected keyword argument {name!r}")
        warn_renamed(f"{where}({name}=)", f"{names[name]}=", stacklevel=4)
    return {names[name]: value for name, value in options.items()}


class RenamedMethods:
    """The old methods of `CachedLLM`."""

    def forget(self: Any, document: str | None = None, texts: Sequence[str] = ()) -> int:
        """Deprecated: `delete`."""
        warn_renamed("llm.forget", "llm.delete")
        everything = document is None and not texts
        return int(self.delete(document=document, texts=texts or None, tenant=everything))

    def know(self: Any, texts: Sequence[str], **options: Any) -> None:
        """Deprecated: `register`."""
        warn_renamed("llm.know", "llm.register")
        self.register(texts, **options)

    def inputs(self: Any, question: str, chunks: Sequence[Any] = (), **options: Any) -> dict[str, Any]:
        """Deprecated: `prepare_inputs`."""
        warn_renamed("llm.inputs", "llm.prepare_inputs")
        inputs: dict[str, Any] = self.prepare_inputs(question, chunks, **options)
        return inputs
