"""The program ``peftk``, also ``python -m peftk``: one module a command."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence

import torch

from peftk.cli import bench, finetune, generate, info, memory, merge, quantize
from peftk.cli.errors import UserError

__all__ = ["main"]

COMMANDS = (finetune, generate, quantize, merge, memory, bench, info)
USER_ERROR = 2  # argparse's own exit status for a bad flag


def parser() -> argparse.ArgumentParser:
    """Every command and flag."""
    program = argparse.ArgumentParser(
        prog="peftk",
        description="Fine-tune language models cheaply: LoRA on a 4-bit base, on a GPU or a plain CPU.",
        epilog="peftk COMMAND --help lists a command's flags.",
    )
    commands = program.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        name, passes_on = module.__name__.rpartition(".")[2], getattr(module, "PASSES_ON", False)
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            add_help=not passes_on,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=name, **({"rest": []} if passes_on else {}))
    return program


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 or what the command returns (peftk memory: 1 where a card is too small), 2
    where the user's input is at fault or memory runs out, 130 after Ctrl-C and 143 after SIGTERM. Errors of the program itself
    are raised."""
    program = parser()
    arguments, rest = program.parse_known_args(argv)
    if hasattr(arguments, "rest"):
        arguments.rest = rest
    elif rest:
        program.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("peftk").setLevel(logging.INFO)
    try:
        status = arguments.run(arguments)
    except UserError as error:
        print(f"peftk {arguments.command}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except ImportError as error:
        if "peftk[" not in str(error):
            raise
        print(f"peftk {arguments.command}: error: {error}", file=sys.stderr)
        return USER_ERROR
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        told = str(error).partition("\n")[0] or type(error).__name__
        print(f"peftk {arguments.command}: error: out of memory ({told}): peftk memory tells what a run takes", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        told = " ".join(["interrupted", *map(str, interrupt.args[:1])])
        print(f"\npeftk {arguments.command}: {told}", file=sys.stderr)
        return 128 + getattr(interrupt, "signum", signal.SIGINT)
    return status or 0


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
