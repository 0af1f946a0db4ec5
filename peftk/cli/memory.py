"""peftk memory: what a training step will take, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

import peftk
from peftk import planner
from peftk.cli import adapters, flags
from peftk.cli.errors import UserError, require
from peftk.cli.gguf import gguf_config
from peftk.cli.loss import LanguageModelLoss
from peftk.cli.models import DTYPES
from peftk.cli.named import NAMED, path_of
from peftk.cli.prepare import prepare_base
from peftk.cli.process_memory import readable

SUMMARY = "what a training step will take, and whether it fits a card"
DESCRIPTION = (
    "Runs a training step without memory (shapes only, no weights are loaded) and prints what lies there at its fullest moment."
    " With --card it says whether that fits, and what to change where it doesn't; the exit status is 1 then."
)

FULL = "full"
OPTIMIZERS = {  # (bits, paged)
    "adamw": (32, False),
    "adamw8bit": (8, False),
    "paged-adamw": (32, True),
    "paged-adamw8bit": (8, True),
}
# The flags of peftk finetune's methods that decide on memory; the others have their defaults, and prompts start at random.
ADAPTER_FLAGS = (
    "r",
    "init_r",
    "target_modules",
    "dropout",
    "num_virtual_tokens",
    "prefix_projection",
    "encoder",
    "encoder_hidden_size",
)
DOES_NOT_FIT = 1
FIGURES = {"qlora": ("llama-7b", "llama-13b", "llama-33b", "llama-65b")}
QLORA_TITLE = "LLaMA with QLoRA (r = 64 on all linear layers), batch 1, 512 tokens"
QLORA_CARDS = [("24 GB", 24 * 10**9), ("48 GB", 48 * 10**9)]
QLORA_FIGURE = {"r": 64, "dropout": 0.0}  # rank as in the paper's runs; dropout's mask is never stored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of ``peftk memory``."""
    names = ", ".join(planner.GEOMETRIES)
    what = parser.add_argument_group("what is trained")
    what.add_argument("--model", metavar="M", help=f"what finetune takes (a folder, a .gguf file, 'smollm2'), or {names}")
    what.add_argument(
        "--figure", choices=FIGURES, help="qlora: LLaMA 7B to 65B as in the paper's figure, in the place of --model"
    )
    adapters.add_arguments(parser.add_argument_group("adapter"), ADAPTER_FLAGS, {FULL: "every weight is trained"})
    step = parser.add_argument_group("step")
    step.add_argument("--batch-size", type=flags.positive_int, default=1, help="sequences at a time, on each GPU")
    step.add_argument("--seq-len", type=flags.sequence_length, default=512, help="tokens a sequence")
    step.add_argument("--grad-accum", type=flags.positive_int, default=1, help="batches a step")
    step.add_argument("--dtype", choices=DTYPES, default="bf16", help="of activations and dense weights")
    step.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False, help="compute activations again"
    )
    step.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="peftk.optim's")
    step.add_argument("--budget", type=flags.size, default=None, help="bytes of paged states that stay, such as 2GB")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="whose ways to compute, and whose overheads")
    machine.add_argument("--gpus", type=flags.positive_int, default=1, help="that share the work")
    machine.add_argument(
        "--sharding", choices=planner.SHARDINGS, default="ddp", help="ddp: all hold all; fsdp: FSDP2; tp: tensor parallel"
    )
    machine.add_argument("--card", type=flags.card, default=None, metavar="CARD", help=f"a size, or {', '.join(planner.CARDS)}")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON in the place of the table")
    output.add_argument("--plot", type=Path, default=None, metavar="PNG", help="stacked bars")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0, or 1 where there is a card that it doesn't fit."""
    require("transformers", "hf").utils.logging.set_verbosity_error()
    if (arguments.model is None) == (arguments.figure is None):
        raise UserError("--model: expected a model, or --figure in its place")
    if arguments.plot is not None:
        require("matplotlib", "plot")
    if arguments.figure:
        return _figure(arguments)
    choice = choice_of(arguments)
    found = plan_of(arguments, choice)
    card = None if arguments.card is None else arguments.card[1]
    fits = card is None or found.total <= card
    advice = [] if fits else planner.advise(choice, card, lambda other: plan_of(arguments, other))
    print(_json(arguments, found, advice) if arguments.json else _text(arguments, found, advice))
    if arguments.plot is not None:
        bar = (f"{arguments.model}\n{arguments.method}", found)
        planner.picture.draw(arguments.plot, [bar], [arguments.card] if card else [], _title(arguments))
    return 0 if fits else DOES_NOT_FIT


def choice_of(arguments: argparse.Namespace) -> planner.Choice:
    """What the flags ask for. UserError for flags that don't go together."""
    if arguments.method == FULL:
        given = [name for name in (*ADAPTER_FLAGS, "base") if name in vars(arguments)]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: --method full has no adapter and a dense base")
        base, rank = "dense", None
    else:
        adapters.settle(arguments)
        base = arguments.base
        rank = getattr(arguments, "r", None)
    bits, paged = OPTIMIZERS[arguments.optimizer]
    if arguments.budget is not None and not paged:
        raise UserError(f"--budget: expected only with a paged optimizer, got --optimizer {arguments.optimizer}")
    step = planner.Step(
        batch=arguments.batch_size,
        length=arguments.seq_len,
        checkpointing=arguments.gradient_checkpointing,
        grad_accum=arguments.grad_accum,
        optimizer_bits=bits,
        device_type=arguments.device,
    )
    if arguments.device == "cpu" and arguments.gpus > 1:
        raise UserError(f"--gpus {arguments.gpus}: expected 1 with --device cpu")
    return planner.Choice(
        step,
        planner.Machine(arguments.gpus, arguments.sharding, paged, arguments.budget, arguments.device == "cpu"),
        base,
        rank,
        arguments.method,
    )


def plan_of(arguments: argparse.Namespace, choice: planner.Choice) -> planner.Plan:
    """UserError where the model, the method or a target doesn't fit the others."""
    try:
        blueprint = blueprint_of(arguments, choice)
        return planner.plan(blueprint, LanguageModelLoss, choice.step, choice.machine)
    except ValueError as error:
        raise UserError(f"--model {arguments.model}, --method {choice.method}: {error}") from error


def blueprint_of(arguments: argparse.Namespace, choice: planner.Choice) -> planner.Blueprint:
    """The model as ``peftk finetune`` trains it."""
    return planner.Blueprint(config_of(str(arguments.model)), DTYPES[arguments.dtype], preparation(arguments, choice))


def config_of(name: str) -> Any:
    """Of all that ``peftk finetune`` takes as a decoder, and the planner's names. UserError or ValueError for anything else."""
    path = path_of(name) if name in NAMED else Path(name)
    if name not in planner.GEOMETRIES and path.is_file():
        return gguf_config(path)
    return planner.config_of(name if name in planner.GEOMETRIES else path)


def preparation(arguments: argparse.Namespace, choice: planner.Choice) -> Callable[[nn.Module], Any]:
    """What ``peftk finetune`` does to a loaded model, on whatever device it lies."""
    dtype = DTYPES[arguments.dtype]

    def prepare(model: nn.Module) -> None:
        device = next(model.parameters()).device
        if choice.method == FULL:
            model.to(dtype).requires_grad_(True)
            return
        prepare_base(model, choice.base, dtype, device)
        peftk.attach(model, _config(arguments, choice, model))

    return prepare


def _config(arguments: argparse.Namespace, choice: planner.Choice, model: nn.Module) -> Any:
    known = adapters.METHODS[choice.method].flags
    values = {name: getattr(arguments, name, known[name]) for name in known}
    values |= {name: value for name, value in {"init": "random", "init_text": None, "template": None}.items() if name in known}
    if choice.rank is not None and "r" in known:
        values["r"] = choice.rank
    given = SimpleNamespace(**values, method=choice.method)
    setting = adapters.Setting("CAUSAL_LM", str(arguments.model), model, None, None, None, steps=1000)
    return adapters.make_config(given, setting)


def _title(arguments: argparse.Namespace) -> str:
    checkpointing = ", gradient checkpointing" if arguments.gradient_checkpointing else ""
    gpus = f", {arguments.gpus} GPUs ({arguments.sharding})" if arguments.gpus > 1 else ""
    return f"{arguments.dtype}, {arguments.batch_size} x {arguments.seq_len} tokens{checkpointing}, {arguments.optimizer}{gpus}"


def _text(arguments: argparse.Namespace, found: planner.Plan, advice: list[planner.Change]) -> str:
    base = "" if arguments.method == FULL else f" on a {'4-bit' if arguments.base == 'nf4' else 'dense'} base"
    where = {"cuda": "GPU", "cpu": "CPU"}[arguments.device]
    lines = [f"{arguments.model}, {arguments.method}{base}: {_title(arguments)}; one {where}", ""]
    lines += [f"{kind:<24} {readable(found.parts[kind]):>10}" for kind in planner.picture.kinds_of([found])]
    lines += [f"{'total':<24} {readable(found.total):>10}   fullest in: {found.phase}"]
    if found.paged_out:
        lines.append(f"{'paged out':<24} {readable(found.paged_out):>10}   on the host, or in a file")
    if found.collectives:
        lines.append(f"{'sent by a GPU in a step':<24} {readable(found.sent):>10}   {', '.join(found.collectives)}")
    if arguments.card is None:
        return "\n".join(lines)
    name, card = arguments.card
    gap, label = readable(abs(card - found.total)), f"card {name}"
    verdict = f"fits, {gap} to spare" if found.total <= card else f"too small by {gap}"
    lines += ["", f"{label:<24} {readable(card):>10}   {verdict}"]
    if advice:
        lines += ["", f"{'change':<34} {'alone':>10} {'with all above':>15}"]
        for change in advice:
            mark = "  fits" if change.after <= card else ""
            lines.append(f"{change.what:<34} {readable(change.total):>10} {readable(change.after):>15}{mark}")
    if found.total > card and (not advice or advice[-1].after > card):
        lines.append("Nothing else is left to change: take a larger card or a smaller model.")
    return "\n".join(lines)


def _json(arguments: argparse.Namespace, found: planner.Plan, advice: list[planner.Change]) -> str:
    card = None if arguments.card is None else {"name": arguments.card[0], "bytes": arguments.card[1]}
    told = {
        "model": str(arguments.model),
        "method": arguments.method,
        "parts": found.parts,
        "total": found.total,
        "phase": found.phase,
        "phases": found.phases,
        "paged_out": found.paged_out,
        "sent": found.sent,
        "card": card,
        "fits": None if card is None else found.total <= card["bytes"],
        "changes": [dataclasses.asdict(change) for change in advice],
    }
    return json.dumps(told, indent=1)


def _figure(arguments: argparse.Namespace) -> int:
    """Dettmers et al. 2023, figure 6: LLaMA with QLoRA's settings, batch 1, 512 tokens, gradient checkpointing, paged states."""
    bars = qlora_bars()
    if arguments.plot is not None:
        planner.picture.draw(arguments.plot, bars, QLORA_CARDS, QLORA_TITLE)
    if arguments.json:
        print(json.dumps({name: {"parts": plan.parts, "total": plan.total} for name, plan in bars}, indent=1))
        return 0
    print(f"{'':<24}" + "".join(f"{name:>12}" for name, _ in bars))
    for kind in planner.picture.kinds_of([plan for _, plan in bars]):
        print(f"{kind:<24}" + "".join(f"{readable(plan.parts.get(kind, 0)):>12}" for _, plan in bars))
    print(f"{'total':<24}" + "".join(f"{readable(plan.total):>12}" for _, plan in bars))
    print(f"{'paged out':<24}" + "".join(f"{readable(plan.paged_out):>12}" for _, plan in bars))
    return 0


def qlora_bars() -> list[tuple[str, planner.Plan]]:
    """The figure's bars with their names."""
    return [(name.removeprefix("llama-").upper(), plan) for name, plan in qlora_figure().items()]


def qlora_figure() -> dict[str, planner.Plan]:
    """By model. bf16, as the paper's figure has it: batch 1, 512 tokens, gradient checkpointing, paged optimizer."""
    step = planner.Step(1, 512, checkpointing=True)
    choice = planner.Choice(step, planner.Machine(paged=True), "nf4", QLORA_FIGURE["r"], "qlora")
    return {
        name: plan_of(argparse.Namespace(model=name, dtype="bf16", method="qlora", dropout=QLORA_FIGURE["dropout"]), choice)
        for name in FIGURES["qlora"]
    }
