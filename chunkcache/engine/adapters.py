"""Adapters of peft: which one is active while a call runs.

An adapter is switched for the whole model, so calls that name different ones wait for one another, and take turns in
the order in which they came.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
                    raise _in_front_of_prompts(name)
            model = model.get_base_model()
        self.base = model
        self._free = threading.Condition()
        self._mine = threading.local()  # a call may make others
        self._turns: deque[object] = deque()  # those that wait, the first to come first
        self._users = 0
        self._name: str | None = None
        self._before: list[str] = []
        self._was_off = False

    @property
    def names(self) -> list[str]:
        """The adapters that there are."""
        return list(getattr(self._outer, "peft_config", {}))

    def check(self, name: str | None) -> None:
        """Raise InputError if there is no such adapter; None is always there."""
        if name is not None and name not in self.names:
            known = ", ".join(map(repr, self.names)) or "none"
            raise InputError(f"adapter={name!r}: the model has no such adapter (it has {known}); load it first")

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Let one adapter be active in the block; None leaves active what is.

        Raises:
            InputError: there is no such adapter.
        """
        self.check(name)
        mine = self._mine.__dict__.setdefault("names", [])
        if mine and name in (None, mine[-1]):
            yield
            return
        if mine:
            raise InputError(f"adapter={name!r} inside a call with adapter={mine[-1]!r}; let that call end first")
        with self._free:
            self._wait(lambda: self._users == 0 or self._name == name)
            if self._users == 0 and name is not None:
                self._before, self._was_off = self._active(), self._is_off
                self._outer.set_adapter(name)
                self._switch(on=True)
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
                    self._switch(on=not self._was_off)
                self._free.notify_all()

    def add(self, name: str, folder: Path) -> None:
        """Load an adapter out of a folder; what is active stays active. It waits until no call runs.

        Raises:
            InputError: there is one of that name, or the folder has none as safetensors, or one of another model.
            UnsupportedModelError: it puts something in front of the prompt.
        """
        try:
            from peft import PeftConfig
        except ImportError as error:
            raise InputError(f"the adapter {name!r} needs the package peft: pip install peft") from error
        if not (folder / "adapter_model.safetensors").is_file():  # other files may hold code
            raise InputError(f"the adapter {name!r} has no adapter_model.safetensors in its folder; save it as one")
        if getattr(PeftConfig.from_pretrained(str(folder)), "is_prompt_learning", False):
            raise _in_front_of_prompts(name)
        with self._alone():
            if name in self.names:
                raise InputError(f"there is an adapter {name!r} already; take another name, or unload it first")
            before = self._active() if self.names else []
            off = self._is_off or not before
            try:
                if self._outer is self.base:
                    self.base.load_adapter(str(folder), adapter_name=name)
                else:
                    self._outer.load_adapter(str(folder), adapter_name=name)
            except (ValueError, RuntimeError, KeyError, OSError) as error:
                if name in self.names:
                    self._outer.delete_adapter(name)
                raise InputError(f"the adapter {name!r} does not fit this model ({type(error).__name__})") from error
            if before:
                self._set(before)
            self._switch(on=not off)

    def remove(self, name: str) -> None:
        """Take an adapter off the model. It waits until no call runs.

        Raises:
            InputError: there is none, or it is the one that calls have that name none.
        """
        with self._alone():
            if name not in self.names:
                raise InputError(f"there is no adapter {name!r}")
            if not self._is_off and name in self._active():
                raise InputError(f"the adapter {name!r} is active; make another active first")
            off = self._is_off
            self._outer.delete_adapter(name)
            self._switch(on=not off)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no call run in the block."""
        with self._free:
            self._wait(lambda: self._users == 0)
            yield

    def _wait(self, may: Callable[[], bool]) -> None:
        """Wait for one's turn; those that came later wait behind, so that none waits for ever."""
        me = object()
        self._turns.append(me)
        try:
            self._free.wait_for(lambda: self._turns[0] is me and may())
        finally:
            self._turns.remove(me)
            self._free.notify_all()

    @property
    def _layers(self) -> list[Any]:
        return [module for module in self.base.modules() if hasattr(type(module), "adapter_layer_names")]

    @property
    def _is_off(self) -> bool:
        """Whether the model is as it would be without adapters."""
        return any(getattr(layer, "_disable_adapters", False) for layer in self._layers)

    def _switch(self, on: bool) -> None:
        for layer in self._layers:
            if getattr(layer, "_disable_adapters", False) == on:
                layer.enable_adapters(on)

    def _active(self) -> list[str]:
        active = self._outer.active_adapters
        return list(active() if callable(active) else active)

    def _set(self, names: list[str]) -> None:
        """Make adapters active again."""
        if self._outer is self.base:
            self._outer.set_adapter(names)
        elif len(names) == 1:
            self._outer.set_adapter(names[0])
        else:
            self._outer.base_model.set_adapter(names)


def _in_front_of_prompts(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the adapter {name!r} puts virtual tokens in front of every prompt, which chunk KV do not have; use LoRA or "
        "another adapter that changes layers"
    )
