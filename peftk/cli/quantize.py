"""peftk quantize: a whole checkpoint with its linear layers in 4 bits, in bitsandbytes' form, shard by shard."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from peftk.cli import whole
from peftk.cli.errors import UserError
from peftk.cli.models import DTYPES, MODEL_HELP
from peftk.cli.stored import StoredModel, open_stored
from peftk.streaming.plan import Planned, Wanted, plan, read
from peftk.streaming.skeleton import Names, dense_layers, layers_to_quantise, linears

SUMMARY = "store a model with its linear layers in 4 bits"
DESCRIPTION = (
    "Writes a folder in Hugging Face's format: NF4 weights with double quantisation under bitsandbytes' keys, which transformers"
    " with bitsandbytes reads, and --model of the other commands. A tensor is read, quantised and written in pieces: a model of"
    " any size takes less memory than its largest file. The error of each layer is told in quantize_report.csv and .png."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of ``peftk quantize``."""
    parser.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    parser.add_argument(
        "--dtype",
        choices=("stored", *DTYPES),
        default="stored",
        help="of what stays dense, and the one that 4-bit weights decode to",
    )
    whole.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Quantise and write the folder whole."""
    whole.check_out(arguments)
    stored = open_stored(arguments.model)
    if stored.config.get("quantization_config"):
        kind = stored.config["quantization_config"].get("quant_method")
        is_4bit = stored.config["quantization_config"].get("load_in_4bit")
        raise UserError(f"--model {arguments.model}: " + ("is in 4 bits already" if is_4bit else f"is quantised, by {kind}"))
    double_quant = not arguments.no_double_quant
    try:
        planned, dense, compute = _planned(arguments, stored, double_quant)
    except ValueError as error:
        raise UserError(f"--model {arguments.model}: {error}") from error
    config = dict(stored.config)
    if arguments.dtype != "stored":
        config = whole.in_dtype(config, DTYPES[arguments.dtype])
        compute = str(DTYPES[arguments.dtype]).removeprefix("torch.")
    config["quantization_config"] = whole.quantization_config(double_quant, compute, dense)
    settings = {name: getattr(arguments, name) for name in ("dtype", "block_size", "no_double_quant", "skip", "max_shard_size")}
    whole.carry_out(whole.Task("quantize", arguments, stored, planned, config, stored.source.files, settings))


def _planned(arguments: argparse.Namespace, stored: StoredModel, double_quant: bool) -> tuple[Planned, list[str], str]:
    """(what is written, paths of linear layers that stay dense, the dtype to compute in)."""
    model = stored.skeleton()
    groups = read(stored.source, Names.of(model))
    by_key = {entry.key: entry for group in groups for entry in group}
    paths = layers_to_quantise(model, arguments.skip, by_key)
    if not paths:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantise")
    transposed = [path for path, is_transposed in linears(model).items() if is_transposed]
    dtype: Any = None if arguments.dtype == "stored" else DTYPES[arguments.dtype]
    wanted = Wanted(dtype, set(paths), True, arguments.block_size or 64, double_quant, set(transposed))
    planned = plan(groups, wanted)
    compute: torch.dtype = by_key[f"{paths[0]}.weight"].dtype
    return planned, dense_layers(model, planned.quantised), str(compute).removeprefix("torch.")
