"""`python -m bench.memory_plan`: what `peftk memory` predicts for a CPU beside what real training steps take.

Every row in a process of its own: import everything, note the resident memory, build the model with random weights, prepare it
as `peftk finetune` does, give what that freed back, set the high-water mark back, and run STEPS steps (torch's AdamW, clipping,
AdaLoRA's schedule). Measured is the high-water mark less the memory after import. Linux with glibc only.

malloc is told to give back every block from 64 KiB on as it is freed, so that what is measured is what the step holds, and not
what the C library's heap keeps: that differs from run to run of one program, and grows over the first steps. ``--malloc
finetune`` measures with `peftk finetune`'s own setting, under which the heap keeps holes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from bench import report
from peftk import planner

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3  # the optimizer's states are there from the second on
GIVE_BACK = 64 << 10  # bytes, from which a block is given back as it is freed
GIVEN_BACK, FINETUNE = "given back", "finetune"  # settings of malloc
WITHIN = 0.05  # of the peak that is measured: the goal
GOAL = f"within {WITHIN:.0%} of the peak"
PATH = ROOT / "bench" / "results" / "memory-plan.csv"
WHERE = ("date", "commit", "machine", "torch", "transformers")
POINT = ("model", "method", "base", "batch", "length", "checkpointing", "malloc")
FIELDS = (*WHERE, *POINT, "predicted", "measured", "ratio", "goal", "met", "largest")
METHODS = ("qlora", "lora", "dora", "adalora", "prefix", "prompt", "ptuning", "ptuning-v2")

Row = dict[str, object]


def rows(length: int = 256) -> list[Row]:
    """SmolLM2 with every method and base, with and without checkpointing; and the larger model."""
    found = []
    for method in METHODS:
        for base in ("nf4",) if method == "qlora" else ("dense", "nf4"):
            for checkpointing in (False, True):
                found.append(row("smollm2-135m", method, base, 1, length, checkpointing))
    found += [row("smollm2-135m", "full", "dense", 1, length, checkpointing) for checkpointing in (False, True)]
    found += [row("smollm2-135m", "qlora", "nf4", 4, length, False), row("smollm2-135m", "lora", "dense", 4, length, False)]
    for method, base in (("qlora", "nf4"), ("lora", "dense")):
        found += [row("tinyllama-1.1b", method, base, 1, length, checkpointing) for checkpointing in (False, True)]
    return found


def row(model: str, method: str, base: str, batch: int, length: int, checkpointing: bool) -> Row:
    """A case."""
    return dict(model=model, method=method, base=base, batch=batch, length=length, checkpointing=checkpointing)


def predicted(row: Row, malloc: str = GIVEN_BACK) -> planner.Plan:
    """By `peftk memory`'s own code."""
    from peftk.cli.memory import plan_of

    return plan_of(_arguments(row), _choice(row, malloc))


def read(path: Path = PATH) -> list[dict[str, str]]:
    """The recorded rows, the newest of each case. ValueError where the file has other columns."""
    newest = {tuple(line[name] for name in POINT): line for line in report.read(path, (FIELDS,))}
    return list(newest.values())


def measured(row: Row, malloc: str = GIVEN_BACK) -> int:
    """Bytes above those after import; RuntimeError with what the process said where it fails."""
    command = [sys.executable, "-m", "bench.memory_plan", "--child", json.dumps({**row, "malloc": malloc})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{row}: {said[-1]}")
    return int(done.stdout.split()[-1])


def _arguments(row: Row) -> argparse.Namespace:
    return argparse.Namespace(model=row["model"], dtype="bf16", method=row["method"])


def _choice(row: Row, malloc: str = GIVEN_BACK) -> planner.Choice:
    step = planner.Step(row["batch"], row["length"], row["checkpointing"], device_type="cpu")
    return planner.Choice(step, planner.Machine(keeps_freed=malloc == FINETUNE), row["base"], None, row["method"])


def _child(row: Row) -> int:
    """In a fresh process."""
    import transformers

    import peftk
    from peftk.cli.loss import LanguageModelLoss
    from peftk.cli.memory import preparation
    from peftk.cli.process_memory import keep_freed_memory

    libc = ctypes.CDLL(None)
    if row["malloc"] == FINETUNE:
        keep_freed_memory()
    else:
        libc.mallopt(-3, GIVE_BACK)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, GIVE_BACK)  # M_TRIM_THRESHOLD
    torch.set_num_threads(1)
    config = planner.config_of(row["model"])
    transformers.AutoModelForCausalLM._model_mapping[type(config)]  # imports the code of the model
    after_import = _status("VmRSS")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    preparation(_arguments(row), _choice(row))(model)
    model.train()
    if row["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = peftk.trainable_parameters(model)
    # finetune's own; it trains no whole model, and of one in bf16 torch's moments are bf16 too, the planner's are fp32
    kind = peftk.optim.AdamW if row["method"] == "full" else torch.optim.AdamW
    optimizer = kind(trained, lr=1e-4)
    schedule = peftk.adalora_schedule(model, optimizer) if row["method"] == "adalora" else None
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    loss = LanguageModelLoss(model)
    for _ in range(STEPS):
        ids = torch.randint(0, 1000, (row["batch"], row["length"]))
        part = loss(ids, ids) / ids.numel()
        part.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    del schedule
    return _status("VmHWM") - after_import


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def finished(case: Row, malloc: str, plan: planner.Plan, found: int, provenance: report.Provenance) -> dict[str, str]:
    """A line of the file, with its goal."""
    facts = provenance.cells() | {"transformers": report.version_of("transformers")}
    ratio = plan.total / found
    figures = {
        "predicted": plan.total,
        "measured": found,
        "ratio": f"{ratio:.4f}",
        "goal": GOAL,
        "met": "met" if abs(ratio - 1) <= WITHIN else "missed",
        "largest": max(plan.parts, key=plan.parts.get),
    }
    return {name: str(value) for name, value in ({k: facts[k] for k in WHERE} | case | {"malloc": malloc} | figures).items()}


def record(line: dict[str, str], path: Path = PATH) -> None:
    """Put a line into the file, in the place of an older one of the same case."""
    there = {tuple(old[name] for name in POINT): old for old in (report.read(path, (FIELDS,)) if path.exists() else [])}
    report.write_csv(path, FIELDS, (there | {tuple(line[name] for name in POINT): line}).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--malloc", choices=(GIVEN_BACK, FINETUNE), default=GIVEN_BACK)
    parser.add_argument("--record", action="store_true", help=f"write the rows to {PATH.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if arguments.child:
        print(_child(json.loads(arguments.child)))
        return
    torch.set_num_threads(1)
    provenance = report.Provenance.here()
    for case in rows(arguments.length):
        name = " ".join(map(str, case.values()))
        if arguments.only not in name:
            continue
        line = finished(case, arguments.malloc, predicted(case, arguments.malloc), measured(case, arguments.malloc), provenance)
        figures = f"{float(line['predicted']) / 1e6:9.1f} MB predicted {float(line['measured']) / 1e6:9.1f} measured"
        print(f"{name:<48} {figures} {line['ratio']} {line['met']}", flush=True)
        if arguments.record:
            record(line)


if __name__ == "__main__":
    main()
