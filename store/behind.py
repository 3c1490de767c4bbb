"""Work behind the request: tasks in a thread of their own, in order, from a bounded queue."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger("chunkcache.store")
Task = Callable[[], object]


class _Worker(threading.Thread):
    """The thread of a `WriteBehind`."""


class WriteBehind:
    """Runs tasks one after the other in a thread that starts with the first.

    Args:
        size: tasks that may wait; each keeps one chunk KV in memory.
        wait_s: how long `put` waits for a place when the queue is full.
    """

    def __init__(self, size: int, wait_s: float) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._places = threading.Semaphore(size)
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._done: threading.Event | None = None  # set when the task that is being done is done
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, task: Task, wait: bool = True) -> bool:
        """Queue `task`; False if there is no place for it. A task that a task puts, in any queue, is done at once."""
        if isinstance(threading.current_thread(), _Worker):
            self._do(task)
            return True
        if not self._places.acquire(timeout=self._wait_s if wait else 0):
            return False

        def leave_and_do() -> None:
            self._places.release()
            self._do(task)

        return self._queue(leave_and_do)

    def flush(self) -> None:
        """Wait until all tasks queued so far are done."""
        done = threading.Event()
        if self._thread not in (None, threading.current_thread()) and self._queue(done.set):
            done.wait()

    def settle(self, most_s: float) -> bool:
        """Wait until the task that is being done is done, `most_s` seconds at most; return whether it is."""
        done, thread = self._done, self._thread
        if done is None or thread is None or not thread.is_alive() or thread is threading.current_thread():
            return True
        return done.wait(most_s)

    def close(self) -> None:
        """Do what is queued, and end the thread. Nothing is taken afterwards."""
        with self._lock:
            self._closed = True
        if self._thread is not None and self._thread.is_alive():
            self._tasks.put(None)
            if self._thread is not threading.current_thread():  # as when the garbage collector calls it there
                self._thread.join()

    def _queue(self, task: Task) -> bool:
        with self._lock:
            if self._closed:
                return False
            if self._thread is None or not self._thread.is_alive():  # the child of a fork has lost it
                self._thread = _Worker(target=self._work, name="chunkcache-write-behind", daemon=True)
                self._thread.start()
            self._tasks.put(task)
            return True

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._done = threading.Event()
            try:
                task()
            finally:
                self._done.set()
            del task  # frees its chunk KV before the next task comes

    def _do(self, task: Task) -> None:
        try:
            task()
        except Exception:  # a task that fails must not take those behind it along
            logger.exception("a write behind a request failed")
