"""peftk merge: a whole checkpoint with an adapter in its weights, shard by shard."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftk.cli import whole
from peftk.cli.errors import UserError
from peftk.cli.models import MODEL_HELP
from peftk.cli.stored import StoredModel, open_stored
from peftk.streaming.merging import changes
from peftk.streaming.plan import Planned, Stored, Wanted, plan, read
from peftk.streaming.skeleton import Names, dense_layers, layers_to_quantise, linears, tied

SUMMARY = "store a model with an adapter in its weights"
DESCRIPTION = (
    "Writes a folder in Hugging Face's format in which the adapter (LoRA and its variants, AdaLoRA) is part of the weights: added"
    " in fp32, then rounded or quantised once. The base is dense or in bitsandbytes' 4 bits; the result runs without an adapter."
    " A model of any size takes less memory than its largest file. What rounding costs each layer stands in merge_report.csv."
)
FORMS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of ``peftk merge``."""
    parser.add_argument("--model", required=True, metavar="M", help=f"the base: {MODEL_HELP}")
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR", help="an adapter in HF peft's files")
    parser.add_argument(
        "--to", choices=(*FORMS, "nf4", "same"), default="same", help="what the weights are stored as; same: as the base's are"
    )
    whole.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Merge and write the folder whole."""
    whole.check_out(arguments)
    if not arguments.adapter.is_dir():
        raise UserError(f"--adapter {arguments.adapter}: no such folder")
    stored = open_stored(arguments.model)
    kind = stored.config.get("quantization_config") or {}
    if kind and not (kind.get("quant_method") == "bitsandbytes" and kind.get("load_in_4bit")):
        raise UserError(
            f"--model {arguments.model}: quantised by {kind.get('quant_method')}; what is merged is dense or bitsandbytes' NF4"
        )
    to_dense = arguments.to in FORMS
    if (to_dense or kind or arguments.to == "same") and (arguments.block_size or arguments.no_double_quant or arguments.skip):
        raise UserError("--block-size, --no-double-quant, --skip: are for --to nf4 of a dense base")
    try:
        model = stored.skeleton()
        groups = read(stored.source, Names.of(model))
    except ValueError as error:
        raise UserError(f"--model {arguments.model}: {error}") from error
    try:
        planned, dense, files = _planned(arguments, model, groups, bool(kind))
    except (ValueError, OSError) as error:
        raise UserError(f"--adapter {arguments.adapter}: {error}") from error
    config = _config(arguments, stored, planned, dense, groups)
    names = ("to", "block_size", "no_double_quant", "skip", "max_shard_size")
    settings = {name: getattr(arguments, name) for name in names}
    whole.carry_out(whole.Task("merge", arguments, stored, planned, config, (*stored.source.files, *files), settings))


def _planned(
    arguments: argparse.Namespace, model: nn.Module, groups: list[list[Stored]], is_4bit: bool
) -> tuple[Planned, list[str], tuple[Path, ...]]:
    """(what is written, paths of linear layers that are dense then, the adapter's files)."""
    stored = {entry.key for group in groups for entry in group}
    of_4bit = {entry.nf4.facts.quant_type for group in groups for entry in group if entry.nf4 is not None}
    if arguments.to == "nf4" and of_4bit - {"nf4"}:
        raise ValueError(f"--to nf4: the base is in {', '.join(sorted(of_4bit))}; --to same keeps it so")
    quantise = layers_to_quantise(model, arguments.skip, stored) if arguments.to == "nf4" and not is_4bit else []
    layers, shared = linears(model), tied(model)
    vocabulary = _vocabulary(model)
    others = dense_layers(model, ())
    found, whole_modules, files = changes(model, arguments.adapter)
    quantise = [path for path in quantise if not any(f"{path}.".startswith(f"{name}.") for name in whole_modules)]
    wanted = Wanted(
        FORMS.get(arguments.to),
        set(quantise),
        arguments.to not in FORMS,
        arguments.block_size or 64,
        not arguments.no_double_quant,
        {path for path, is_transposed in layers.items() if is_transposed},
        shared,
        vocabulary,
    )
    planned = plan(groups, wanted, found)
    in_4bit = set(planned.quantised)
    return planned, [path for path in others if path not in in_4bit], files


def _vocabulary(model: nn.Module) -> set[str]:
    """Names of the weights of the input embedding and the output head."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {f"{path}.weight" for path, module in model.named_modules() if any(module is end for end in ends)}


def _config(
    arguments: argparse.Namespace, stored: StoredModel, planned: Planned, dense: list[str], groups: list[list[Stored]]
) -> dict[str, Any]:
    config = dict(stored.config)
    if planned.untied:
        config["tie_word_embeddings"] = False
    if arguments.to in FORMS:
        config = whole.in_dtype(config, FORMS[arguments.to])
    if not planned.quantised:
        config.pop("quantization_config", None)
    elif "quantization_config" in config:
        config["quantization_config"] = {**config["quantization_config"], "llm_int8_skip_modules": dense}
    else:
        dtypes = {entry.key: entry.dtype for group in groups for entry in group if entry.is_float}
        compute = str(dtypes[f"{planned.quantised[0]}.weight"]).removeprefix("torch.")
        config["quantization_config"] = whole.quantization_config(not arguments.no_double_quant, compute, dense)
    return config
