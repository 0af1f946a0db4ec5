"""kill -9 at random moments of what peftk writes: nothing is lost, the last complete state loads, going on is exact.

    python -m tests.reliability.kills --kills 200            over all scenarios; the results become rows of long_runs.csv
    python -m tests.reliability.kills --kills 20 --only save

Each scenario first runs undisturbed. Then it is started and killed after a random share of that time, what it left is checked,
and it goes on, and is killed again; whenever it comes to its end, the result must be the undisturbed one's, byte for byte, and it
starts anew.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

import peftk
from peftk.atomic import write_folder
from peftk.cli import main as peftk_main
from peftk.cli.resume import latest_checkpoint
from tests.cli.conftest import sentences, small_llama, small_tokenizer

PRELOAD = "tests.reliability.kills"
PAGED_BUDGET = 128 << 10  # bytes, a quarter of the moments
LIMIT = 600  # seconds for a run that nobody kills


class Broken(AssertionError):
    """What a kill left can't be used."""


@dataclass(frozen=True)
class Scenario:
    """``run(inputs, out)`` does the work or goes on with it, ``check(out)`` looks at what a kill left, ``result(out)`` is
    compared; None where each run starts anew."""

    run: Callable[[Path, Path], None]
    check: Callable[[Path], None]
    result: Callable[[Path], object] | None


def command(*arguments: object) -> None:
    """A command of peftk, quiet. Broken with what it printed where it fails."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        status = peftk_main([str(argument) for argument in arguments])
    if status:
        raise Broken(f"peftk {' '.join(map(str, arguments))}: exit status {status}: {errors.getvalue()[-2000:]}")


# ---- inputs, made once --------------------------------------------------------------------------------------------------


def make_inputs(folder: Path) -> None:
    """A small Llama in several files, a text, and an adapter on the model."""
    tokenizer = small_tokenizer()
    model = small_llama(len(tokenizer))
    model.save_pretrained(folder / "model", max_shard_size="100KB")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(sentences(220))
    peftk.attach(model, peftk.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    peftk.save_adapter(model, folder / "adapter")


# ---- the scenarios ------------------------------------------------------------------------------------------------------


def run_finetune(inputs: Path, out: Path) -> None:
    flags = "--seq-len 32 --batch-size 2 --grad-accum 1 --r 4 --steps 40 --dropout 0.2 --save-every 3 --eval-every 7 --threads 1"
    resume = ["--resume"] if out.exists() else []
    command("finetune", "--model", inputs / "model", "--data", inputs / "text.txt", "--out", out, *flags.split(), *resume)


def check_finetune(out: Path) -> None:
    if (out / "run.json").exists():
        json.loads((out / "run.json").read_text())
    if (checkpoint := latest_checkpoint(out)) is not None:
        torch.load(checkpoint / "training.pt", weights_only=True)
        load_file(checkpoint / "adapter" / "adapter_model.safetensors")
        json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())


def finetuned(out: Path) -> object:
    run = json.loads((out / "run.json").read_text())
    files = {name: (out / name).read_bytes() for name in ("loss.csv", "adapter_model.safetensors", "adapter_config.json")}
    return run["settings"], files, sorted(path.name for path in out.iterdir())


def run_save(inputs: Path, out: Path) -> None:
    """The same adapter again and again, every number of it the round's."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    peftk.attach(model, peftk.LoraConfig(r=8, target_modules=["0", "1"]))
    for number in range(1, 60):
        with torch.no_grad():
            for parameter in peftk.trainable_parameters(model):
                parameter.fill_(number)
        peftk.save_adapter(model, out)


def check_save(out: Path) -> None:
    if not out.exists():
        return
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    peftk.load_adapter(model, out)
    values = {value for tensor in load_file(out / "adapter_model.safetensors").values() for value in tensor.unique().tolist()}
    if len(values) != 1:
        raise Broken(f"a folder of several rounds: {sorted(values)}")


def run_quantize(inputs: Path, out: Path) -> None:
    command("quantize", "--model", inputs / "model", "--out", out, "--resume", "--dtype", "bf16")


def run_merge(inputs: Path, out: Path) -> None:
    command("merge", "--model", inputs / "model", "--adapter", inputs / "adapter", "--out", out, "--resume", "--to", "nf4")


def check_whole(out: Path) -> None:
    """The folder isn't there, or it is all there."""
    if out.exists():
        index = json.loads((out / "model.safetensors.index.json").read_text())
        for name in set(index["weight_map"].values()):
            load_file(out / name)


def whole(out: Path) -> object:
    """Every file that holds numbers or settings."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".safetensors", ".json", ".csv")}


def run_paged(inputs: Path, out: Path) -> None:
    """A loop of one's own with a paged 8-bit AdamW, most of it in the page file, its state saved whole every second step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256))
    optimizer = peftk.optim.PagedAdamW8bit(model.parameters(), lr=1e-3, budget=PAGED_BUDGET, min_8bit_size=256)
    step = 0
    if out.exists():
        state = torch.load(out / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while step < 40:
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(step))
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 2 == 0:
            with write_folder(out) as unfinished:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, unfinished / "state.pt")

    if not peftk.paging.stats().bytes_out:
        raise Broken("nothing was paged out")


def check_paged(out: Path) -> None:
    """And no page file has a name that could stay behind."""
    if out.exists():
        torch.load(out / "state.pt", weights_only=True)
    if left := [path.name for path in Path(tempfile.gettempdir()).iterdir() if "peftk" in path.name]:
        raise Broken(f"page files left behind: {left}")


def paged(out: Path) -> object:
    state = torch.load(out / "state.pt", weights_only=True)
    moments = {f"{at} {name}": value for at, kept in state["optimizer"]["state"].items() for name, value in kept.items()}
    return {name: t.numpy().tobytes() if isinstance(t, torch.Tensor) else t for name, t in (state["model"] | moments).items()}


SCENARIOS = {
    "finetune": Scenario(run_finetune, check_finetune, finetuned),
    "save": Scenario(run_save, check_save, None),
    "quantize": Scenario(run_quantize, check_whole, whole),
    "merge": Scenario(run_merge, check_whole, whole),
    "paged": Scenario(run_paged, check_paged, paged),
}


# ---- killing ------------------------------------------------------------------------------------------------------------


def _child(name: str, inputs: Path, out: Path, told: Path) -> None:
    """What a process does: the scenario, and a word when it has ended."""
    torch.set_num_threads(1)
    os.environ["TMPDIR"] = str(told.parent)
    tempfile.tempdir = None
    try:
        SCENARIOS[name].run(inputs, out)
        told.write_text("done")
    except BaseException as error:
        told.write_text(f"{type(error).__name__}: {error}")
        raise


class Killer:
    """Starts a scenario's process and ends it after a while."""

    def __init__(self, name: str, inputs: Path, folder: Path):
        self.name, self.inputs, self.folder = name, inputs, folder
        self.scenario = SCENARIOS[name]
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([PRELOAD])
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        first = self.context.Process(target=int)  # waits for the server, whose imports are no part of a run
        first.start()
        first.join()

    def start(self, out: Path, after: float | None) -> bool:
        """Run for so many seconds; whether it came to its end. Broken where it failed by itself, or left what can't be used."""
        told = self.temporary / "told"
        told.unlink(missing_ok=True)
        process = self.context.Process(target=_child, args=(self.name, self.inputs, out, told), daemon=True)
        process.start()
        process.join(LIMIT if after is None else after)
        process.kill()
        process.join()
        said = told.read_text() if told.exists() else ""
        if said not in ("", "done") or (after is None and not said):
            raise Broken(f"{self.name}: {said or f'not at its end after {LIMIT} s'}")
        before, tempfile.tempdir = tempfile.tempdir, str(self.temporary)
        try:
            self.scenario.check(out)
        finally:
            tempfile.tempdir = before
        return said == "done"


@dataclass
class Killed:
    """When each kill came, as a share of the undisturbed run's time, and how often the work came to its end."""

    shares: list[float] = field(default_factory=list)
    ends: int = 0

    def told(self) -> str:
        first, *_, last = sorted(self.shares)
        return f"{len(self.shares)} kills at {first:.0%} to {last:.0%} of a run, {self.ends} times to the end"


def kill_often(name: str, kills: int, seed: int, step: Callable[[], object] = int) -> Killed:
    """``kills`` kills, and the work to its end after them. Broken where anything is wrong."""
    dice, killed = random.Random(f"{name} {seed}"), Killed()
    with tempfile.TemporaryDirectory() as folder:
        inputs, out = Path(folder) / "inputs", Path(folder) / "work" / "out"
        inputs.mkdir()
        make_inputs(inputs)
        killer = Killer(name, inputs, Path(folder) / "killer")
        whole = Path(folder) / "whole" / "out"
        start = time.perf_counter()
        killer.start(whole, None)
        usual = time.perf_counter() - start
        expected = killer.scenario.result and killer.scenario.result(whole)
        while len(killed.shares) < kills:
            moment = dice.uniform(0, usual)
            if killer.start(out, moment):
                killed.ends += 1
                _compare(killer, out, expected)
                shutil.rmtree(out.parent)
            else:
                killed.shares.append(moment / usual)
                step()
        killer.start(out, None)
        _compare(killer, out, expected)
    killed.ends += 1
    return killed


def _compare(killer: Killer, out: Path, expected: object) -> None:
    if expected is not None and (got := killer.scenario.result(out)) != expected:
        print(f"expected {expected}\ngot      {got}", file=sys.stderr)
        raise Broken(f"{killer.name}: the result after kills is not the undisturbed one's")


def main() -> int:
    from tests.reliability.record import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="shared evenly by the scenarios")
    parser.add_argument("--only", choices=SCENARIOS, nargs="+", default=list(SCENARIOS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from tqdm.auto import tqdm

    share, held = -(-arguments.kills // len(arguments.only)), True
    with tqdm(total=share * len(arguments.only), unit="kill", dynamic_ncols=True) as bar:
        for name in arguments.only:
            bar.set_description(name)
            start = time.perf_counter()
            try:
                told, fine = kill_often(name, share, arguments.seed, lambda: bar.update()).told(), True
            except Broken as error:
                told, fine = str(error), False
            held = held and fine
            record("kill -9", name, told, fine, time.perf_counter() - start)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
