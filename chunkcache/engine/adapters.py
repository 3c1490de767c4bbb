"""Adapters of peft: which one is active while a call runs.

An adapter is switched for the whole model, so calls that name different ones wait for one another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from chunkcache.blend.shadow import unwrapped
from chunkcache.errors import InputError, UnsupportedModelError


class Adapters:
    """The adapters of one model.

    Args:
        model: a Hugging Face model, or a `PeftModel` round one.

    Attributes:
        base: the Hugging Face model.

    Raises:
        UnsupportedModelError: an adapter puts something in front of the prompt.
    """

    def __init__(self, model: Any) -> None:
        self._outer = model = unwrapped(model)
        if type(model).__module__.startswith("peft."):
            for name, config in model.peft_config.items():
                if getattr(config, "is_prompt_learning", False):
                    raise UnsupportedModelError(
                        f"the adapter {name!r} of type {config.peft_type} puts virtual tokens in front of every "
                        "prompt, which chunk KV do not have; use LoRA or another adapter that changes layers"
                    )
            model = model.get_base_model()
        self.base = model
        self._free = threading.Condition()
        self._mine = threading.local()  # a call may make others
        self._users = 0
        self._name: str | None = None
        self._before: list[str] = []

    @property
    def names(self) -> list[str]:
        """The adapters that there are."""
        return list(getattr(self._outer, "peft_config", {}))

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Let one adapter be active in the block; None leaves active what is.

        Raises:
            InputError: there is no such adapter.
        """
        if name is not None and name not in self.names:
            known = ", ".join(map(repr, self.names)) or "none"
            raise InputError(f"adapter={name!r}: the model has no such adapter (it has {known}); load it first")
        mine = self._mine.__dict__.setdefault("names", [])
        if mine and name in (None, mine[-1]):
            yield
            return
        if mine:
            raise InputError(f"adapter={name!r} inside a call with adapter={mine[-1]!r}; let that call end first")
        with self._free:
            self._free.wait_for(lambda: self._users == 0 or self._name == name)
            if self._users == 0 and name is not None:
                self._before = self._active()
                self._outer.set_adapter(name)
            self._name = name
            self._users += 1
        mine.append(name)
        try:
            yield
        finally:
            mine.pop()
            with self._free:
                self._users -= 1
                if self._users == 0 and name is not None:
                    self._set(self._before)
                self._free.notify_all()

    def _active(self) -> list[str]:
        active = self._outer.active_adapters
        return list(active() if callable(active) else active)

    def _set(self, names: list[str]) -> None:
        """Make adapters active again."""
        if self._outer is not self.base and len(names) == 1:
            self._outer.set_adapter(names[0])
        else:
            getattr(self._outer, "base_model", self._outer).set_adapter(names)
