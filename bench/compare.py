"""`python -m bench --compare COMMIT`: the package as it stands here beside another commit of it, by the same benches.

The other commit is checked out into a temporary folder and its kernels are built there. Then child processes take turns, here,
there, here, there …: each runs the benches of this checkout, ours only, on one of the two packages. A row's ratio is the median
over the turns of there/here, its spread the least and the largest of them. It is slower, or faster, beyond the noise where the
slowest process of one side was still faster than the fastest of the other, and the medians lie more than LEAST apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import report
from peftk.progress import track, write

LEAST = 0.03  # of the time; below that the layout of code and memory decides
ROUNDS = 5  # processes a side: of two equal sides, 1 row in 126 then lies apart by chance, before LEAST
HERE, THERE = "here", "there"
Key = tuple[str, str, str]  # bench, case, who
Times = dict[Key, list[float]]  # ms, or MB where memory is measured; one a process


@dataclass(frozen=True)
class Compared:
    """A row of both sides."""

    key: Key
    here: float
    there: float
    ratio: float  # there / here: how many times as fast, or as small, it is here
    low: float
    high: float
    apart: bool  # beyond the noise

    @property
    def verdict(self) -> str:
        if not self.apart:
            return "same"
        return "SLOWER" if self.ratio < 1 else "faster"


def compare(here: Times, there: Times) -> list[Compared]:
    """The rows that both sides have."""
    found = []
    for key in here:
        if not there.get(key):
            continue
        a, b = here[key], there[key]
        ratios = [y / x for x, y in zip(a, b, strict=False)]
        medians = statistics.median(a), statistics.median(b)
        apart = max(a) < min(b) or max(b) < min(a)
        apart = apart and abs(medians[1] / medians[0] - 1) > LEAST
        found.append(Compared(key, *medians, statistics.median(ratios), min(ratios), max(ratios), apart))
    return found


def table(rows: Sequence[Compared], here: str, there: str) -> str:
    """A line a row."""
    lines = [("bench", "case", "who", here, there, "ratio", "spread", "")]
    for row in rows:
        figures = f"{row.here:.4g}", f"{row.there:.4g}", f"{row.ratio:.3f}", f"{row.low:.3f} to {row.high:.3f}", row.verdict
        lines.append((*row.key, *figures))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def told(rows: Sequence[Compared], here: str, there: str, broken: Sequence[str] = ()) -> int:
    """Print both sides; the exit status: 1 where something is slower here beyond the noise, or fails, or nothing is compared."""
    write(f"ms, or MB of memory; ratio: {there} / {here}, above 1 where it is faster here\n{table(rows, here, there)}")
    slower = [" ".join(row.key) for row in rows if row.verdict == "SLOWER"]
    write("\n".join([*(f"slower: {name}" for name in slower), *broken]) or "nothing is slower beyond the noise")
    return 1 if slower or broken or not rows else 0


# ---- measured now -----------------------------------------------------------------------------------------------------------


def measured(commit: str, names: Sequence[str], rounds: int, flags: Mapping[str, int], root: Path = report.ROOT) -> int:
    """Build, run in turn, print; the exit status. SystemExit where git or the build refuses."""
    with tempfile.TemporaryDirectory() as folder, worktree(commit, Path(folder) / "tree", root) as tree:
        write(f"building {commit} in {tree}")
        build(tree)
        sides = {HERE: side(Path(folder) / HERE, root, root), THERE: side(Path(folder) / THERE, root, tree)}
        times: dict[str, Times] = {HERE: {}, THERE: {}}
        failed: dict[str, dict[str, str]] = {HERE: {}, THERE: {}}
        for where in track([HERE, THERE] * rounds, f"{HERE}, {THERE}", True):
            done = child(sides[where], names, flags)
            for *key, value in done["rows"]:
                times[where].setdefault(tuple(key), []).append(value)
            failed[where] |= done["failed"]
    for name, why in failed[THERE].items():
        write(f"not compared: {commit} can't run {name}: {why}")
    broken = [f"failed: {name}: {why}" for name, why in failed[HERE].items()]
    return told(compare(times[HERE], times[THERE]), HERE, commit, broken)


@contextlib.contextmanager
def worktree(commit: str, path: Path, root: Path) -> Iterator[Path]:
    """That commit's files, gone again at the end. SystemExit with git's own words where there is no such commit."""
    added = subprocess.run(["git", "worktree", "add", "--detach", str(path), commit], cwd=root, capture_output=True, text=True)
    if added.returncode:
        raise SystemExit(f"--compare {commit}: {added.stderr.strip().splitlines()[-1]}")
    try:
        yield path
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(path)], cwd=root, capture_output=True, check=True)


def build(tree: Path) -> None:
    """Its kernels, in place. SystemExit with the last line where that fails."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode or not list((tree / "peftk").glob("_C*")):
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise SystemExit(f"--compare: {tree.name} can't be built: {said[-1]}")


def side(folder: Path, benches: Path, package: Path) -> Path:
    """A folder in which the benches of one checkout find the package of another."""
    folder.mkdir()
    (folder / "bench").symlink_to(benches / "bench")
    (folder / "peftk").symlink_to(package / "peftk")
    return folder


def child(folder: Path, names: Sequence[str], flags: Mapping[str, int]) -> dict:
    """One process's rows, [bench, case, who, figure], and why benches failed. RuntimeError where it ends without them."""
    out = folder / "rows.json"
    out.unlink(missing_ok=True)
    asked = {"names": list(names), "out": str(out), "package": str((folder / "peftk").resolve()), **flags}
    environment = {**os.environ, "OMP_NUM_THREADS": str(flags["threads"]), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-m", "bench.compare", json.dumps(asked)], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode or not out.exists():
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{folder.name}: {said[-1]}")
    return json.loads(out.read_text())


def run_child(asked: dict) -> None:
    """In a process of its own: ours of every case, timed; a bench that the package can't run is named."""
    import torch

    import peftk
    from bench import catalogue, peers
    from bench.limits import Limits
    from bench.measure import measure_case

    found = Path(peftk.__file__).resolve().parent
    if found != Path(asked["package"]):
        raise SystemExit(f"expected the package in {asked['package']}, got {found}")
    torch.set_num_threads(asked["threads"])
    peers.LEFT_OUT = "only ours are compared"
    limits = Limits(1.0, 1.0, 1.0, {torch.bfloat16: 1.0, torch.float32: 1.0})  # nobody looks at shares here
    rows: list[list] = []
    failed: dict[str, str] = {}
    for name in asked["names"]:
        try:
            module = catalogue.module_of(name)
            if hasattr(module, "rows"):
                ours = (done[:1] for done in catalogue.rows_of(module, asked["size"], asked["repeat"], limits))
            else:
                torch.manual_seed(0)
                cases = (replace(c, candidates=c.candidates[: c.ours], goals=()) for c in module.cases(asked["size"]))
                ours = (measure_case(case, limits, asked["repeat"]) for case in cases)
            rows += [[name, row.case, row.who, figure] for done in ours for row in done if (figure := _figure(row))]
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    Path(asked["out"]).write_text(json.dumps({"rows": rows, "failed": failed}))


def _figure(row: report.Row) -> float | None:
    return row.extra / 1e6 if row.extra is not None else None if row.p50 is None else row.p50 * 1e3


# ---- recorded ---------------------------------------------------------------------------------------------------------------


def recorded(commit: str, other: str | None = None, folder: Path = report.RESULTS) -> int:
    """Recorded rows of a commit beside those of another one, None for the newest of each case that are not its own. Noise is
    what single calls scatter by: their p10 to p90. SystemExit where nothing is recorded of it."""
    rows = report.of_all_machines(folder)
    there = _ours(row for row in rows if row["commit"].startswith(commit))
    if not there:
        known = ", ".join(dict.fromkeys(row["commit"] for row in rows))
        raise SystemExit(f"--compare {commit} --recorded: expected a commit with recorded rows, one of {known or 'none'}")
    here = _ours(row for row in rows if (row["commit"].startswith(other) if other else not row["commit"].startswith(commit)))
    found = []
    for place, a in here.items():
        if b := there.get(place):
            x, y = _recorded(a), _recorded(b)
            low, high = _range(b)[0] / _range(a)[1], _range(b)[1] / _range(a)[0]
            apart = (low > 1 or high < 1) and abs(y / x - 1) > LEAST
            machine = f"{a['case']} [{a['machine']}, {a['isa']}, {a['commit']}]"
            found.append(Compared((a["op"], machine, a["who"]), x, y, y / x, low, high, apart))
    return told(found, other or "newest", commit)


def _ours(rows: Iterable[dict[str, str]]) -> dict[tuple[str, ...], dict[str, str]]:
    """The newest row of each case, by its place: ours is the first of a run."""
    first = [run[0] for run in report.newest_runs(rows) if _recorded(run[0])]
    return {tuple(row[name] for name in ("machine", "op", "case", "who", "isa", "threads")): row for row in first}


def _recorded(row: dict[str, str]) -> float | None:
    cell = row["extra_mb"] or row["p50_ms"]
    return float(cell) if cell and float(cell) > 0 else None


def _range(row: dict[str, str]) -> tuple[float, float]:
    """p10 to p90; a row from before p10 was recorded scatters down as far as up."""
    middle = _recorded(row)
    high = float((row["extra_p90_mb"] if row["extra_mb"] else row["p90_ms"]) or middle)
    low = float((row["extra_p10_mb"] if row["extra_mb"] else row["p10_ms"]) or middle**2 / high)
    return low, high


if __name__ == "__main__":
    run_child(json.loads(sys.argv[1]))
