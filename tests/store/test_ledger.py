"""The ledger: within its budgets after every entry, whoever is asked for, pinned, deleted or deleting."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.store import key

from chunkcache.errors import StoreURLError
from chunkcache.store import EVERYTHING, Budget, Entry, EntryFilter
from chunkcache.store import frequency as module
from chunkcache.store import tombstones as tombstones
from chunkcache.store.ledger import Ledger
from chunkcache.store.lru import LRULedger


@pytest.fixture(params=[Ledger, LRULedger])
def of(request):
    """Return the class of a ledger that evicts what was used longest ago."""
    return request.param


def new_ledger(max_bytes=None, evict="lru", path=None, **options):
    return Ledger(Budget(max_bytes, evict, **options), path)


def entry(token, nbytes=10, **more):
    return Entry(key=key(token), nbytes=nbytes, tokens=1, **more)


def add(ledger, *entries):
    """Make room as a tier does, and enter; return which had to go, or None."""
    for new in entries:
        victims = ledger.victims(new)
        if victims is None:
            return None
        for victim in victims:
            ledger.drop(victim)
        ledger.add(new)
    return tokens(victims)


def tokens(keys):
    keys = set(keys)
    return [token for token in range(100) if key(token) in keys]


def is_deleted(ledger, entry):
    return ledger.tombstones.is_deleted(entry.key, entry)


def held(ledger):
    return tokens(known.key for known in ledger.entries(EVERYTHING))


@pytest.mark.parametrize("evict", ["lru", "lfu", "cost"])
def test_without_uses_the_oldest_goes_first(evict):
    ledger = new_ledger(30, evict)
    add(ledger, entry(1), entry(2), entry(3))
    assert add(ledger, entry(4)) == [1]
    assert add(ledger, entry(5, nbytes=15)) == [2, 3]
    assert ledger.totals() == (2, 25)


def test_lru_drops_what_was_not_used_for_longest(of):
    ledger = of(Budget(30))
    add(ledger, entry(1), entry(2), entry(3))
    for token in (1, 1, 1, 3, 2):
        ledger.use(key(token))
    assert add(ledger, entry(4)) == [1]
    assert add(ledger, entry(5)) == [3]


def test_lfu_drops_what_was_used_least_often():
    ledger = new_ledger(30, "lfu")
    add(ledger, entry(1), entry(2), entry(3))
    for token in (1, 1, 1, 3, 3, 2):
        ledger.use(key(token))
    assert add(ledger, entry(4)) == [2]
    assert add(ledger, entry(5)) == [4]


def test_cost_drops_what_saves_least_time_per_byte():
    ledger = new_ledger(40, "cost")
    add(ledger, entry(1, compute_s=1.0), entry(2, nbytes=20, compute_s=1.5), entry(3, compute_s=0.5))
    for token in (1, 2, 3, 3, 3):
        ledger.use(key(token))  # seconds saved per byte: 0.1, 0.075, 0.15
    assert add(ledger, entry(4, compute_s=9.0)) == [2]
    ledger.credit(key(1), 1.0)
    ledger.use(key(4))
    assert add(ledger, entry(5, nbytes=20)) == [3]  # 0.2, 0.15, 0.9, and 5 has no use yet
    assert add(ledger, entry(6, nbytes=20)) == [5]


def test_credit_is_no_use(of):
    ledger = of(Budget(20))
    add(ledger, entry(1), entry(2))
    ledger.credit(key(1), 5.0)
    ledger.credit(key(9), 5.0)  # not held
    assert add(ledger, entry(3)) == [1]
    assert [known.uses for known in ledger.entries(EVERYTHING)] == [0.0, 0.0]


def test_uses_survive_the_replacing_of_an_entry_and_go_with_it(of):
    ledger = of()
    add(ledger, entry(1))
    ledger.use(key(1))
    ledger.pin(key(1), True)
    add(ledger, entry(1, nbytes=99, model="new"))
    [known] = ledger.entries(EVERYTHING)
    assert (known.uses, known.pinned, known.nbytes, known.model) == (1.0, True, 99, "new")
    ledger.use(key(1))
    ledger.drop(key(1))
    add(ledger, entry(1))
    [known] = ledger.entries(EVERYTHING)
    assert (known.uses, known.pinned) == (0.0, False)


def test_old_uses_count_less_and_less(monkeypatch):
    monkeypatch.setattr(module, "_AGE_AFTER", 128)
    ledger = new_ledger(20, "lfu")
    add(ledger, entry(1))
    for _ in range(60):
        ledger.use(key(1))  # popular once
    add(ledger, entry(2))
    for _ in range(500):
        ledger.use(key(2))
        ledger.credit(key(9), 1.0)
    assert add(ledger, entry(3)) == [1]
    [_, known] = sorted(ledger.entries(EVERYTHING), key=lambda known: known.uses)
    assert known.uses < 500


def test_what_is_asked_for_once_flushes_nothing_that_is_asked_for_often():
    ledger = new_ledger(30, admit="frequent")
    for _ in range(3):
        for token in (1, 2, 3):
            ledger.asked(key(token))
    add(ledger, entry(1), entry(2), entry(3))
    for token in range(10, 60):
        ledger.asked(key(token))
        assert add(ledger, entry(token)) is None
    assert held(ledger) == [1, 2, 3]
    for _ in range(3):
        ledger.asked(key(60))
    assert add(ledger, entry(60)) == [1]


def test_while_there_is_room_everybody_is_let_in():
    ledger = new_ledger(30, admit="frequent")
    assert add(ledger, entry(1), entry(2), entry(3)) == []
    ledger.asked(key(1))
    assert add(ledger, entry(4)) is None
    ledger.asked(key(4))
    assert add(ledger, entry(4)) == [1]


def test_what_was_asked_for_long_ago_is_forgotten(monkeypatch):
    monkeypatch.setattr(module, "_AGE_AFTER", 64)
    ledger = new_ledger(10, admit="frequent")
    for token in range(2000):
        ledger.asked(key(token))
    assert ledger._db.execute("SELECT count(*) FROM seen").fetchone()[0] < 200


def test_a_tenant_over_its_quota_evicts_its_own(of):
    ledger = of(Budget(100, tenant_bytes=30))
    add(
        ledger, *(entry(token, tenant="a") for token in (1, 2, 3)), *(entry(token, tenant="b") for token in (4, 5, 6))
    )
    assert add(ledger, entry(7, tenant="b")) == [4]
    assert add(ledger, entry(8, nbytes=25, tenant="a")) == [1, 2, 3]
    assert ledger.victims(entry(9, nbytes=31, tenant="a")) is None
    assert add(ledger, entry(10, nbytes=31)) == []  # of no tenant: no quota


def test_the_quota_counts_before_the_budget_and_nothing_goes_twice(of):
    ledger = of(Budget(60, tenant_bytes=30))
    add(
        ledger, *(entry(token, tenant="a") for token in (1, 2, 3)), *(entry(token, tenant="b") for token in (4, 5, 6))
    )
    assert add(ledger, entry(7, nbytes=10, tenant="b")) == [4]
    assert add(ledger, entry(8, nbytes=20, tenant="b")) == [5, 6]
    assert add(ledger, entry(9, nbytes=20, tenant="c")) == [1, 2]


def test_what_is_pinned_stays_and_what_then_does_not_fit_is_refused(of):
    ledger = of(Budget(30))
    add(ledger, entry(1), entry(2), entry(3))
    ledger.pin(key(1), True)
    ledger.pin(key(2), True)
    assert add(ledger, entry(4)) == [3]
    assert ledger.victims(entry(5, nbytes=11)) is None
    assert held(ledger) == [1, 2, 4]
    ledger.pin(key(1), False)
    assert add(ledger, entry(5, nbytes=11)) == [1, 4]
    assert [known.pinned for known in ledger.entries(EVERYTHING) if known.key == key(2)] == [True]


def test_an_entry_that_replaces_itself_makes_room_for_the_difference(of):
    ledger = of(Budget(30))
    add(ledger, entry(1), entry(2), entry(3))
    assert add(ledger, entry(3, nbytes=20)) == [1]
    assert add(ledger, entry(2, nbytes=30)) == [3]
    assert add(ledger, entry(2, nbytes=1)) == []


def test_expired_entries_are_those_past_their_time(of):
    ledger = of()
    add(ledger, entry(1, expires=10.0), entry(2, expires=20.0), entry(3))
    assert tokens(ledger.expired(15.0)) == [1]
    assert tokens(ledger.expired(25.0)) == [1, 2]


def test_entries_are_found_by_what_they_come_from(of):
    ledger = of()
    add(
        ledger,
        entry(1, model="m", tenant="t", documents=("d", "e")),
        entry(2, model="m", chunks=("c", "f")),
        entry(3),
    )
    for where, found in (
        (EntryFilter(model="m"), [1, 2]),
        (EntryFilter(model="m", tenant="t"), [1]),
        (EntryFilter(document="e"), [1]),
        (EntryFilter(chunk="f"), [2]),
        (EntryFilter(chunks=frozenset({"x", "f"})), [2]),
        (EntryFilter(chunks=frozenset()), []),
        (EntryFilter(tenant=""), [2, 3]),
        (EntryFilter(document="nothing"), []),
        (EVERYTHING, [1, 2, 3]),
    ):
        assert tokens(known.key for known in ledger.entries(where)) == found


def test_an_entry_comes_back_as_it_was(of):
    ledger = of()
    original = entry(
        1, model="m", tenant="t", documents=("d", "e"), chunks=("c",), created=5.5, expires=7.5, compute_s=0.25
    )
    ledger.add(original)
    [known] = ledger.entries(EVERYTHING)
    assert known.used > 0
    assert replace(known, used=0.0) == original


def test_deletions_are_recorded_of_one_key_or_of_all_that_a_filter_selects():
    ledger = Ledger()
    now = time.time()
    old, new = entry(1, created=now - 1, tenant="t", documents=("d", "e")), entry(1, created=now + 100)
    assert not is_deleted(ledger, old)
    ledger.tombstones.add(key(2))
    ledger.tombstones.add(EntryFilter(tenant="t", document="x"))
    ledger.tombstones.add(EntryFilter(model="n"))
    assert not is_deleted(ledger, old)
    ledger.tombstones.add(EntryFilter(tenant="t", document="e"))
    assert is_deleted(ledger, old)
    assert not is_deleted(ledger, replace(old, tenant="u"))
    ledger.tombstones.add(key(1))
    assert is_deleted(ledger, replace(old, tenant="u"))
    assert not is_deleted(ledger, new)
    ledger.tombstones.add(EVERYTHING)
    assert is_deleted(ledger, entry(77, created=now - 1))


def test_a_deletion_of_many_chunks_is_recorded_chunk_by_chunk_as_every_version_reads_it(tmp_path):
    ledger = new_ledger(path=tmp_path / "index")
    ledger.tombstones.add(EntryFilter("m", chunks=frozenset("ab")))
    with sqlite3.connect(tmp_path / "index") as index:
        names = {name for (name,) in index.execute("SELECT what FROM tombs")}
    index.close()
    assert names == {'["m", null, null, "a"]', '["m", null, null, "b"]'}
    assert is_deleted(ledger, entry(1, model="m", chunks=("c", "b"), created=1.0))
    assert not is_deleted(ledger, entry(1, model="m", chunks=("c",), created=1.0))
    ledger.close()


def test_only_so_many_deletions_are_remembered(monkeypatch):
    monkeypatch.setattr(tombstones, "KEPT", 3)
    ledger = Ledger()
    for token in range(6):
        ledger.tombstones.add(key(token))
        time.sleep(0.001)  # a time of its own
    assert [is_deleted(ledger, entry(token, created=1.0)) for token in range(6)] == [False] * 3 + [True] * 3


# Ghosts: uses of what is not held


def uses(ledger):
    return {tokens([known.key])[0]: known.uses for known in ledger.entries(EVERYTHING)}


def ghosts(ledger):
    ledger._counts.write()
    known = dict(ledger._db.execute("SELECT key, uses FROM ghosts").fetchall())
    return {token: known[key(token).digest] for token in range(100) if key(token).digest in known}


@pytest.mark.parametrize("evict", ["lfu", "cost"])
def test_what_was_evicted_comes_back_with_its_uses(evict):
    ledger = new_ledger(20, evict)
    add(ledger, entry(1, compute_s=1.0), entry(2, compute_s=1.0))
    for token in (1, 1, 2, 2, 2):
        ledger.use(key(token))
    assert add(ledger, entry(3, compute_s=1.0)) == [1]
    assert ghosts(ledger) == {1: 2.0}
    ledger.use(key(3))
    assert add(ledger, entry(1, compute_s=1.0)) == [3]
    assert uses(ledger) == {1: 2.0, 2: 3.0}
    assert ghosts(ledger) == {3: 1.0}


def test_what_is_popular_before_it_is_held_is_not_the_first_to_go():
    ledger = new_ledger(20, "lfu")
    ledger.credit(key(1), 3.0)
    ledger.credit(key(1), 1.0)
    ledger.asked(key(1))  # and missed
    add(ledger, entry(1), entry(2))
    for _ in range(4):
        ledger.use(key(2))
    assert uses(ledger) == {1: 5.0, 2: 4.0}
    assert add(ledger, entry(3)) == [2]
    assert ghosts(ledger) == {2: 4.0}


def test_a_hit_counts_once_and_a_miss_too():
    ledger = new_ledger(20, "lfu")
    add(ledger, entry(1))
    for token in (1, 2, 2, 1):
        ledger.asked(key(token))
        if token == 1:
            ledger.use(key(1))
    assert (uses(ledger), ghosts(ledger)) == ({1: 2.0}, {2: 2.0})


def test_what_expires_leaves_its_uses_and_what_is_deleted_does_not():
    ledger = new_ledger(100, "lfu")
    add(ledger, entry(1, expires=10.0), entry(2))
    ledger.use(key(1))
    ledger.use(key(2))
    assert list(ledger.expired(20.0)) == [key(1)]
    ledger.drop(key(1))
    ledger.credit(key(2), 1.0)
    ledger.drop(key(2))
    assert ghosts(ledger) == {1: 1.0}
    add(ledger, entry(2))
    assert uses(ledger) == {2: 0.0}


@pytest.mark.parametrize(
    "options", [{}, {"evict": "lfu"}, {"max_bytes": 20}, {"max_bytes": 20, "evict": "lfu", "ghosts": 0}]
)
def test_where_uses_decide_nothing_none_are_remembered(options):
    ledger = new_ledger(**options)
    ledger.credit(key(1), 5.0)
    ledger.asked(key(1))
    add(ledger, entry(1), entry(2))
    ledger.use(key(1))
    for victim in ledger.victims(entry(3, nbytes=20)):
        ledger.drop(victim)
    assert ghosts(ledger) == {}


def test_only_so_many_are_remembered_those_of_most_uses(monkeypatch):
    monkeypatch.setattr(module, "_AGE_LEAST", 10_000)
    ledger = new_ledger(20, "lfu", ghosts=20)
    for token in range(50):
        ledger.credit(key(token), 2.0 + token % 2)
    kept = ghosts(ledger)
    assert len(kept) == 20
    assert all(token % 2 for token in kept)
    assert kept[49] == 3.0


def test_ghosts_fade_with_the_use_of_others_until_they_are_forgotten():
    ledger = new_ledger(20, "lfu")
    add(ledger, entry(1))
    ledger.credit(key(2), 4.0)
    for _ in range(70):
        ledger.use(key(1))
    assert 0 < ghosts(ledger)[2] <= 2.0
    for _ in range(500):
        ledger.use(key(1))
    assert ghosts(ledger) == {}
    assert uses(ledger)[1] < 200


def test_a_small_tier_forgets_sooner_than_a_large_one():
    left = []
    for entries in (10, 2000):
        ledger = new_ledger(10 * entries, "lfu")
        ledger.add_all(entry(token) for token in range(entries))
        ledger.use(key(0), worth=64.0)
        for _ in range(600):
            ledger.use(key(1))
        left.append(next(known.uses for known in ledger.entries(EVERYTHING) if known.key == key(0)))
    assert left[0] < 1
    assert left[1] >= 32


def test_processes_that_share_a_file_share_what_is_remembered(tmp_path):
    one, other = (new_ledger(20, "lfu", path=tmp_path / "index") for _ in range(2))
    add(one, entry(1), entry(2))
    one.use(key(2))
    one.credit(key(3), 5.0)
    one.close()
    add(other, entry(3))
    assert uses(other) == {2: 1.0, 3: 5.0}
    other.close()


def test_a_file_from_before_there_were_ghosts_is_taken_as_it_is(tmp_path):
    older = new_ledger(20, path=tmp_path / "index")
    older._db.execute("DROP TABLE ghosts")
    older._db.execute("DROP INDEX by_use")
    add(older, entry(1))
    ledger = new_ledger(20, "lfu", path=tmp_path / "index")
    ledger.use(key(1))
    assert uses(ledger) == {1: 1.0}
    older.use(key(1))
    assert [known.uses for known in older.entries(EVERYTHING)] == [2.0]
    older.close()
    ledger.close()


# One file


def test_two_ledgers_on_one_file_see_the_same(tmp_path):
    one, other = (new_ledger(30, path=tmp_path / "index") for _ in range(2))
    add(one, entry(1), entry(2))
    assert key(1) in other
    assert add(other, entry(3)) == []
    one.use(key(1))
    assert list(one.entries(EntryFilter(model="nobody"))) == []  # which writes the use down
    assert add(other, entry(4)) == [2]
    assert held(one) == [1, 3, 4]
    assert one.totals() == other.totals() == (3, 30)
    one.tombstones.add(key(9))
    assert is_deleted(other, entry(9, created=1.0))
    one.close()
    other.close()


def test_what_was_noted_is_written_down_when_it_is_closed(tmp_path):
    ledger = new_ledger(path=tmp_path / "index")
    add(ledger, entry(1))
    ledger.use(key(1))
    ledger.close()
    ledger.close()
    again = new_ledger(path=tmp_path / "index")
    assert [known.uses for known in again.entries(EVERYTHING)] == [1.0]
    again.close()


def test_uses_are_lost_rather_than_waited_for_again_and_again(tmp_path):
    ledger = new_ledger(path=tmp_path / "index")
    ledger._db.execute("PRAGMA busy_timeout=1")
    add(ledger, entry(1))
    writer = sqlite3.connect(tmp_path / "index")
    writer.execute("BEGIN IMMEDIATE")
    for _ in range(1000):
        ledger.use(key(1))
    assert held(ledger) == [1]
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        ledger.add(entry(2))
    writer.rollback()
    writer.close()
    ledger.use(key(1))
    assert next(ledger.entries(EVERYTHING)).uses == 1.0
    ledger.close()


def test_a_file_that_is_none_of_ours_is_an_error(tmp_path):
    (tmp_path / "index").write_bytes(b"not a database" * 100)
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        new_ledger(path=tmp_path / "index")
    with pytest.raises(sqlite3.OperationalError):
        new_ledger(path=tmp_path / "nowhere" / "index")


@pytest.mark.parametrize("options", [{"evict": "fifo"}, {"admit": "none"}])
def test_words_that_it_does_not_know_are_refused(options):
    with pytest.raises(StoreURLError, match=r"evict='fifo' is none of lru, lfu, cost|admit='none' is neither"):
        new_ledger(**options)


# Any sequence of calls

TOKENS = st.integers(0, 9)
TENANTS = st.sampled_from(["", "a", "b"])


class AgainstModel(RuleBasedStateMachine):
    """A ledger, and what must hold of it whatever its order of eviction is: a dict of what was entered."""

    BUDGET, QUOTA = 100, 60
    OPTIONS: dict[str, str] = {}  # noqa: RUF012
    OF = Ledger

    def __init__(self):
        super().__init__()
        self.ledger = self.OF(Budget(self.BUDGET, tenant_bytes=self.QUOTA, **self.OPTIONS))
        self.model: dict[int, tuple[int, str]] = {}
        self.pinned: set[int] = set()

    def of_tenant(self, tenant):
        return sum(nbytes for nbytes, whose in self.model.values() if whose == tenant)

    @rule(token=TOKENS, nbytes=st.integers(1, 110), tenant=TENANTS)
    def put(self, token, nbytes, tenant):
        victims = self.ledger.victims(entry(token, nbytes, tenant=tenant))
        others = {other: size for other, size in self.model.items() if other != token}
        if victims is None:
            stay = [size for other, size in others.items() if other in self.pinned]
            mine = sum(size for size, whose in stay if whose == tenant) if tenant else 0
            too_large = nbytes + sum(size for size, _ in stay) > self.BUDGET or mine + nbytes > self.QUOTA
            assert too_large or "admit" in self.OPTIONS
            return
        gone = tokens(victims)
        assert len(gone) == len(victims)
        assert token not in gone
        assert not self.pinned & set(gone)
        room = nbytes + sum(size for size, _ in others.values())
        over = room > self.BUDGET or (tenant and nbytes + self.of_tenant(tenant) > self.QUOTA)
        assert bool(gone) <= bool(over)  # nothing goes while there is room
        for victim in victims:
            assert self.ledger.drop(victim)
        for victim in gone:
            del self.model[victim]
        self.ledger.add(entry(token, nbytes, tenant=tenant))
        self.model[token] = (nbytes, tenant)

    @rule(token=TOKENS)
    def use(self, token):
        self.ledger.asked(key(token))
        self.ledger.use(key(token))

    @rule(token=TOKENS, worth=st.floats(0, 10))
    def credit(self, token, worth):
        self.ledger.credit(key(token), worth)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data, pinned):
        token = data.draw(st.sampled_from(sorted(self.model)))
        self.ledger.pin(key(token), pinned)
        (self.pinned.add if pinned else self.pinned.discard)(token)

    @rule(token=TOKENS)
    def drop(self, token):
        assert self.ledger.drop(key(token)) == (self.model.pop(token, None) is not None)
        self.pinned.discard(token)

    @invariant()
    def agrees(self):
        entries = {tokens([known.key])[0]: known for known in self.ledger.entries(EVERYTHING)}
        assert {token: (known.nbytes, known.tenant) for token, known in entries.items()} == self.model
        assert {token for token, known in entries.items() if known.pinned} == self.pinned
        assert self.ledger.totals() == (len(self.model), sum(nbytes for nbytes, _ in self.model.values()))
        assert self.ledger.totals()[1] <= self.BUDGET
        assert all(self.of_tenant(tenant) <= self.QUOTA for tenant in "ab")


def machine(of=Ledger, **options):
    name = "AgainstModelOf" + of.__name__ + "".join(options.values())
    case = type(name, (AgainstModel,), {"OPTIONS": options, "OF": of}).TestCase
    case.settings = settings(max_examples=25, stateful_step_count=25)
    return case


TestLru = machine(evict="lru")
TestLruInMemory = machine(of=LRULedger)
TestLfu = machine(evict="lfu")
TestCost = machine(evict="cost")
TestFrequent = machine(evict="lfu", admit="frequent")
