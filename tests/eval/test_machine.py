"""What rows ran on: the same source has one checksum wherever it lies, and a commit only where one tracks it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from chunkcache.eval.machine import PACKAGE, code, commit


@pytest.fixture
def installed(tmp_path):
    """A copy of the package as a wheel has it: with folders where a checkout has links."""
    shutil.copytree(PACKAGE, tmp_path / "chunkcache", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return tmp_path / "chunkcache"


def git(folder, *command):
    who = ("-c", "user.name=n", "-c", "user.email=n@example.org")
    subprocess.run(["git", "-C", str(folder), *who, *command], check=True, capture_output=True)


def test_an_installed_copy_has_the_checksum_of_the_checkout(installed):
    assert not (installed / "store").is_symlink()
    assert code(installed) == code()


def test_a_module_that_is_changed_renamed_or_added_changes_the_checksum(installed):
    before = code(installed)
    (installed / "store" / "new.py").write_text("")
    added = code(installed)
    (installed / "store" / "new.py").rename(installed / "store" / "newer.py")
    renamed = code(installed)
    (installed / "store" / "newer.py").write_text("1")
    assert len({before, added, renamed, code(installed)}) == 4


def test_a_folder_that_is_linked_twice_counts_once(tmp_path):
    for name in ("package", "room"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text(name)
    (tmp_path / "package" / "a").symlink_to("../room")
    once = code(tmp_path / "package")
    (tmp_path / "package" / "b").symlink_to("../room")
    assert code(tmp_path / "package") == once


def test_a_repository_round_an_installed_copy_does_not_lend_its_commit(installed, tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "other.txt").write_text("")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "-qm", "of another project")
    assert commit(installed) is None


def test_a_checkout_has_its_commit_and_a_mark_where_a_linked_folder_was_changed(tmp_path):
    for name in ("package", "room"):
        (tmp_path / name).mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "room" / "module.py").write_text("")
    (tmp_path / "package" / "room").symlink_to("../room")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    clean = commit(tmp_path / "package")
    assert clean is not None
    assert len(clean) == 10
    (tmp_path / "room" / "module.py").write_text("1")
    assert commit(tmp_path / "package") == f"{clean}+"
