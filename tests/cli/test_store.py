"""`chunkcache store` as a user meets it: what it prints where, its exit codes, and what it does to the store."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from io import StringIO

import pytest
from support.store import key, kv

from chunkcache.cli import main as cli
from chunkcache.cli.console import size_text, span_text
from chunkcache.cli.store import parse_span
from chunkcache.errors import InputError
from chunkcache.kv import hashed_label
from chunkcache.store import Budget, DiskStore

A, B = hashed_label("document", "a.md"), hashed_label("document", "b.md")
ACME = hashed_label("tenant", "acme")
DAY = 86400.0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A store of four entries: three of one model, of which one is a tenant's, and one of another model."""
    path = tmp_path / "kv"
    now = time.time()
    with DiskStore(str(path), sync="no") as store:
        store.put(key(1), kv(1, model="a" * 64, documents=(A,), created=now - 40 * DAY))
        store.put(key(2), kv(2, 2, model="a" * 64, documents=(A, B), created=now - 2 * DAY))
        store.put(key(3), kv(3, 3, 3, model="a" * 64, tenant=ACME, created=now - DAY))
        store.put(key(4), kv(4, 4, 4, 4, model="b" * 64, created=now))
        for _ in range(3):
            store.get(key(2), (2, 2))
        store.pin(key(3))
    monkeypatch.setenv("CHUNKCACHE_STORE", f"disk://{path}?sync=no")
    return path


@pytest.fixture
def run(command_line):
    """Run `chunkcache store`; returns exit code, stdout and stderr."""
    return lambda *args: command_line("store", *map(str, args))


def held(folder):
    with DiskStore(str(folder), sync="no") as store:
        return {entry.key for entry in store.entries()}


def listed(run, *args):
    code, out, _ = run("ls", "--json", *args)
    assert code == 0
    return [entry["key"] for entry in json.loads(out)["entries"]]


def damage(folder, digest):
    path = folder / digest[:2] / f"{digest}.ckv"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_store_must_be_named(run, monkeypatch):
    monkeypatch.delenv("CHUNKCACHE_STORE", raising=False)
    code, out, err = run("stats")
    assert (code, out) == (2, "")
    assert "--store" in err


def test_the_option_comes_before_the_environment(run, folder, tmp_path):
    code, out, _ = run("stats", "--store", f"disk://{tmp_path / 'other'}", "--json")
    assert code == 0
    assert json.loads(out)["tiers"]["disk"]["entries"] == 0


def test_stats_say_what_each_tier_holds_and_what_is_known_of_its_use(run, folder):
    code, out, _ = run("stats", "--json", "--store", f"tiered:memory://|disk://{folder}?max_bytes=1MiB")
    tiers = json.loads(out)["tiers"]
    assert code == 0
    assert list(tiers) == ["memory", "disk"]
    assert tiers["memory"]["entries"] == 0
    disk = tiers["disk"]
    assert (disk["entries"], disk["bytes"], disk["budget"]) == (4, 10 * 16, 2**20)
    assert (disk["models"], disk["tenants"], disk["pinned"]) == (2, 1, 1)
    assert (disk["entries_used"], disk["uses"]) == (1, 3)
    assert (disk["hits"], disk["misses"], disk["hit_rate"]) == (0, 0, None)
    assert 0 <= disk["newest_age_s"] < DAY < disk["oldest_age_s"] < 41 * DAY
    code, out, _ = run("stats")
    assert "160 B" in out
    assert "40d" in out
    assert "none" in out


def test_ls_lists_in_the_order_asked_for(run, folder):
    one, two, three, four = (k.digest for k in (key(1), key(2), key(3), key(4)))
    assert listed(run, "--sort", "age") == [one, two, three, four]
    assert listed(run, "--sort", "size") == [four, three, two, one]
    assert listed(run, "--sort", "uses")[0] == two
    assert listed(run)[0] == two
    assert listed(run, "--sort", "age", "--limit", "2") == [one, two]


@pytest.mark.parametrize(
    ("args", "numbers"),
    [
        (["--document", "a.md"], [1, 2]),
        (["--document", "b.md"], [2]),
        (["--document", "c.md"], []),
        (["--tenant", "acme"], [3]),
        (["--model", "b" * 64], [4]),
        (["--model", "a"], [1, 2, 3]),
        (["--model", "A", "--tenant", "acme"], [3]),
    ],
)
def test_ls_lists_what_is_asked_for(run, folder, args, numbers):
    assert set(listed(run, *args)) == {key(number).digest for number in numbers}


def test_ls_is_a_table_for_people(run, folder):
    code, out, _ = run("ls", "--limit", "3")
    assert code == 0
    assert "4 entries, 160 B; the first 3" in out
    assert all(column in out for column in ("tokens", "model", "tenant", "docs", "uses", "pinned"))
    assert "TTL" not in out  # no entry has one
    code, out, _ = run("ls", "--full")
    assert all(k.digest in out for k in (key(1), key(2), key(3), key(4)))
    assert "a" * 64 in out


def test_ls_names_the_tiers_and_the_time_left(run, tmp_path):
    with DiskStore(str(tmp_path), Budget(ttl=5 * DAY + 60), sync="no") as store:
        store.put(key(1), kv(1))
    code, out, _ = run("ls", "--store", f"tiered:memory://|disk://{tmp_path}")
    assert code == 0
    assert "5d" in out
    assert "disk" in out
    _, out, _ = run("ls", "--json", "--store", f"disk://{tmp_path}")
    [entry] = json.loads(out)["entries"]
    assert entry["tiers"] == ["disk"]
    assert entry["expires"] > time.time()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["ls", "--model", "c"], "no entry of the store has the model 'c'"),
        (["ls", "--model", ""], "no entry of the store has the model ''"),
        (["purge", "--key", "zz", "--yes"], "no entry of the store has the key 'zz'"),
        (["purge"], "nothing says what to delete"),
        (["purge", "--all", "--document", "a.md"], "contradicts itself"),
        (["purge", "--older-than", "soon"], "'soon' is no span of time"),
        (["purge", "--all"], "would delete 4 entries (160 B) from disk: pass --yes"),
        (["import", "/nowhere/x.tar"], "/nowhere/x.tar cannot be read"),
        (["export", "/nowhere/x.tar"], "/nowhere/x.tar cannot be written"),
        (["export", "-", "--json"], "both write to stdout"),
        (["warm", "/nowhere"], "no document at '/nowhere'"),
        (["warm", ".", "--policy", "nope"], "no policy is called 'nope'"),
        (["warm", ".", "--workers", "2"], "need --ray ADDRESS"),
        (["warm", ".", "--store", "memory://"], "is gone when this ends"),
        (["import", "x.tar", "--store", "memory://"], "is gone when this ends"),
        (["stats", "--store", "nope://"], "no store has the URL 'nope://'"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(run, folder, args, reason):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    [line] = err.strip().splitlines()
    assert line.startswith("error: ")
    assert reason in line
    assert len(held(folder)) == 4


def test_a_model_that_two_fit_has_to_be_given_in_full(run, tmp_path):
    with DiskStore(str(tmp_path), sync="no") as store:
        store.put(key(1), kv(1, model="ab" * 32))
        store.put(key(2), kv(2, model="ac" * 32))
    code, _, err = run("ls", "--store", f"disk://{tmp_path}", "--model", "a")
    assert code == 2
    assert "'a' fits 2 of them" in err


def test_verify_deletes_what_is_damaged_and_says_so(run, folder):
    assert run("verify")[0] == 0
    damage(folder, key(2).digest)
    code, out, err = run("verify", "--json")
    disk = json.loads(out)["tiers"]["disk"]
    assert code == 1
    assert (disk["entries"], disk["intact"], disk["damaged"], disk["gone"], disk["unreadable"]) == (4, 3, 1, 0, 0)
    assert "1 entries were damaged, and are deleted" in err
    assert held(folder) == {key(1), key(3), key(4)}
    code, out, _ = run("verify")
    assert code == 0
    assert "intact" in out


def test_verify_finds_a_broken_header_and_a_file_that_is_gone(run, folder):
    path = folder / key(1).digest[:2] / f"{key(1).digest}.ckv"
    path.write_bytes(b"x" * 200)
    (folder / key(4).digest[:2] / f"{key(4).digest}.ckv").unlink()
    code, out, _ = run("verify", "--json")
    disk = json.loads(out)["tiers"]["disk"]
    assert code == 1
    assert (disk["intact"], disk["damaged"]) == (2, 1)
    assert held(folder) == {key(2), key(3)}


def test_verify_only_part_of_it(run, folder):
    damage(folder, key(2).digest)
    code, out, _ = run("verify", "--json", "--tenant", "acme")
    assert code == 0
    assert json.loads(out)["tiers"]["disk"]["entries"] == 1


@pytest.mark.parametrize(
    ("args", "left"),
    [
        (["--document", "a.md"], [3, 4]),
        (["--tenant", "acme"], [1, 2, 4]),
        (["--model", "b"], [1, 2, 3]),
        (["--older-than", "30d"], [2, 3, 4]),
        (["--older-than", "36h", "--document", "b.md"], [1, 3, 4]),
        (["--key", key(2).digest[:12], "--key", key(3).digest], [1, 4]),
        (["--key", key(3).digest, "--document", "a.md"], [1, 2, 3, 4]),
        (["--document", "c.md"], [1, 2, 3, 4]),
        (["--all"], []),
    ],
)
def test_purge_deletes_what_is_asked_for_and_nothing_else(run, folder, args, left):
    code, out, _ = run("purge", "--yes", "--json", *args)
    assert code == 0
    assert json.loads(out) == {"deleted": {"disk": 4 - len(left)}}
    assert held(folder) == {key(number) for number in left}


def test_purge_says_what_went_from_which_tier(run, folder):
    code, out, _ = run("purge", "--yes", "--all", "--store", f"tiered:memory://|disk://{folder}")
    assert code == 0
    assert out == "deleted: 0 in memory, 4 in disk\n"


class Terminal(StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, 2), ("n\n", 1, 4), ("\n", 1, 4)])
def test_purge_asks_on_a_terminal(run, folder, monkeypatch, answer, code, left):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert run("purge", "--document", "a.md")[0] == code
    assert len(held(folder)) == left


def test_purge_fails_if_the_tier_is_in_trouble(run, folder):
    (folder / key(1).digest[:2] / f"{key(1).digest}.ckv").unlink()
    (folder / key(1).digest[:2] / f"{key(1).digest}.ckv").mkdir()  # cannot be unlinked
    code, _, err = run("purge", "--yes", "--all")
    assert code == 1
    assert "the disk tier is in trouble" in err


def test_export_and_import(run, folder, tmp_path):
    file, other = tmp_path / "x.tar", f"disk://{tmp_path / 'other'}"
    code, out, err = run("export", file)
    assert (code, out) == (0, "")
    assert "exported 4 entries" in err
    with tarfile.open(file) as tar:
        assert len(tar.getnames()) == 4
    code, out, _ = run("import", file, "--store", other, "--json")
    assert code == 0
    assert json.loads(out)["entries"] == 4
    assert held(tmp_path / "other") == held(folder)
    code, out, _ = run("export", tmp_path / "a.tar", "--document", "a.md", "--json")
    assert (code, json.loads(out)["entries"]) == (0, 2)
    assert not list(tmp_path.glob("*.partial"))


def test_export_and_import_through_a_pipe(folder, tmp_path, monkeypatch, capsysbinary):
    monkeypatch.setattr(sys, "argv", ["chunkcache", "store", "export", "-"])
    with pytest.raises(SystemExit):
        cli.main()
    data = capsysbinary.readouterr().out
    file = tmp_path / "x.tar"
    file.write_bytes(data)
    with file.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(
            sys, "argv", ["chunkcache", "store", "import", "-", "--store", f"disk://{tmp_path / 'o'}"]
        )
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert not left.value.code
    assert len(held(tmp_path / "o")) == 4


def test_what_is_not_whole_is_exit_code_1(run, folder, tmp_path):
    file = tmp_path / "x.tar"
    damage(folder, key(2).digest)
    code, _, err = run("export", file)
    assert code == 1
    assert "1 entries could not be read" in err
    data = bytearray(file.read_bytes())
    data[512 + 100] ^= 1
    file.write_bytes(data)
    code, _, err = run("import", file, "--store", f"disk://{tmp_path / 'o'}")
    assert code == 1
    assert "1 entries of the file are damaged" in err
    assert len(held(tmp_path / "o")) == 2
    file.write_bytes(data[: len(data) // 2])
    assert run("import", file, "--store", f"disk://{tmp_path / 'p'}")[0] == 1


def test_what_was_deleted_does_not_come_back_by_import(run, folder, tmp_path):
    file = tmp_path / "x.tar"
    run("export", file)
    run("purge", "--all", "--yes")
    code, _, err = run("import", file)
    assert code == 1
    assert "they were deleted from it" in err
    assert held(folder) == set()


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 30 * DAY), ("12h", 43200), ("1.5m", 90), (" 45 s ", 45), ("2w", 14 * DAY)]
)
def test_a_span_of_time(text, seconds):
    assert parse_span(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-3d", "3 days", "1e9d"])
def test_what_is_no_span_of_time(text):
    with pytest.raises(InputError, match="is no span of time"):
        parse_span(text)


def test_sizes_and_spans_as_people_read_them():
    assert [size_text(n) for n in (0, 1023, 1536, 3 * 2**30, 2**50)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
        "1024.0 TiB",
    ]
    assert [span_text(s) for s in (-1, 59.9, 3599, 7200, 90000)] == ["0s", "59s", "59m", "2h", "1d"]


def test_help_needs_no_torch():
    body = (
        "import sys; from chunkcache.cli.main import cli; cli.main(['store', 'warm', '-h'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", body], check=True, stdout=subprocess.DEVNULL)
