"""The folder that a whole-checkpoint job writes: shard after shard beside its place, whole there at the end.

.NAME.unfinished/lock            held by the process at work
.NAME.unfinished/manifest.json   what is being made of what, and the finished shards with their sizes and hashes
.NAME.unfinished/files/          becomes NAME
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from peftk.atomic import publish, sync, write_file
from peftk.progress import track
from peftk.streaming.outputs import Error, Output
from peftk.streaming.safetensors_file import Writer, sha256_of
from peftk.streaming.source import INDEX, WEIGHTS

logger = logging.getLogger("peftk")
_ROOM_FOR_THE_REST = 1 << 20  # bytes, beside the shards


@dataclass(frozen=True)
class Shard:
    """A file of the new checkpoint."""

    name: str
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        return _size(self.outputs)


def _size(outputs: Sequence[Output]) -> int:
    return sum(entry.nbytes for output in outputs for entry in output.entries)


def into_shards(groups: Sequence[Sequence[Output]], largest: int | None = None) -> list[Shard]:
    """A file for each group, or, with ``largest``, bytes, files of at most that size; a weight that is larger has its own."""
    if largest is not None:
        groups = _filled([output for group in groups for output in group], largest)
    groups = [group for group in groups if group]
    if len(groups) == 1:
        return [Shard(WEIGHTS, tuple(groups[0]))]
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    return [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def _filled(outputs: Sequence[Output], largest: int) -> list[list[Output]]:
    groups: list[list[Output]] = []
    room = 0
    for output in outputs:
        size = _size([output])
        if size > room or not groups:
            groups.append([])
            room = largest
        groups[-1].append(output)
        room -= size
    return groups


class Busy(ValueError):
    """Another process is at work on the folder."""


class Job:
    """Writes ``shards`` and what ``finish`` adds to ``out``, a new folder that appears whole.

    ``facts``, JSON: which inputs and settings these are. A killed job goes on with ``resume``, where they are the same: shards
    that the manifest knows and whose bytes are still those are kept. ``finish(folder, errors)`` writes the other files.
    """

    def __init__(
        self,
        out: Path,
        shards: Sequence[Shard],
        facts: dict[str, Any],
        finish: Callable[[Path, list[Error]], None],
        resume: bool = False,
    ):
        self.out, self.shards, self.facts, self.finish, self.resume = out, list(shards), facts, finish, resume
        self.work = _work_of(out)
        self.files, self.manifest = self.work / "files", self.work / "manifest.json"
        self._done: dict[str, dict[str, Any]] = {}

    def run(self, description: str, progress: bool = True) -> list[Error]:
        """The errors of all layers, in the order of the shards. ValueError: the folder holds something, or an unfinished job that
        is not to be resumed or is another one; Busy; OSError for a full disk, before anything is written where that can be told.
        With an error the folder isn't there, and finished shards stay for ``resume``."""
        check_free(self.out, self.resume)
        with self._locked():
            check_free(self.out, self.resume)
            self._done = self._kept()
            if _is_published(self.out):  # and killed after that
                shutil.rmtree(self.work, ignore_errors=True)
                return self._errors()
            try:
                self._clean()
                self._check_space()
                for shard, outputs in groupby(track(self._missing(), description, progress), key=lambda pair: pair[0]):
                    self._write(shard, (output for _, output in outputs))
            except BaseException:
                if not self._done:
                    shutil.rmtree(self.work, ignore_errors=True)
                raise
            self._write_index()
            self.finish(self.files, self._errors())
            publish(self.files, self.out)
            shutil.rmtree(self.work, ignore_errors=True)
        return self._errors()

    def _errors(self) -> list[Error]:
        rows = (row for shard in self.shards for row in self._done[shard.name]["errors"])
        return [Error(**{**row, "shape": tuple(row["shape"])}) for row in rows]

    def _missing(self) -> list[tuple[Shard, Output]]:
        return [(shard, output) for shard in self.shards if shard.name not in self._done for output in shard.outputs]

    def _write(self, shard: Shard, outputs: Iterator[Output]) -> None:
        """One file: whole under its name, then in the manifest."""
        path = self.files / shard.name
        temporary = path.with_suffix(".tmp")
        try:
            file = Writer(temporary, [entry for output in shard.outputs for entry in output.entries])
            try:
                errors = [error for output in outputs if (error := output.write(file)) is not None]
                file.finish()
            finally:
                file.close()
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        facts = {"size": temporary.stat().st_size, "sha256": sha256_of(temporary)}
        os.replace(temporary, path)
        sync(self.files)
        self._done[shard.name] = {**facts, "errors": [asdict(error) for error in errors]}
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_file(self.manifest, json.dumps({"facts": self.facts, "shards": self._done}, indent=1).encode())

    def _write_index(self) -> None:
        if [shard.name for shard in self.shards] == [WEIGHTS]:
            return
        places = {entry.name: shard.name for shard in self.shards for output in shard.outputs for entry in output.entries}
        total = sum((self.files / shard.name).stat().st_size for shard in self.shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_file(self.files / INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def _kept(self) -> dict[str, dict[str, Any]]:
        """The finished shards of the job before, their bytes verified; the manifest is this job's from now on."""
        if not self.manifest.is_file():
            self.files.mkdir(exist_ok=True)
            self._write_manifest()
            return {}
        if not self.resume:
            raise ValueError(f"{self.work} holds an unfinished job: go on with it by --resume, or delete that folder")
        before = json.loads(self.manifest.read_text(encoding="utf-8"))
        _check_same(before["facts"], json.loads(json.dumps(self.facts)), self.work)
        if _is_published(self.out):
            return before["shards"]
        kept = {name: entry for name, entry in before["shards"].items() if self._is_whole(name, entry)}
        logger.info("%s: %d of %d shards are there already", self.out, len(kept), len(self.shards))
        return kept

    def _is_whole(self, name: str, entry: dict[str, Any]) -> bool:
        path = self.files / name
        if path.is_file() and path.stat().st_size == entry["size"] and sha256_of(path) == entry["sha256"]:
            return True
        logger.warning("%s: not the bytes that were written there; it is made again", path)
        return False

    def _clean(self) -> None:
        """Nothing of a killed job but its finished shards stays."""
        self.files.mkdir(exist_ok=True)
        known = {self.work / "lock", self.manifest, self.files}
        for path in [*self.work.iterdir(), *self.files.iterdir()]:
            if path in known or path.name in self._done and path.parent == self.files:
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _check_space(self) -> None:
        needed = sum(shard.nbytes for shard in self.shards if shard.name not in self._done) + _ROOM_FOR_THE_REST
        free = shutil.disk_usage(self.work).free
        if needed > free:
            raise OSError(f"{self.out}: needs {needed / 1e9:.3f} GB more, {free / 1e9:.3f} GB are free there")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """This process alone is at work here; a killed one's lock is gone with it. Busy where another holds it."""
        import fcntl

        self.work.mkdir(parents=True, exist_ok=True)
        with open(self.work / "lock", "a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise Busy(f"{self.out}: another run, process {lock.read().strip() or 'unknown'}, is at work there") from None
            if not _is_still(lock.fileno(), self.work / "lock"):
                raise Busy(f"{self.out}: another run has just finished there")
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            try:
                yield
            finally:
                if not self.manifest.is_file():
                    shutil.rmtree(self.work, ignore_errors=True)


def _is_still(handle: int, path: Path) -> bool:
    """Whether the file that is open is the one that has this name."""
    return path.exists() and os.path.samestat(os.fstat(handle), path.stat())


def check_free(out: Path, resume: bool = False) -> None:
    """ValueError unless ``out`` is a name for a new folder, or an empty one; ``resume``: or what a job was killed right after."""
    if resume and _is_published(out):
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a new folder, this one holds something")


def _is_published(out: Path) -> bool:
    """Whether a job has made ``out``, and nothing after that."""
    work = _work_of(out)
    return out.is_dir() and any(out.iterdir()) and (work / "manifest.json").is_file() and not (work / "files").exists()


def _work_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.unfinished")


def _check_same(before: dict[str, Any], now: dict[str, Any], work: Path) -> None:
    changed = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    if changed:
        told = "; ".join(f"{name} was {_short(before.get(name))}, now {_short(now.get(name))}" for name in changed)
        raise ValueError(f"the job in {work} is another one: {told}. Delete that folder to start anew")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
