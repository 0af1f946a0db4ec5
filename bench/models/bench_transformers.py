"""transformers with NF4Config beside transformers with bitsandbytes, on the real SmolLM2-135M: loading a dense folder in 4 bits,
loading a folder in bitsandbytes' form, and Trainer.

A load is measured in a process of its own, the candidates in turn: everything is imported and a tiny model of the same kind was
loaded the same way before the clock starts. It stops when every page of the weights was touched, since a dense model's may lie
in the mapped file, unread. Memory is what the high-water mark of resident memory rises by, mapped pages among it.

Trainer trains the same adapters on the same batches in one process: peftk.attach on NF4Config's model, and HF peft on
bitsandbytes' model, from one folder of 4-bit weights.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftk
from bench import peers
from bench.goals import Goal, MemoryGoal
from bench.layers.bench_memory import given_back, high_water
from bench.limits import Limits
from bench.measure import Candidate, Case, Row, Work, interleave, rows_of
from bench.models import bench_smollm2 as smollm2
from bench.report import ROOT

TESTS = (
    "tests/integrations/test_transformers.py",
    "tests/integrations/test_transformers_bitsandbytes.py",
    "tests/integrations/test_transformers_trainer.py",
)
HEADLINE = "Trainer"
OURS, THEIRS, DENSE = "NF4Config", "load_in_4bit", "dense bf16"
OURS_STORED, THEIRS_STORED = "from_bitsandbytes", "bitsandbytes"
TRAINED, TRAINED_THEIRS = "NF4Config and peftk.attach", "load_in_4bit and HF peft"
LOADS = {OURS: [], THEIRS: [peers.BITSANDBYTES], DENSE: []}
STORED_LOADS = {OURS_STORED: [], THEIRS_STORED: [peers.BITSANDBYTES]}
FASTER, SMALLER = Goal(THEIRS, 1.0), MemoryGoal(THEIRS, 1.0)
STORED_FASTER, STORED_SMALLER = Goal(THEIRS_STORED, 1.0), MemoryGoal(THEIRS_STORED, 1.1)
STEP = Goal(TRAINED_THEIRS, 1.2)
STEPS, MOST_LOADS = 2, 7  # of Trainer in a round; processes a candidate


def rows(size: int, repeat: int, limits: Limits) -> Iterator[list[Row]]:
    """Times and memory of both loads, then Trainer. ``size`` is the model's own."""
    with tempfile.TemporaryDirectory() as folder:
        dense, stored = write_folders(smollm2_model(), Path(folder))
        name, count = "SmolLM2-135M", min(repeat, MOST_LOADS)
        yield from loading(f"loading {name} in 4 bits from a bf16 folder", LOADS, dense, count, (FASTER, SMALLER), limits)
        title = f"loading {name} from a folder in bitsandbytes' form"
        yield from loading(title, STORED_LOADS, stored, count, (STORED_FASTER, STORED_SMALLER), limits)
        yield training(stored, smollm2.batches(STEPS), repeat, limits)


def smollm2_model() -> nn.Module:
    from peftk.cli.models import open_model

    return open_model("smollm2")[0]


def write_folders(model: nn.Module, folder: Path) -> tuple[Path, Path]:
    """The model in bf16, and in 4 bits as bitsandbytes writes it; each with a tiny one of its kind in ``warm``."""
    import transformers

    from peftk.integrations.transformers import save_as_bitsandbytes

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    tiny = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
    dense, stored = folder / "dense", folder / "four"
    for made, below in ((model, ""), (tiny, "warm")):
        made.to(torch.bfloat16).save_pretrained(dense / below)
        save_as_bitsandbytes(load(OURS, dense / below), stored / below)
    return dense, stored


def load(who: str, folder: Path | str) -> nn.Module:
    """As the candidate does it."""
    import transformers

    read = partial(transformers.AutoModelForCausalLM.from_pretrained, folder, dtype=torch.bfloat16)
    if who == OURS:
        from peftk.integrations.transformers import NF4Config

        return read(quantization_config=NF4Config())
    if who == OURS_STORED:
        from peftk.integrations.transformers import from_bitsandbytes

        return from_bitsandbytes(folder, dtype=torch.bfloat16)
    facts = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    config = {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True, **facts)} if who == THEIRS else {}
    return read(device_map="cpu", **config) if who in (THEIRS, THEIRS_STORED) else read()


# ---- loading ----------------------------------------------------------------------------------------------------------------


def loading(
    title: str, who: dict[str, list[str]], folder: Path, count: int, goals: tuple[Goal, MemoryGoal], limits: Limits
) -> Iterator[list[Row]]:
    """Two cases: seconds and bytes."""
    everyone = [
        peers.candidate(name, packages, lambda name=name: partial(in_a_process, name, folder)) for name, packages in who.items()
    ]
    present = [c for c in everyone if c.run is not None]
    found: dict[str, list[tuple[float, int]]] = {c.who: [] for c in present}
    for _ in range(count):
        for candidate in present:
            found[candidate.who].append(candidate.run())
    seconds = {name: [s for s, _ in each] for name, each in found.items()}
    yield rows_of(Case(title, Work(0, 0), everyone, goals[0]), limits, seconds, {})
    memory = {name: int(statistics.median(b for _, b in each)) for name, each in found.items()}
    yield memory_rows(f"{title}, peak memory", everyone, memory, count, goals[1])


def memory_rows(case: str, everyone: list[Candidate], memory: dict[str, int], count: int, goal: MemoryGoal) -> list[Row]:
    ours = everyone[0].who
    return [
        Row(
            case,
            c.who,
            rounds=count if c.who in memory else 0,
            verdicts=(goal.judge(ours, memory),) if c.who == ours else (),
            note=c.note,
            extra=memory.get(c.who),
        )
        for c in everyone
    ]


def in_a_process(who: str, folder: Path) -> tuple[float, int]:
    """Seconds and bytes of a load. RuntimeError with what the process said where it fails."""
    command = [sys.executable, "-m", "bench.models.bench_transformers", who, str(folder), str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"loading with {who}: {said[-1]}")
    seconds, taken = done.stdout.split()[-2:]
    return float(seconds), int(taken)


def measured_load(who: str, folder: Path) -> tuple[float, int]:
    """In this process."""
    load(who, folder / "warm")
    before = given_back()
    start = time.perf_counter()
    model = load(who, folder)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().view(-1)[::1024].sum()
    return time.perf_counter() - start, high_water() - before


# ---- Trainer ----------------------------------------------------------------------------------------------------------------


def training(folder: Path, batches: list[torch.Tensor], repeat: int, limits: Limits) -> list[Row]:
    """``STEPS`` steps a round for each, by ``Trainer.train()``, whose beginning and end are in the time; the figure is of one."""
    everyone, losses = trainers(folder, batches)
    present = [c for c in everyone if c.run is not None]
    times = interleave([c.run for c in present], repeat, budget=600.0)
    print(smollm2.side_by_side(losses), end="\n\n")
    shape = f"SmolLM2-135M, {smollm2.SEQUENCES}x{smollm2.LENGTH} tokens, bf16, r={smollm2.RANK}, a step of {STEPS}"
    seconds = {c.who: [t / STEPS for t in own] for c, own in zip(present, times, strict=True)}
    return rows_of(Case(f"{HEADLINE}, {shape}", Work(0, 0), everyone, STEP), limits, seconds, {})


def trainers(folder: Path, batches: list[torch.Tensor]) -> tuple[list[Candidate], dict[str, list[float]]]:
    """Both with a run that trains on, from the same adapters, and the losses that they will have seen."""
    losses: dict[str, list[float]] = {}
    model = load(OURS_STORED, folder)
    torch.manual_seed(0)
    config = peftk.LoraConfig(r=smollm2.RANK, lora_alpha=smollm2.ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    peftk.attach(model, config)
    with tempfile.TemporaryDirectory() as adapter, tempfile.TemporaryDirectory() as out:
        peftk.save_adapter(model, adapter)

        def theirs() -> peers.Run:
            import peft

            wrapped = peft.PeftModel.from_pretrained(load(THEIRS_STORED, folder), adapter, is_trainable=True)
            return run_of(wrapped, batches, out, losses.setdefault(TRAINED_THEIRS, []))

        everyone = [
            Candidate(TRAINED, run_of(model, batches, out, losses.setdefault(TRAINED, []))),
            peers.candidate(TRAINED_THEIRS, [peers.HF_PEFT, peers.BITSANDBYTES], theirs),
        ]
    return everyone, losses


def run_of(model: nn.Module, batches: list[torch.Tensor], out: str, losses: list[float]) -> Callable[[], Any]:
    import transformers

    data = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
    arguments = transformers.TrainingArguments(
        out,
        max_steps=len(batches),
        per_device_train_batch_size=len(batches[0]),
        learning_rate=smollm2.RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)

    def run() -> None:
        trainer.train()
        losses.extend(row["loss"] for row in trainer.state.log_history if "loss" in row)

    return run


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(*measured_load(sys.argv[1], Path(sys.argv[2])))
