"""Write-behind: in order, bounded, never lost, and never in the way of who puts."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.store import in_process

from chunkcache.store.behind import WriteBehind


@pytest.fixture
def behind():
    opened = WriteBehind(size=4, wait_s=0.01)
    yield opened
    opened.close()


class Gate:
    """A task that lasts until it is opened."""

    def __init__(self):
        self.begun, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.opened.wait(20)


@pytest.fixture
def gate(behind):
    gate = Gate()
    behind.put(gate)
    assert gate.begun.wait(20)
    yield gate
    gate.opened.set()


def test_tasks_are_done_in_order_in_another_thread(behind):
    done = []
    for number in range(50):
        while not behind.put(lambda number=number: done.append((number, threading.current_thread().name))):
            pass
    behind.flush()
    assert [number for number, _ in done] == list(range(50))
    assert {name for _, name in done} == {"chunkcache-write-behind"}


def test_there_is_no_thread_until_there_is_a_task():
    before = threading.active_count()
    idle = WriteBehind(4, 0.01)
    idle.flush()
    idle.close()
    assert threading.active_count() == before


def test_when_it_is_full_no_more_is_taken(behind, gate):
    done = []
    assert [behind.put(lambda: done.append(1)) for _ in range(6)] == [True] * 4 + [False] * 2
    assert not behind.put(lambda: done.append(1), wait=False)
    gate.opened.set()
    behind.flush()
    assert done == [1] * 4
    assert behind.put(lambda: done.append(1))


def test_who_waits_for_a_place_gets_the_next():
    behind = WriteBehind(size=1, wait_s=20)
    gate, done = Gate(), []
    behind.put(gate)
    assert gate.begun.wait(20)
    behind.put(lambda: done.append(1))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(behind.put, lambda: done.append(2))
        gate.opened.set()
        assert waiting.result(20)
    behind.close()
    assert done == [1, 2]


def test_flush_waits_for_what_was_put_before_it_only(behind, gate):
    done = []
    with ThreadPoolExecutor(1) as pool:
        behind.put(lambda: done.append(1))
        flushed = pool.submit(behind.flush)
        assert not flushed.done()
        gate.opened.set()
        flushed.result(20)
        assert done == [1]
        later = Gate()
        behind.put(later)
        later.opened.set()


def test_settle_waits_for_the_task_that_is_being_done_and_for_no_other(behind, gate):
    second = Gate()
    behind.put(second)
    with ThreadPoolExecutor() as pool:
        settled = pool.submit(behind.settle, 20)
        gate.opened.set()
        assert settled.result(20)
        assert second.begun.wait(20)
        assert not behind.settle(0.01)
        second.opened.set()


def test_there_is_nothing_to_settle_before_the_first_task_and_within_one(behind):
    assert behind.settle(20)
    settled = []
    behind.put(lambda: settled.append(behind.settle(20)))
    behind.flush()
    assert settled == [True]


def test_a_task_that_fails_is_logged_and_takes_no_other_along(behind, caplog):
    done = []
    with caplog.at_level(logging.ERROR):
        behind.put(lambda: 1 / 0)
        behind.put(lambda: done.append(1))
        behind.flush()
    assert done == [1]
    [record] = caplog.records
    assert record.getMessage() == "a write behind a request failed"
    assert record.exc_info[0] is ZeroDivisionError


def test_what_a_task_puts_is_done_before_it_ends_also_when_the_queue_is_full(behind, gate):
    done = []

    def task():
        assert behind.put(lambda: done.append("inner"))
        behind.flush()
        done.append("outer")

    for _ in range(4):
        behind.put(task)
    gate.opened.set()
    behind.flush()
    assert done == ["inner", "outer"] * 4


def test_close_does_what_is_queued_and_then_nothing_more_is_taken(behind, gate):
    done = []
    behind.put(lambda: done.append(1))
    gate.opened.set()
    behind.close()
    assert done == [1]
    assert not behind.put(lambda: done.append(2))
    behind.flush()
    behind.close()
    assert done == [1]


def test_a_task_that_is_done_is_let_go():
    class Large:
        pass

    behind = WriteBehind(4, 0.01)
    large = Large()
    gone = weakref.ref(large)
    behind.put(lambda large=large: None)
    del large
    behind.flush()
    gc.collect()
    assert gone() is None
    behind.close()


def test_it_can_be_closed_from_within(behind):
    """The garbage collector runs finalizers in whichever thread it likes."""
    done = threading.Event()
    behind.put(lambda: (behind.close(), done.set()))
    assert done.wait(20)


def test_many_threads_may_put_flush_and_close():
    behind = WriteBehind(size=3, wait_s=0.001)
    done, taken, start = [], [], threading.Barrier(8)

    def work(number):
        start.wait()
        for turn in range(50):
            if behind.put(lambda: done.append(number)):
                taken.append(number)
            if turn % 10 == number:
                behind.flush()
            if (number, turn) == (7, 45):
                behind.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    behind.close()
    assert sorted(done) == sorted(taken)


FORKED = """
    from chunkcache.store.behind import WriteBehind

    behind, done = WriteBehind(4, 0.01), []
    behind.put(lambda: done.append("parent"))
    behind.flush()

    def child():
        assert behind.put(lambda: done.append("child"))
        behind.flush()
        behind.close()
        assert done == ["parent", "child"], done

    joined(forked(child))
"""


def test_the_child_of_a_fork_has_a_thread_of_its_own(tmp_path):
    in_process(FORKED, tmp_path)
