"""The process in which cases run: one after another under limits, a JSON line each. It may die; whoever started it goes on after
the case at which it did.

    python -m tests.reliability.child FORMAT SEED      then lines "START STOP" on stdin
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PEFTK_BITSANDBYTES"] = "0"

import torch  # noqa: E402

from tests.reliability.formats import Format, WrongState  # noqa: E402
from tests.reliability.mutate import Files, mutated  # noqa: E402

SECONDS = 10  # of processor time that a case may take; the slowest good ones take a tenth
BYTES = 256 << 20  # of address space beyond what the process has, for files of at most a few hundred KB
NO_MEMORY = "can't allocate memory"  # as torch says it
REFUSED, TAKEN = "refused", "taken"


class TooLong(BaseException):
    """A case has used up its time."""


def case(format: Format, samples: list[Files], seed: int, number: int) -> Files:
    pick = random.Random(f"{seed}/{format.name}/{number}")
    return mutated(pick.choice(samples), pick)


def put(files: Files, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Processor time and address space of what runs inside."""

    def stop(*_: object) -> None:
        raise TooLong(f"more than {SECONDS} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(format: Format, files: Files, folder: Path) -> tuple[str, str]:
    """(REFUSED, the message), (TAKEN, "") or (what went wrong, where)."""
    put(files, folder)
    try:
        with limits(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            try:
                found = format.load(folder)
            except (MemoryError, WrongState):
                raise
            except format.refusals as error:
                message = str(error)
                if NO_MEMORY in message:
                    raise
                return (REFUSED, message) if message else ("refused without a word", traceback.format_exc())
            format.check(found, folder)
        return TAKEN, ""
    except TooLong:
        return "hang", traceback.format_exc()
    except (MemoryError, WrongState) as error:
        return type(error).__name__, traceback.format_exc()
    except BaseException as error:  # whatever it is, it is a finding
        kind = "allocation" if NO_MEMORY in str(error) else type(error).__name__
        return kind, traceback.format_exc()


def formats() -> dict[str, Format]:
    """Those of this machine: without transformers those that need none."""
    from importlib.util import find_spec

    from tests.reliability.formats import FORMATS

    found = list(FORMATS)
    if find_spec("transformers") and find_spec("gguf"):
        from tests.reliability.model_formats import FORMATS as MORE

        found += MORE
    return {format.name: format for format in found}


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("peftk").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)


def main() -> None:
    name, seed = sys.argv[1], int(sys.argv[2])
    quiet()
    format = formats()[name]
    samples = format.samples()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    with tempfile.TemporaryDirectory() as where:
        for sample in samples:  # a sample that isn't taken would make the whole run a lie
            found = outcome(format, sample, Path(where) / "case")
            if found[0] != TAKEN:
                answers.write(json.dumps({"sample": found}) + "\n")
        answers.write(json.dumps({"ready": True}) + "\n")
        for line in sys.stdin:
            start, stop = map(int, line.split())
            for number in range(start, stop):
                begun = time.process_time()
                kind, told = outcome(format, case(format, samples, seed, number), Path(where) / "case")
                told = told if kind not in (REFUSED, TAKEN) else ""
                answers.write(json.dumps([number, kind, round(time.process_time() - begun, 3), told]) + "\n")


if __name__ == "__main__":
    main()
