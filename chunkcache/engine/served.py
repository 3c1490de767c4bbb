"""The model as it is now: what belongs to one fingerprint, made anew when the model has changed.

A model may change after it was wrapped: new weights, another adapter, a hook, another dtype. Each request looks
(`chunkcache.library.sentinel`), and is served from what belongs to the model that it finds. KV go under the key of
the model that computed them, or nowhere.
"""

from __future__ import annotations

import copy
import logging
import threading
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chunkcache.blend import Decoder, SelfCheck, self_check
from chunkcache.engine.adapters import Adapters
from chunkcache.engine.calibration import Calibration
from chunkcache.engine.planner import Planner
from chunkcache.engine.tuning import Tuning
from chunkcache.kv import TokenIds
from chunkcache.library import ChunkLibrary
from chunkcache.library.fingerprint import check_tokenizer, fingerprint, tokenizer_identity
from chunkcache.library.registry import ChunkRegistry
from chunkcache.library.sentinel import Sentinel
from chunkcache.library.tensors import TensorDigests
from chunkcache.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from chunkcache.engine.engine import Engine

logger = logging.getLogger("chunkcache")


@dataclass(frozen=True)
class Served:
    """What belongs to one fingerprint of a model.

    Attributes:
        state: number of the model's state, by its sentinel.
        decoder: the model as blend sees it.
        library: where its chunk KV come from.
        planner: plans its requests.
        tuning: what was measured for it.
        self_check: the figures of its self-check.
    """

    state: int
    decoder: Decoder
    library: ChunkLibrary
    planner: Planner
    tuning: Tuning
    self_check: SelfCheck


@dataclass(frozen=True)
class LibraryOptions:
    """What chunk libraries are made with, whatever the model is: see `ChunkLibrary`."""

    store: Store
    tenant: str
    lead_in: TokenIds


class ServedModel:
    """A wrapped model; safe to use from several threads.

    Args:
        model: the model, perhaps with adapters of peft.
        tokenizer: its tokenizer.
        options: what its libraries are made with.
        calibration: as in `Tuning`.

    Attributes:
        model: the Hugging Face model, without what peft put round it.
        adapters: which adapter is active while a call runs.
        latest: what was last served.
        registry: the chunks that are known, under all fingerprints.

    Raises:
        UnsupportedModelError, InputError: the model cannot be served.
        TokenizerMismatchError: the tokenizer is not the model's.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        options: LibraryOptions,
        calibration: Calibration | str | Path | None,
    ) -> None:
        self.adapters = Adapters(model)
        self.model: Any = self.adapters.base
        self._options, self._calibration = options, calibration
        self._lock = threading.RLock()
        decoder = Decoder(self.model)  # refuses first what cannot be served
        check_tokenizer(self.model, tokenizer)
        self._tokenizer = tokenizer_identity(tokenizer)
        self._digests, self._writes = TensorDigests(), 0
        self._checked: dict[str, tuple[SelfCheck, Decoder]] = {}
        self.registry = ChunkRegistry()
        check = self_check(decoder)  # runs the model once, which lets quantised weights settle
        self._sentinel = Sentinel(self.model)
        self.latest = self._serve(self._sentinel.state(), decoder, check)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """All fingerprints that the model has had, the latest last."""
        with self._lock:
            return tuple(self._checked)

    def for_tenant(self, tenant: str) -> ServedModel:
        """Return the same model with the chunks of another tenant; what was found of the model is not found again."""
        twin = copy.copy(self)
        twin._options = replace(self._options, tenant=tenant)
        twin.registry = ChunkRegistry()
        with self.adapters.using(None), self._lock:
            twin.latest = twin._serve(self._sentinel.state(), Decoder(self.model), None)
        return twin

    @contextmanager
    def session(self, adapter: str | None = None) -> Iterator[Served]:
        """Serve one call: with one adapter active and the model's own dtype, whatever autocast says.

        Args:
            adapter: name of the adapter; None leaves active what is.

        Raises:
            InputError: there is no such adapter.
        """
        with self.held(adapter):
            yield self.current()

    @contextmanager
    def held(self, adapter: str | None = None) -> Iterator[None]:
        """Do what `session` does without looking at the model: for the steps of an answer that has begun."""
        with self.adapters.using(adapter), torch.autocast(self.model.device.type, enabled=False):
            yield

    def current(self) -> Served:
        """Look at the model; return what belongs to it as it is now.

        Raises:
            UnsupportedModelError, InputError: it has become one that cannot be served.
        """
        state = self._sentinel.state()
        served = self.latest
        return served if served.state == state else self._renew()

    def refresh(self) -> Served:
        """Read all of the model again, and return what belongs to it."""
        with self._lock:
            self._digests.forget()
            self._sentinel.renew()
            return self._renew()

    def _renew(self) -> Served:
        with self._lock:
            state = self._sentinel.state()
            if self._sentinel.writes != self._writes:
                self._writes = self._sentinel.writes
                self._digests.forget()  # torch may not have counted all of them
            decoder = Decoder(self.model)
            self.latest = self._serve(state, decoder, None)
            return self.latest

    def _serve(self, state: int, decoder: Decoder, check: SelfCheck | None) -> Served:
        options = self._options
        name = fingerprint(self.model, self._tokenizer, self._digests)
        known = self._checked.pop(name, None)
        if known is not None:
            check = known[0]
            decoder.adopt(known[1])
        elif check is None:
            logger.info("the model has changed: it is %s now", name[:12])
            check = self_check(decoder)
            state = self._sentinel.state()
        self._checked[name] = check, decoder
        library = ChunkLibrary(
            decoder,
            options.store,
            name,
            options.tenant,
            options.lead_in,
            self.registry,
            lambda: self._sentinel.state() == state,
        )
        tuning = Tuning(name, self._calibration, len(decoder.layers), decoder.narrowest_window)
        return Served(state, decoder, library, Planner(decoder, library), tuning, check)


class ServedMethods(ABC):
    """The part of `CachedLLM` that says which model it is.

    Attributes:
        engine: serves prompts that are built already.
    """

    engine: Engine

    @property
    def fingerprint(self) -> str:
        """Identity of model and tokenizer as they are now."""
        with self._session() as library:
            return library.fingerprint

    @property
    def self_check(self) -> SelfCheck:
        """The figures of the check that ran when the model was wrapped, or found changed."""
        return self.engine.served.latest.self_check

    @property
    def max_tokens(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self.engine.served.latest.decoder.max_tokens

    def refresh(self) -> str:
        """Read the whole model again, and return its fingerprint.

        Requests notice by themselves that a model has changed. What they may notice late is a write through `.data`
        to a few values of a large model: call this after it.

        Raises:
            UnsupportedModelError, InputError: the model has become one that cannot be served.
        """
        return self.engine.served.refresh().library.fingerprint

    @contextmanager
    def _session(self, adapter: str | None = None) -> Iterator[ChunkLibrary]:
        with self.engine.served.session(adapter) as served:
            yield served.library

    def _libraries(self) -> list[ChunkLibrary]:
        with self._session() as library:  # in it no adapter becomes active, which would have another name
            return [library.of_model(name) for name in self.engine.served.fingerprints]
