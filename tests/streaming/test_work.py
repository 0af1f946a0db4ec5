"""The folder: whole at the end, one run at a time, resumed where a run stopped, refused where it is another one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from streaming.conftest import weight

from peftk.streaming import safetensors_file, work
from peftk.streaming.outputs import Cast, Copied, Quantised
from peftk.streaming.source import from_tensors
from peftk.streaming.values import FileValues
from peftk.streaming.work import Busy, Job, into_shards


def outputs(count: int = 3):
    """A file each."""
    tensors = {f"l{i}.weight": weight(8, 64, seed=i) for i in range(count)}
    return [[Quantised(key, FileValues(t), torch.float32)] for key, t in from_tensors(tensors).items()]


def job(out: Path, facts: dict | None = None, finish=lambda folder, errors: (folder / "config.json").write_text("{}"), **more):
    return Job(out, into_shards(outputs()), facts or {"block": 64}, finish, **more)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Killed(BaseException):
    pass


def stop_at(monkeypatch, name: str, call: int) -> None:
    """As if the process died in its ``call``-th call of a function of ``work``: nothing after it is done, no cleaning up."""
    plain, calls = getattr(work, name), []

    def replaced(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return plain(*arguments)

    monkeypatch.setattr(work, name, replaced)


def test_a_folder_appears_whole(tmp_path):
    errors = job(tmp_path / "out").run("x", progress=False)
    assert [e.layer for e in errors] == ["l0", "l1", "l2"] and [p.name for p in tmp_path.iterdir()] == ["out"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    places = index["weight_map"]
    assert set(places.values()) == {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    for file in set(places.values()):
        assert {key for key, name in places.items() if name == file} == set(load_file(tmp_path / "out" / file))


@pytest.mark.parametrize(("function", "call"), [("sha256_of", 2), ("write_file", 3), ("write_file", 5), ("publish", 1)])
def test_a_stopped_run_goes_on(tmp_path, monkeypatch, function, call):
    """The same bytes and errors; finished files are not made again."""
    expected = job(tmp_path / "a").run("x", progress=False)
    stop_at(monkeypatch, function, call)
    with pytest.raises(Killed):
        job(tmp_path / "b").run("x", progress=False)
    monkeypatch.undo()
    assert not (tmp_path / "b").exists()
    (tmp_path / ".b.unfinished" / "files" / "stray.tmp").write_text("left by the killed run")
    with pytest.raises(ValueError, match="holds an unfinished job: go on with it by --resume"):
        job(tmp_path / "b").run("x", progress=False)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".b.unfinished" / "files").glob("*.safetensors")}
    done = json.loads((tmp_path / ".b.unfinished" / "manifest.json").read_text())["shards"]
    assert job(tmp_path / "b", resume=True).run("x", progress=False) == expected
    assert tree(tmp_path / "b") == tree(tmp_path / "a") and len(list(tmp_path.iterdir())) == 2
    assert done and all((tmp_path / "b" / name).stat().st_mtime_ns == before[name] for name in done)


def test_killed_right_after_the_folder_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(work.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        job(tmp_path / "out").run("x", progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="expected a new folder"):
        job(tmp_path / "out").run("x", progress=False)
    assert len(job(tmp_path / "out", resume=True).run("x", progress=False)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, 100), lambda p: p.write_bytes(b"x" * p.stat().st_size), Path.unlink])
def test_a_damaged_file_is_made_again(tmp_path, monkeypatch, damage, caplog):
    job(tmp_path / "a").run("x", progress=False)
    stop_at(monkeypatch, "publish", 1)
    with pytest.raises(Killed):
        job(tmp_path / "b").run("x", progress=False)
    monkeypatch.undo()
    damage(tmp_path / ".b.unfinished" / "files" / "model-00002-of-00003.safetensors")
    job(tmp_path / "b", resume=True).run("x", progress=False)
    assert tree(tmp_path / "b") == tree(tmp_path / "a")
    assert "model-00002-of-00003.safetensors: not the bytes that were written there" in caplog.text


def test_another_job_is_refused(tmp_path, monkeypatch):
    stop_at(monkeypatch, "publish", 1)
    with pytest.raises(Killed):
        job(tmp_path / "out").run("x", progress=False)
    monkeypatch.undo()
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="is another one: block was 64, now 128. Delete that folder to start anew"):
        job(tmp_path / "out", {"block": 128}, resume=True).run("x", progress=False)
    assert tree(tmp_path).keys() == before.keys()


def test_two_runs_on_one_folder(tmp_path):
    def second(folder, errors):
        with pytest.raises(Busy, match=rf"out: another run, process {os.getpid()}, is at work there"):
            job(tmp_path / "out", resume=True).run("x", progress=False)

    assert len(job(tmp_path / "out", finish=second).run("x", progress=False)) == 3


def test_a_lock_of_a_finished_run_is_no_lock(tmp_path, monkeypatch):
    """The folder that held it is gone between opening and locking."""
    plain = fcntl.flock

    def late(handle, flags):
        work.shutil.rmtree(tmp_path / ".out.unfinished")
        plain(handle, flags)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(Busy, match="another run has just finished there"):
        job(tmp_path / "out").run("x", progress=False)


def test_a_full_disk_shows_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(work.shutil, "disk_usage", lambda _: work.shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match=r"out: needs 0.001 GB more, 0.000 GB are free there"):
        job(tmp_path / "out").run("x", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path, monkeypatch):
    job(tmp_path / "a").run("x", progress=False)
    plain, calls = os.posix_fallocate, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*arguments)

    monkeypatch.setattr(safetensors_file.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        job(tmp_path / "b").run("x", progress=False)
    monkeypatch.undo()
    assert not (tmp_path / "b").exists()
    left = sorted(p.name for p in (tmp_path / ".b.unfinished" / "files").iterdir())
    assert left == ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"]
    job(tmp_path / "b", resume=True).run("x", progress=False)
    assert tree(tmp_path / "b") == tree(tmp_path / "a")


def test_an_error_in_the_first_file_leaves_nothing(tmp_path):
    w = weight(8, 64)
    w[0, 0] = torch.inf
    shards = into_shards([[Quantised("a.weight", FileValues(from_tensors({"w": w})["w"]), w.dtype)]])
    with pytest.raises(ValueError, match="a.weight: expected finite values"):
        Job(tmp_path / "out", shards, {}, lambda *_: None).run("x", progress=False)
    assert not list(tmp_path.iterdir())


def test_sizes_of_files():
    tensors = from_tensors(
        {name: torch.zeros(size, dtype=torch.uint8) for name, size in {"a": 60, "b": 50, "c": 40, "d": 300}.items()}
    )
    groups = [[Copied(name, tensor) for name, tensor in tensors.items()]]
    shards = into_shards(groups, largest=100)
    assert [[o.key for o in shard.outputs] for shard in shards] == [["a"], ["b", "c"], ["d"]]
    assert [shard.name for shard in into_shards(groups)] == ["model.safetensors"]
    assert into_shards([[], groups[0]], None)[0].nbytes == 450
    assert Cast("x", FileValues(tensors["a"]), torch.float32).entries[0].nbytes == 240
