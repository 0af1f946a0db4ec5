"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from peftk.atomic import remove_unfinished, write_file, write_folder


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "f"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_failed_file_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_file(path, b"one")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_file(path, b"two")
    assert path.read_bytes() == b"one" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_appears_at_the_end(tmp_path):
    path = tmp_path / "deep" / "d"
    with write_folder(path) as folder:
        (folder / "x").write_text("1")
        assert not path.exists()
    assert (path / "x").read_text() == "1" and len(list(path.parent.iterdir())) == 1


def test_an_exception_leaves_the_old_folder(tmp_path):
    path = tmp_path / "d"
    with write_folder(path) as folder:
        (folder / "x").write_text("old")
    with pytest.raises(KeyError), write_folder(path) as folder:
        (folder / "x").write_text("new")
        raise KeyError
    assert (path / "x").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["d"]


def test_killed_while_writing(tmp_path):
    """SIGKILL at any moment: the folder that a reader finds is an old or a new one, never a mixture or nothing."""
    code = f"""
import sys
from peftk.atomic import write_folder
print("go", flush=True)
for i in range(100000):
    with write_folder({str(tmp_path / "d")!r}) as folder:
        (folder / "a").write_text(str(i))
        (folder / "b").write_text(str(i))
"""
    for delay in (0.01, 0.05, 0.1):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        while not (tmp_path / "d").exists():
            pass
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "d" / "a").read_text() == (tmp_path / "d" / "b").read_text() != ""


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path):
    for name in (".a.json.0123abcd.tmp", ".a.json.other.tmp", ".b.json.0123abcd.tmp", "a.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".a.json.89abcdef.tmp").mkdir()
    remove_unfinished(tmp_path / "a.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.json.other.tmp", ".b.json.0123abcd.tmp", "a.json"]
