"""The check for a GPU: its report, its time, and its sections on the CPU and on the pretend device."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pretend import PretendDevice

from chunkcache.eval.gpu import main as gpu
from chunkcache.eval.gpu.check import Check, Options, described, relative_error
from chunkcache.eval.gpu.made import make_model, make_texts, make_tokenizer
from chunkcache.eval.gpu.memory import memory
from chunkcache.eval.gpu.report import Report
from chunkcache.eval.gpu.ttft import ttft


def check_of(tmp_path: Path, **options: Any) -> Check:
    return Check(Options(smoke=True, out=tmp_path / "check.json", **{"device": "cpu", **options}))


def section(monkeypatch: pytest.MonkeyPatch, run: Any, share: float = 10.0, name: str = "kernels") -> None:
    monkeypatch.setitem(gpu.SECTIONS, name, gpu.Section(run, share))


def test_the_report_has_a_table_for_each_title_and_lists_what_is_wrong(tmp_path: Path) -> None:
    report = Report(tmp_path / "check.json")
    report.row("Times", way="a|b", ms=1234.5)
    report.row("Times", way="c", ms=0.12345, more=None)
    report.add_wrong("another answer")
    report.add_left_out("the rest")
    assert report.markdown() == (
        "## Times\n\n| way | ms | more |\n| --- | --- | --- |\n| a\\|b | 1234 |  |\n| c | 0.123 | n/a |\n\n"
        "## Wrong\n\n- another answer\n\n## Left out for lack of time\n\n- the rest"
    )
    report.write()
    assert json.loads(report.path.read_text()) == report.as_dict()


def test_what_a_section_found_is_on_file_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "check.json"
    section(monkeypatch, lambda check: check.report.row("First", value=1), name="kernels")
    section(monkeypatch, lambda check: found.append(json.loads(path.read_text())["tables"]), name="memory")
    found: list[Any] = []
    gpu.run(Options(smoke=True, device="cpu", out=path), ["kernels", "memory"])
    assert found == [{"First": [{"value": 1}]}]


def test_a_section_that_takes_too_long_is_broken_off_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(check: Check) -> None:
        check.report.row("Before", value=1)
        with check.step("endless"):
            while True:
                time.sleep(0.01)

    section(monkeypatch, endless, share=0.1, name="kernels")
    section(monkeypatch, lambda check: check.report.row("After", value=1), share=10.0, name="memory")
    check = gpu.run(Options(device="cpu", budget=10.1, out=tmp_path / "check.json"), ["kernels", "memory"])
    assert list(check.report.tables) == ["Before", "After"]
    assert check.report.left_out == ["the rest of section kernels, which was broken off"]


def test_what_there_is_no_time_for_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section(monkeypatch, lambda check: check.report.row("Ran", value=check.has(9, "the long part")), name="kernels")
    check = gpu.run(Options(device="cpu", budget=8.0, out=tmp_path / "check.json"), ["kernels"])
    assert check.report.left_out == ["the long part"]
    check = gpu.run(Options(device="cpu", budget=1.0, out=tmp_path / "check.json"), ["kernels"])
    assert check.report.left_out == ["section kernels"]


def test_a_wrong_result_fails_the_check_and_a_problem_only_the_smoke_run(tmp_path: Path) -> None:
    check = check_of(tmp_path)
    assert not gpu.failed(check)
    with check.step("a part"):
        raise ValueError("no such kernel\nand more")
    assert check.report.problems == ["a part: ValueError: no such kernel"]
    assert gpu.failed(check)
    large = Check(Options(device="cpu", out=tmp_path / "check.json"))
    large.report.add_problem("one")
    assert not gpu.failed(large)
    large.report.add_wrong("another")
    assert gpu.failed(large)


def test_an_error_is_described_with_the_line_of_the_package_it_came_through() -> None:
    with pytest.raises(KeyError) as caught:
        make_model("9b", torch.float32)
    assert described(caught.value).startswith("KeyError: '9b' at gpu/made.py:")


def test_made_models_are_the_same_each_time_and_texts_have_about_the_tokens_asked_for() -> None:
    one, two = (make_model("toy", torch.float32) for _ in range(2))
    ids = torch.arange(8)[None]
    assert torch.equal(one(ids).logits, two(ids).logits)
    assert all(parameter.isfinite().all() for parameter in make_model("small", torch.float32).parameters())
    lengths = [len(make_tokenizer()(text).input_ids) for text in make_texts(3, 0, 200)]
    assert all(190 <= length <= 215 for length in lengths)


def test_relative_error_is_of_the_whole_tensor() -> None:
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)


def test_the_command_runs_some_sections_and_prints_tables(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = CliRunner().invoke(gpu.main, ["--smoke", "--only", "environment,kernels", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "| at once |" in done.output
    assert set(json.loads(out.read_text())["seconds"]) == {"environment", "kernels"}
    refused = CliRunner().invoke(gpu.main, ["--only", "speed"])
    assert refused.exit_code == 2
    assert "there are environment, exactness" in refused.output


def test_what_runs_on_a_gpu_alone_runs_on_the_pretend_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with PretendDevice() as device:
        check = check_of(tmp_path, device="cuda:0")
        check.counts = (2,)
        monkeypatch.setattr("chunkcache.eval.gpu.ttft.POLICIES", ("query",))
        monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.current": 0}, raising=False)
        ttft(check)
        memory(check)
        assert not device.total.violations
    assert check.report.wrong == check.report.problems == []
    assert {row["kernels"] for row in check.report.tables["Time to first token, ms"]} == {"default", "no cuDNN"}
