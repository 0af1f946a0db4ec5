"""peftk info: which implementations run on this machine, and why the others don't; of an op and shapes, which takes them."""

from __future__ import annotations

import argparse

import torch

import peftk
from peftk.cli import flags
from peftk.cli.errors import UserError
from peftk.ops.choices import CALLS, DEVICES

SUMMARY = "what runs on this machine, and why not"
DESCRIPTION = """Lists the implementations of peftk's operations that run on this machine and the reasons against the others. Of
an operation: which of them takes tensors of these shapes, forward and backward, and why not the others. Asking needs no GPU."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {
    "m": (1, "rows of x, tokens of a batch"),
    "n": (4096, "rows of W, outputs"),
    "k": (4096, "columns of W, inputs"),
    "r": (16, "rank of the low-rank branch"),
    "block-size": (64, "elements that share a constant"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An operation and the shapes it is asked about."""
    parser.add_argument("op", nargs="?", metavar="OP", help=f"an operation: {', '.join(CALLS)}")
    for name, (default, meaning) in SIZES.items():
        parser.add_argument(f"--{name}", type=flags.positive_int, default=default, help=meaning)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of x, A and B")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where the tensors would lie")


def run(arguments: argparse.Namespace) -> None:
    """Print ``peftk.info()``, or ``peftk.ops.explain()`` of the operation."""
    if arguments.op is None:
        print(peftk.info())
        return
    sizes = {name.replace("-", "_"): getattr(arguments, name.replace("-", "_")) for name in SIZES}
    try:
        print(peftk.ops.explain(arguments.op, dtype=DTYPES[arguments.dtype], device=arguments.device, **sizes))
    except ValueError as error:
        raise UserError(str(error)) from None
