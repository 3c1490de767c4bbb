"""What a retriever's plug-in does for the texts that it returns: their KV are on the way before the prompt is.

Texts become findable in prompts, stored KV start towards the device, and what is missing is computed: at once, in
a thread while the caller goes on, or not before the request needs it.
"""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from chunkcache.errors import InputError
from chunkcache.retriever.order import ServedOrders, distinct
from chunkcache.store.hints import Hints

if TYPE_CHECKING:
    from chunkcache.blend import Policy
    from chunkcache.kv import ChunkKey
    from chunkcache.llm import CachedLLM

logger = logging.getLogger("chunkcache.retriever")

CHUNK_KEY = "chunk_key"  # metadata of what a retriever returns: hex digest of the key that its KV are stored under
HOWS = ("now", "background", "never")
WAITING = 1024  # texts that may wait for the thread; more are left to the request that needs them
_LABELLED = 100_000  # texts that are remembered to be stored with their document
_BATCH = 4  # texts computed together, and so what `close` may have to wait for

Work = tuple[str, str | None]  # a text and the id of its document


class BackgroundPrecompute:
    """Prepares texts for the prompts that they will stand in. Any number of threads may use it.

    What waits for the thread would be computed after a deletion, too: call `flush` before `llm.delete`.

    Args:
        llm: what will answer.
        how: when missing KV are computed: "now", in the "background", or "never" (by the request itself, then).
        system: the system prompt of the requests, as in `llm.precompute`.
        policy: their policy; None for the wrapper's.
        reorder: by how many ranks `order` may move a text; see `Corpus`.
        distinct: whether `order` leaves out texts that say nothing new.

    Attributes:
        skipped: texts that cannot be cached: white space alone, or too long for the model's context.
        dropped: texts that found too many waiting, and were left to the request.
        errors: batches that failed in the background.

    Raises:
        InputError: `how` is none of these, or `reorder` is negative.
        PolicyError: the policy is unknown.
    """

    def __init__(
        self,
        llm: CachedLLM,
        how: str = "now",
        system: str | None = None,
        policy: str | Policy | None = None,
        reorder: int = 0,
        distinct: bool = False,
    ) -> None:
        if how not in HOWS:
            raise InputError(f"precompute is {how!r}: choose one of {', '.join(HOWS)}")
        if reorder < 0:
            raise InputError(f"reorder = {reorder} is no number of ranks: give 0 or more")
        llm.resolve_policy(policy)
        self._llm, self._how, self._system, self._policy = llm, how, system, policy
        self._reorder, self._distinct = reorder, distinct
        self._orders = ServedOrders()
        self._hints = Hints(llm.store, likely=0)
        self.skipped = self.dropped = self.errors = 0
        self._labelled: set[Work] = set()  # stored with their document
        self._waiting: dict[Work, None] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = self._explained = False
        if how == "background":
            _open.add(self)
            atexit.unregister(_close_all)
            atexit.register(_close_all)  # last, and so called before the store is closed

    def order(self, texts: Sequence[str]) -> list[int]:
        """Return in which order texts are best served, as indices: their own, if nothing else was asked for."""
        kept = distinct(texts) if self._distinct else list(range(len(texts)))
        names = [texts[index].strip() for index in kept]
        order = self._orders.arrange(names, self._reorder)
        if self._reorder:
            self._orders.record([names[index] for index in order])
        return [kept[index] for index in order]

    def take(self, texts: Sequence[str], documents: Sequence[str | None] | None = None) -> list[str | None]:
        """Make texts findable, start bringing their KV nearer, and have what is missing computed.

        Args:
            texts: as they will stand in the prompt.
            documents: for each text the id of its document, or None.

        Returns:
            for each text the digest of its key in the store, or None if it cannot be cached.

        Raises:
            InputError: there are more or fewer documents than texts.
        """
        owners = [None] * len(texts) if documents is None else list(documents)
        if len(owners) != len(texts):
            raise InputError(
                f"{len(owners)} documents for {len(texts)} texts: give one document id per text, or None"
            )
        keys = [self._key(text) for text in texts]
        self._count_skipped(keys.count(None))
        work = {(text, owner or None): key for text, owner, key in zip(texts, owners, keys, strict=True) if key}
        texts, owners = [text for text, _ in work], [owner for _, owner in work]
        self._llm.register(texts, system=self._system, policy=self._policy, documents=owners)
        held = {key for key in work.values() if key in self._llm.store}
        self._hints.retrieved(work.values())
        # A text that is stored goes the same way once, so that its entry also says which document it is from.
        due = [
            (text, owner)
            for (text, owner), key in work.items()
            if key not in held or (owner and (text, owner) not in self._labelled)
        ]
        if self._how == "now":
            self._compute(due)
        elif self._how == "background":
            self._queue(due)
        return [None if key is None else key.digest for key in keys]

    def flush(self) -> None:
        """Wait until nothing waits for the thread, and nothing is being computed by it."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None or not self._thread.is_alive())

    def close(self) -> None:
        """End the thread after the texts that it is at; what waits is left to the requests, as all that comes."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
        self.flush()

    def _key(self, text: str) -> ChunkKey | None:
        llm = self._llm
        if not text.strip():
            self._explain("it is white space alone")
            return None
        tokens, before = len(llm.prompts.chunk(text)), len(llm.prompts.prefix(self._system))
        limit = llm.max_tokens
        if before + tokens >= limit:
            self._explain(f"it has {tokens} tokens, and does not fit the model's context of {limit} behind {before}")
            return None
        return llm.keys([text], system=self._system, policy=self._policy)[0]

    def _explain(self, why: str) -> None:
        if not self._explained:
            self._explained = True
            logger.warning("a retrieved text cannot be cached, because %s; further ones are only counted", why)

    def _count_skipped(self, count: int) -> None:
        with self._changed:
            self.skipped += count

    def _queue(self, due: list[Work]) -> None:
        dropped = 0
        with self._changed:
            if self._closed:
                return
            for work in due:
                if work in self._waiting or len(self._waiting) < WAITING:
                    self._waiting[work] = None
                else:
                    dropped += 1
            self.dropped += dropped
            first = dropped > 0 and self.dropped == dropped
            # The thread ends when nothing waits; the child of a fork has lost it.
            if self._waiting and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._work, name="chunkcache-ahead", daemon=True)
                self._thread.start()
        if first:
            logger.warning("%d texts wait to be precomputed; more are left to the request, and only counted", WAITING)

    def _work(self) -> None:
        while batch := self._next():
            try:
                self._compute(batch)
            except Exception:  # the request computes them, and says what is wrong
                with self._changed:
                    self.errors += 1
                    first = self.errors == 1
                if first:
                    logger.exception("precomputing retrieved texts failed; further failures are only counted")

    def _next(self) -> list[Work]:
        with self._changed:
            batch = list(self._waiting)[:_BATCH]
            for work in batch:
                del self._waiting[work]
            if not batch:
                self._thread = None
                self._changed.notify_all()
            return batch

    def _compute(self, work: list[Work]) -> None:
        if not work:
            return
        texts, owners = zip(*dict.fromkeys(work), strict=True)
        self._llm.precompute(texts, system=self._system, policy=self._policy, documents=owners)
        self._labelled.update((text, owner) for text, owner in work if owner is not None)
        if len(self._labelled) > _LABELLED:
            self._labelled.clear()  # each text goes that way once more


_open: weakref.WeakSet[BackgroundPrecompute] = weakref.WeakSet()


def _close_all() -> None:
    # A thread that is inside torch when the interpreter goes away can take the process down with an abort.
    for each in list(_open):
        each.close()
