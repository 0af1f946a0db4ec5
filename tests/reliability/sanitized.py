"""The CPU kernels built with sanitizers, under the ops' own tests.

    python -m tests.reliability.sanitized address,undefined      every op's test body on every CPU tier
    python -m tests.reliability.sanitized thread                 the same ops by many threads at once; threads are std::thread's

Builds a copy of the tree, so that nothing here changes; the result becomes a row of long_runs.csv. ``--tiers avx2`` builds and
tests fewer of the tiers, which the row then says; scalar is always among them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEFT_BEHIND = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "_C*.so", "__pycache__", ".*_cache", "out")
# The interpreter, torch and their thread pools aren't built with a sanitizer: what they do isn't looked at, and leaks are theirs.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:ignore_noninstrumented_modules=1",
}
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
OPS = ("tests/ops", "-k", "cpu", "-m", "not gpu and not full")
THREADS = ("tests/reliability/test_forks_and_threads.py", "-k", "threads")
REPORT = re.compile(r"^.*(?:ERROR: AddressSanitizer|WARNING: ThreadSanitizer|runtime error).*$", re.MULTILINE)


def build(sanitizers: str, tree: Path, tiers: Sequence[str] = ()) -> None:
    """A copy of the tree with a native module of its own. CalledProcessError where it doesn't build."""
    shutil.copytree(ROOT, tree, ignore=LEFT_BEHIND, symlinks=True)
    options = f"-DPEFTK_CUDA=OFF -DPEFTK_SANITIZE={sanitizers}" + (f" -DPEFTK_TIERS={';'.join(tiers)}" if tiers else "")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True, env={**os.environ, "PEFTK_CMAKE_ARGS": options})
    if (said := (tree / "peftk/_native_build.txt").read_text()) != "built":
        raise RuntimeError(said)


def preload(sanitizers: str) -> str:
    """The runtimes that have to be in the process before anything else."""
    names = [RUNTIMES[name] for name in sanitizers.split(",")]
    found = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip() for name in names]
    return ":".join(os.path.realpath(path) for path in found)


def run(sanitizers: str, tests: tuple[str, ...], tree: Path) -> tuple[str, bool]:
    """(pytest's last line and the first report, whether all is well)."""
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": preload(sanitizers), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-x", "-p", "no:cacheprovider", "--tb=short", *tests]
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    report = REPORT.search(done.stdout)
    lines = [line for line in done.stdout.splitlines() if re.search(r"\d+ (?:passed|failed|error)", line)]
    last = re.sub(r" in [\d.]+s.*", "", lines[-1]).strip("= ") if lines else f"exit status {done.returncode}"
    if done.returncode or report:
        print(done.stdout[-6000:])
    return f"{last}; {report.group(0).strip() if report else 'no report'}", done.returncode == 0 and report is None


def main() -> int:
    from tests.reliability.record import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizers", choices=("address,undefined", "thread"))
    parser.add_argument("--tiers", nargs="+", default=[], help="all by default")
    parser.add_argument("tests", nargs="*", help="pytest's arguments in the place of the usual ones")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        build(arguments.sanitizers, tree, arguments.tiers)
        usual = THREADS if arguments.sanitizers == "thread" else OPS
        told, held = run(arguments.sanitizers, tuple(arguments.tests) or usual, tree)
    what = arguments.sanitizers + (f" (scalar, {', '.join(arguments.tiers)})" if arguments.tiers else "")
    record("sanitizers", what, told, held, time.perf_counter() - start)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
