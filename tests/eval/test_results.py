"""Rows outlive interruptions, and rows of different settings never share a file."""

from __future__ import annotations

import json

import pytest

from chunkcache.errors import ResultsError
from chunkcache.eval.results import Results, read_folder

SETTINGS = {"data": "a", "rounds": 1}
RAN_ON = {"cores": 2}


def opened(path, bench="requests", settings=SETTINGS, ran_on=RAN_ON):
    return Results.open(path, bench, settings, ran_on)


def test_rows_are_on_disk_as_soon_as_they_are_added(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    with opened(path) as results:
        results.add({"prompt": 0})
        assert Results.read(path).rows == [{"prompt": 0}]
    assert read_folder(path.parent)["a"].settings == SETTINGS


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path):
    path = tmp_path / "a.jsonl"
    with opened(path) as results:
        results.add({"prompt": 0, "policy": "x"})
        began = results.started
    with opened(path) as results:
        assert results.done(prompt=0, policy="x")
        assert not results.done(prompt=0, policy="y")
        results.add({"prompt": 1, "policy": "x"})
        assert results.started == began
    assert [row["prompt"] for row in Results.read(path).rows] == [0, 1]


def test_a_row_that_was_cut_off_is_measured_again(tmp_path):
    path = tmp_path / "a.jsonl"
    with opened(path) as results:
        results.add({"prompt": 0})
    with path.open("a") as file:
        file.write('{"prompt": 1, "ttft')
    with opened(path) as results:
        assert [row["prompt"] for row in results.rows] == [0]
        results.add({"prompt": 1})
    assert [row["prompt"] for row in Results.read(path).rows] == [0, 1]


def test_a_file_whose_first_line_was_cut_off_is_begun_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"chunkcache_res')
    with opened(path) as results:
        results.add({"prompt": 0})
    assert Results.read(path).rows == [{"prompt": 0}]


def test_another_commit_of_the_same_code_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    opened(path, ran_on={"code": "c0de", "commit": "1"}).close()
    opened(path, ran_on={"code": "c0de", "commit": "2"}).close()
    with pytest.raises(ResultsError, match="code"):
        opened(path, ran_on={"code": "0ther", "commit": "2"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {"data": "a", "rounds": 2}}, "rounds=1"),
        ({"settings": {"data": "a"}}, "rounds=1"),
        ({"ran_on": {"cores": 4}}, "cores=2"),
        ({"bench": "load"}, "requests"),
    ],
)
def test_other_settings_machines_and_measurements_are_refused(tmp_path, change, named):
    path = tmp_path / "a.jsonl"
    opened(path).close()
    before = path.read_bytes()
    with pytest.raises(ResultsError, match=named):
        opened(path, **change)
    assert path.read_bytes() == before


def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "a.jsonl"
    with opened(path), pytest.raises(ResultsError, match="another run"):
        opened(path)
    opened(path).close()


@pytest.mark.parametrize("text", ["", "[]\n", '{"a": 1}\n', "no json\n", '{"chunkcache_results": 99}\n', "\xff\n"])
def test_what_is_no_results_file_is_refused(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ResultsError, match=r"a\.jsonl"):
        Results.read(path)


def test_a_folder_without_results_says_how_to_make_some(tmp_path):
    with pytest.raises(ResultsError, match="bench all"):
        read_folder(tmp_path)


def test_a_number_that_is_none_cannot_get_in(tmp_path):
    with opened(tmp_path / "a.jsonl") as results, pytest.raises(ValueError, match="JSON"):
        results.add({"kl": float("nan")})
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])["bench"] == "requests"
