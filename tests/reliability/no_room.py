"""No room on the disk, a folder that is read-only, no memory: what cannot be written is refused by an error that names the place,
nothing is half there, what was there stays whole, and with room the work goes on to the undisturbed result.

    python -m tests.reliability.no_room          every writer, in every place, from no room to enough; rows of long_runs.csv
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import peftk
from peftk.atomic import write_file
from peftk.cli import main as peftk_main
from peftk.cli.output import LossFile
from tests.reliability import kills, places

DISK = 16 << 20  # bytes
WAYS = ("full disk", "file limit", "read-only", "memory limit")
LITTLE = (0, 3000, 20_000, 80_000)  # bytes of room on a disk, or in a file
LITTLE_MEMORY = (0, 1 << 20, 8 << 20, 64 << 20)


class Refused(Exception):
    """The work was refused, with this message."""


@dataclass(frozen=True)
class Writer:
    """``before(inputs, out)`` makes what is there already, ``work(inputs, out)`` writes or is Refused, ``check(out)`` sees that
    what was there is whole, ``result(out)`` is what the work comes to."""

    before: Callable[[Path, Path], None]
    work: Callable[[Path, Path], None]
    check: Callable[[Path], None]
    result: Callable[[Path], object]
    ways: tuple[str, ...] = WAYS


def command(*arguments: object) -> None:
    """A command of peftk, quiet. Refused where it says that its input is at fault."""
    told = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        status = peftk_main([str(argument) for argument in arguments])
    if status:
        raise Refused(told.getvalue())


@contextlib.contextmanager
def refusals(*kinds: type[BaseException]) -> Iterator[None]:
    """Inside the ``with`` these, and no memory, are refusals."""
    try:
        yield
    except kinds as error:
        raise Refused(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        raise Refused(f"out of memory: {error}") from error


# ---- what writes --------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """In the middle of a run."""


def stopped_run(inputs: Path, out: Path) -> None:
    """A finetuning run with a checkpoint, ended after it."""
    append = LossFile.append

    def until_the_eighth(self: LossFile, row: object) -> None:
        if row.step == 8:
            raise Stopped
        append(self, row)

    LossFile.append = until_the_eighth
    try:
        with contextlib.suppress(Stopped):
            finetune(inputs, out)
    finally:
        LossFile.append = append


def finetune(inputs: Path, out: Path) -> None:
    flags = "--seq-len 32 --batch-size 2 --grad-accum 1 --r 4 --steps 10 --save-every 3 --threads 1 --eval-fraction 0"
    resume = ["--resume"] if out.exists() else []
    command("finetune", "--model", inputs / "model", "--data", inputs / "text.txt", "--out", out, *flags.split(), *resume)


def whole_checkpoint(out: Path) -> None:
    kills.check_finetune(out)
    if kills.latest_checkpoint(out) is None:
        raise AssertionError("the checkpoint is gone")


def quantize(inputs: Path, out: Path) -> None:
    command("quantize", "--model", inputs / "model", "--out", out, "--resume", "--dtype", "bf16")


def merge(inputs: Path, out: Path) -> None:
    command("merge", "--model", inputs / "model", "--adapter", inputs / "adapter", "--out", out, "--resume", "--to", "nf4")


def two_layers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))


def save_adapter(inputs: Path, out: Path, value: float = 2.0) -> None:
    """A megabyte, which no memory that is free already holds."""
    with refusals(OSError), torch.no_grad():
        model = peftk.attach(two_layers(), peftk.LoraConfig(r=128, target_modules=["0", "1"]))
        for parameter in peftk.trainable_parameters(model):
            parameter.fill_(value)
        peftk.save_adapter(model, out)


def check_adapter(out: Path) -> None:
    model = peftk.load_adapter(two_layers(), out)
    values = {value for name, tensor in model.state_dict().items() if "lora_" in name for value in tensor.unique().tolist()}
    assert values == {1.0}, f"not the adapter that was there: {values}"


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def paged_step(inputs: Path, out: Path) -> None:
    """A step of a paged optimizer whose page file lies in ``out``; a refused one changes no parameter."""
    out.mkdir(exist_ok=True)
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 1 << 16))
    parameter.grad = torch.ones_like(parameter)
    before = parameter.detach().clone()
    with refusals(OSError):
        try:
            peftk.optim.PagedAdamW8bit([parameter], lr=0.1, budget=1 << 16, folder=out).step()
            write_file(out / "parameter", parameter.detach().numpy().tobytes())
        except OSError:
            if (out / "parameter").exists() or not torch.equal(parameter, before) and "paging" in str(sys.exc_info()[1]):
                raise AssertionError("changed by a step that was refused") from None
            raise


WRITERS = {
    "finetune": Writer(stopped_run, finetune, whole_checkpoint, kills.finetuned),
    "quantize": Writer(lambda *_: None, quantize, kills.check_whole, kills.whole),
    "merge": Writer(lambda *_: None, merge, kills.check_whole, kills.whole),
    # Where its last megabyte can't be had, safetensors (0.8) ends the process: "memory allocation of 1048576 bytes failed".
    "save_adapter": Writer(lambda inputs, out: save_adapter(inputs, out, 1.0), save_adapter, check_adapter, files, WAYS[:3]),
    # A page file on a tmpfs is refused for that.
    "paged": Writer(lambda inputs, out: out.mkdir(), paged_step, lambda out: None, files, WAYS[1:]),
}


# ---- one after another --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def short_of(way: str, place: Path, room: int) -> Iterator[None]:
    """Inside the ``with``, of disk, file size, permission or memory."""
    gc.collect()
    kind = {"full disk": places.full, "read-only": lambda place, _: places.read_only(place)}.get(way)
    limit = {"file limit": places.file_limit, "memory limit": places.memory_limit}.get(way)
    with kind(place, room) if kind else limit(room):
        yield


def try_out(name: str, way: str, inputs: Path, place: Path, rooms: tuple[int, ...]) -> None:
    """In a process of its own: the writer with so little room, then with enough. AssertionError where anything is wrong."""
    torch.set_num_threads(1)
    writer, refused = WRITERS[name], 0
    if way in ("full disk", "read-only"):
        places.small_disk(place, DISK)
    if name == "paged" and way == "read-only":
        return
    writer.before(inputs, place / "usual")
    writer.work(inputs, place / "usual")
    expected = writer.result(place / "usual")
    for room in rooms if way != "read-only" else rooms[:1]:
        out = place / f"out{room}"
        writer.before(inputs, out)
        try:
            with short_of(way, place, room):
                writer.work(inputs, out)
        except Refused as error:
            refused += 1
            check_message(str(error), out, way)
            check_left(writer, out)
            writer.work(inputs, out)
        assert writer.result(out) == expected, f"{room} bytes of room: another result than with enough"
    assert refused, f"never refused with {rooms} bytes of room"


def check_message(message: str, out: Path, way: str) -> None:
    wanted = {
        "full disk": ("No space left", "GB are free"),
        "file limit": ("File too large",),
        "read-only": ("Read-only file system",),
        "memory limit": ("memory",),
    }[way]
    assert any(words in message for words in wanted), f"expected one of {wanted}, got {message!r}"
    assert way == "memory limit" or str(out) in message, f"{out} isn't named: {message!r}"
    assert "Traceback" not in message, message


def check_left(writer: Writer, out: Path) -> None:
    """Nothing half there: no temporary name, and what was there before."""
    left = [str(path) for path in out.parent.rglob("*") if path.name.endswith(".tmp")]
    assert not left, f"left behind: {left}"
    writer.check(out)


def try_all(name: str, way: str, rooms: tuple[int, ...]) -> None:
    """The writer in one way, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, place = Path(folder) / "inputs", Path(folder) / "place"
        inputs.mkdir()
        place.mkdir()
        if name not in ("save_adapter", "paged"):
            kills.make_inputs(inputs)
        places.in_process(try_out, name, way, inputs, place, rooms)


def rooms_of(way: str, steps: int) -> tuple[int, ...]:
    """From none to what is enough for most."""
    largest = 128 << 20 if way == "memory limit" else 600_000
    return (0, *(int(1000 * (largest / 1000) ** (i / (steps - 1))) for i in range(steps)))


def main() -> int:
    from tqdm.auto import tqdm

    from tests.reliability.record import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="how many sizes of room")
    steps, all_held = parser.parse_args().steps, True
    for way in WAYS:
        start, told = time.perf_counter(), []
        for name in tqdm([name for name, writer in WRITERS.items() if way in writer.ways], desc=way, dynamic_ncols=True):
            try:
                try_all(name, way, rooms_of(way, steps))
            except AssertionError as error:
                print(error, file=sys.stderr)
                told.append(f"{name}: {str(error).strip().rpartition(os.linesep)[2]}")
        sizes = "" if way == "read-only" else f", {steps + 1} sizes of room"
        result = "; ".join(told) or f"{', '.join(n for n, w in WRITERS.items() if way in w.ways)}: refused, whole, gone on{sizes}"
        record("no room", way, result, not told, time.perf_counter() - start)
        all_held = all_held and not told
    return 0 if all_held else 1


if __name__ == "__main__":
    sys.exit(main())
