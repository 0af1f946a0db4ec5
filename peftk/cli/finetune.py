"""peftk finetune: a model, a text, a few minutes; an adapter in HF peft's format."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftk
from peftk.cli import adapters, flags, output, resume
from peftk.cli.errors import UserError
from peftk.cli.interrupt import asked_to_stop
from peftk.cli.models import DTYPES, MODEL_HELP, Opened, open_for, resolve_device, resolve_dtype
from peftk.cli.prepare import kept_dense, prepare_base
from peftk.cli.process_memory import keep_freed_memory, peak_bytes, readable
from peftk.cli.rank_plot import draw_ranks
from peftk.cli.tasks import TASKS, Task
from peftk.cli.training import SCHEDULES, Data, Plan, Progress, train
from peftk.methods.prompts import max_positions

SUMMARY = "train an adapter on a text, on pairs or on labels"
DESCRIPTION = (
    "Trains an adapter or a prompt on texts and conversations, on pairs of a text or a recording with a text, or on labelled"
    " texts and words. By default the model's linear layers are held in 4 bits (QLoRA). DIR gets the adapter in HF peft's format,"
    " loss.csv and loss.png."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of ``peftk finetune``."""
    what = parser.add_argument_group("what to train on what")
    what.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    what.add_argument(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="causal-lm: text files, or .jsonl with 'prompt' and 'completion' or with 'messages' in each line; seq2seq: .jsonl"
        " with 'source' or 'audio' (a .wav file) and 'target'; classification: with 'text' (and 'text_pair') and 'label';"
        " token-classification: with 'tokens' and 'tags'",
    )
    about = "; ".join(f"{name}: {task.about}" for name, task in TASKS.items())
    what.add_argument("--task", choices=TASKS, default="causal-lm", help=about)
    what.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the adapter and the losses")
    what.add_argument("--resume", action="store_true", help="go on with the unfinished run in DIR")
    what.add_argument("--overwrite", action="store_true", help="remove an earlier run's files from DIR")

    adapters.add_arguments(parser.add_argument_group("adapter"))

    rates = ", ".join(f"{method.lr:g} for {name}" for name, method in adapters.METHODS.items())
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=flags.positive_int, default=None, help="optimizer steps; instead of --epochs")
    length.add_argument("--epochs", type=flags.positive_float, default=1.0, help="passes over the data")
    training.add_argument("--lr", type=flags.positive_float, default=None, help=f"highest learning rate; None: {rates}")
    training.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="the rate after the warm-up")
    training.add_argument("--warmup", type=flags.non_negative_float, default=0.05, help="steps; below 1 a share of them")
    training.add_argument("--batch-size", type=flags.positive_int, default=4, help="sequences or records at a time")
    training.add_argument("--grad-accum", type=flags.positive_int, default=2, help="batches a step")
    training.add_argument(
        "--seq-len", type=flags.sequence_length, default=256, help="tokens a sequence; the most of a record's text, or of either"
    )
    training.add_argument("--max-grad-norm", type=flags.non_negative_float, default=1.0, help="0 for no clipping")
    training.add_argument("--weight-decay", type=flags.non_negative_float, default=0.0, help="AdamW's")
    training.add_argument("--seed", type=flags.seed, default=0, help="of adapter, order, split and dropout")
    training.add_argument("--eval-fraction", type=flags.share, default=0.05, help="share of the data held out")
    training.add_argument("--eval-every", type=flags.non_negative_int, default=0, help="steps; 0: at start and end")
    training.add_argument(
        "--eval-generate",
        type=flags.non_negative_int,
        default=32,
        help="seq2seq: to how many held-out records an answer is generated, for the word error rate; 0: none",
    )
    training.add_argument("--save-every", type=flags.non_negative_int, default=20, help="steps between checkpoints; 0: none")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    machine.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of activations and dense weights")
    machine.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compute activations again in the backward pass: less memory, a third more time",
    )
    machine.add_argument("--threads", type=flags.positive_int, default=None, help="CPU threads; torch's choice by default")


def run(arguments: argparse.Namespace) -> None:
    """Train, or go on training, and leave a finished folder."""
    out: Path = arguments.out
    adapters.settle(arguments)
    task = TASKS[arguments.task]
    for path in arguments.data:
        if not path.is_file():
            raise UserError(f"--data {path}: no such file; expected text or JSONL")
    output.check_folder(out, arguments.resume, arguments.overwrite)
    before = output.read_run(out) if arguments.resume else None
    if before is not None and "summary" in before:
        shutil.rmtree(out / output.CHECKPOINTS, ignore_errors=True)  # of a run killed before it did so
        print(f"{out}: this run is finished already")
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    device = resolve_device(arguments.device)
    dtype = resolve_dtype("fp32" if arguments.dtype == "auto" and task.labels else arguments.dtype, device)
    settings = _settings(arguments, dtype, device)
    if before is not None:
        output.check_same_settings(before["settings"], settings, out)
    torch.manual_seed(arguments.seed)
    records = task.read(arguments.data)
    labels = task.labels(records) if task.labels else None
    opened = open_for(task.task_type, arguments.model, labels)
    split = arguments.seq_len, arguments.eval_fraction, arguments.seed
    _check_length(arguments, opened)
    data, held_out = task.encode(records, opened.tokenizer, opened.model, *split)
    plan = _plan(arguments, len(data))
    config = _config(arguments, task, opened, labels, plan)
    run_ = {"peftk": peftk.info().versions["peftk"], "settings": settings}
    if labels is not None:
        run_["labels"] = [opened.model.config.id2label[i] for i in range(opened.model.config.num_labels)]
    checkpoint = None if arguments.overwrite else resume.latest_checkpoint(out)
    torch.manual_seed(plan.seed)
    prepare_base(opened.model, arguments.base, dtype, device, kept_dense(task.task_type, opened.new))
    _attach(opened.model, config, arguments, checkpoint)
    with output.claimed(out, arguments.overwrite):
        output.write_run(out, run_)
        progress = _train(arguments, task, opened, data, held_out, plan, checkpoint)
        _finish(out, opened.model, progress, run_, task, device)


def _train(
    arguments: argparse.Namespace,
    task: Task,
    opened: Opened,
    data: Data,
    held_out: Data,
    plan: Plan,
    checkpoint: Path | None,
) -> Progress:
    out: Path = arguments.out
    model = opened.model
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=plan.lr, weight_decay=plan.weight_decay)
    schedule_of = adapters.METHODS[arguments.method].schedule
    schedule = schedule_of(model, optimizer) if schedule_of else None
    loss = task.loss(model)
    progress = resume.restore(checkpoint, optimizer, schedule) if checkpoint else Progress()
    if checkpoint:
        print(f"resuming after step {progress.step} of {plan.steps}")
    device, dtype = resolve_device(arguments.device), next(p.dtype for p in model.parameters() if p.is_floating_point())
    print(
        f"training on {data.targets} {task.unit}s in {len(data)} {task.rows}, {held_out.targets} {task.unit}s held out,"
        f" {plan.steps} steps, {device.type} {str(dtype).removeprefix('torch.')}"
    )
    losses = output.LossFile(out, progress.rows, task.metrics)
    with contextlib.closing(losses), asked_to_stop() as stop:
        return train(
            loss,
            optimizer,
            data,
            held_out,
            plan,
            progress,
            losses.append,
            lambda position: resume.save_checkpoint(out, model, optimizer, position, schedule),
            lambda: task.measure(loss, held_out, arguments, opened.tokenizer),
            stop,
        )


def _settings(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """All that decides the losses, by flag name; as JSON would give it back."""
    left_out = ("run", "command", "out", "resume", "overwrite", "threads", "save_every", "data", "dtype", "device")
    settings = {name: value for name, value in vars(arguments).items() if name not in left_out}
    settings["data"] = [{"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in arguments.data]
    settings["dtype"] = {dtype_: name for name, dtype_ in DTYPES.items()}[dtype]
    settings["device"] = device.type
    if settings["steps"] is not None:
        settings.pop("epochs")
    return settings


def _config(arguments: argparse.Namespace, task: Task, opened: Opened, labels: list[str] | None, plan: Plan) -> Any:
    """The adapter's config. UserError where the longest sequence leaves it no room."""
    new = list(opened.new) or None
    setting = adapters.Setting(task.task_type, arguments.model, opened.model, opened.tokenizer, labels, new, plan.steps)
    config = adapters.make_config(arguments, setting)
    _check_length(arguments, opened, adapters.positions_taken(config))
    return config


def _check_length(arguments: argparse.Namespace, opened: Opened, added: int = 0) -> None:
    longest = max_positions(opened.model)
    if longest is not None and arguments.seq_len + added > longest:
        taken = f", these and the {added} virtual ones of --method {arguments.method}" if added else ""
        raise UserError(f"--seq-len {arguments.seq_len}: the model takes at most {longest} tokens{taken}: lower it")


def _plan(arguments: argparse.Namespace, sequences: int) -> Plan:
    per_step = arguments.batch_size * arguments.grad_accum
    steps = arguments.steps or max(1, -(-int(arguments.epochs * sequences) // per_step))
    warmup = arguments.warmup * steps if arguments.warmup < 1 else arguments.warmup
    if warmup > steps:
        raise UserError(f"--warmup {arguments.warmup:g}: longer than the run, which has {steps} steps: lower it, or train longer")
    return Plan(
        steps=steps,
        batch_size=arguments.batch_size,
        grad_accum=arguments.grad_accum,
        lr=arguments.lr,
        schedule=arguments.schedule,
        warmup_steps=round(warmup),
        max_grad_norm=arguments.max_grad_norm,
        weight_decay=arguments.weight_decay,
        seed=arguments.seed,
        eval_every=arguments.eval_every,
        save_every=arguments.save_every,
    )


def _attach(model: nn.Module, config: Any, arguments: argparse.Namespace, checkpoint: Path | None) -> None:
    if checkpoint:
        peftk.load_adapter(model, checkpoint / resume.ADAPTER, is_trainable=True)
        return
    try:
        peftk.attach(model, config)
    except ValueError as error:
        flag = f"--method {arguments.method}"
        if str(error).startswith("target_modules"):
            flag = f"--target-modules {' '.join(arguments.target_modules)}"
        raise UserError(f"{flag}: {error}") from error


def _finish(out: Path, model: nn.Module, progress: Progress, run_: dict[str, Any], task: Task, device: torch.device) -> None:
    output.publish_adapter(out, lambda folder: peftk.save_adapter(model, folder))
    measured = [row for row in progress.rows if row.eval_loss is not None]
    report = peftk.report(model)
    summary = {
        "base_parameters": report.frozen.elements,
        "base_bytes": report.frozen.bytes,
        "adapter_parameters": report.trainable.elements,
        "adapter_bytes": report.trainable.bytes,
        "trainable_share": report.trainable_share,
        "held_out_loss_before": measured[0].eval_loss if measured else None,
        "held_out_loss_after": measured[-1].eval_loss if measured else None,
        "metrics_before": measured[0].metrics if measured else {},
        "metrics_after": measured[-1].metrics if measured else {},
        "tokens_per_second": progress.tokens_per_second,
        "minutes": progress.seconds / 60,
        "peak_memory_bytes": peak_bytes(device),
    }
    settings = run_["settings"]
    title = f"{settings['model']}, {settings['method']}"
    output.draw_losses(out, progress.rows, title, task.unit)
    if settings["method"] == "adalora":
        draw_ranks(out / "ranks.png", peftk.rank_allocator(model).history, last_step=progress.step)
    output.write_run(out, {**run_, "summary": summary})
    shutil.rmtree(out / output.CHECKPOINTS, ignore_errors=True)
    _print_summary(out, summary)


def _print_summary(out: Path, summary: dict[str, Any]) -> None:
    if summary["held_out_loss_before"] is None:
        held_out = "not measured (--eval-fraction 0)"
    else:
        held_out = f"{summary['held_out_loss_before']:.3f} -> {summary['held_out_loss_after']:.3f}"
    before = summary["metrics_before"]
    lines = {
        "base": f"{readable(summary['base_bytes'])}, {summary['base_parameters']:,} parameters",
        "adapter": f"{readable(summary['adapter_bytes'])}, {summary['adapter_parameters']:,} parameters"
        f" ({summary['trainable_share']:.2%} of all)",
        "held-out loss": held_out,
        **{name.replace("_", " "): f"{before[name]:.3f} -> {value:.3f}" for name, value in summary["metrics_after"].items()},
        "speed": f"{summary['tokens_per_second']:.0f} tokens/s",
        "training": f"{summary['minutes']:.1f} minutes",
        "peak memory": readable(summary["peak_memory_bytes"]),
        "written to": str(out),
    }
    for name, value in lines.items():
        print(f"{name:<14} {value}")
