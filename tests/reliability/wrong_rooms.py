"""Wrong calls of the rooms beside ops, optimizers and configs: recipes, templates, base layers, pages, state dicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tiny_models import Net, net

import peftk
from peftk import nn, ops, optim, paging

Wrong = tuple[Callable[[], Any], str, str]  # the call, the argument's name, what of it the message repeats

W4 = peftk.quantize_nf4(torch.linspace(-1, 1, 5 * 64).view(5, 64))
PARTS = W4.tensors()
IDS = {"ids": torch.ones(1, 2, dtype=torch.int64)}
QLORA = {"gradient_checkpointing": False, "progress": False}


def adapted(**fields: Any) -> Net:
    return peftk.attach(net(), peftk.LoraConfig(r=2, target_modules=["q"], **fields))


def for_eva() -> Net:
    return adapted(init_lora_weights="eva")


def words(text: str, **_: Any) -> dict[str, list[int]]:
    """A tokenizer."""
    return {"input_ids": [1, 2]}


def decoded(part: int, value: Any) -> Callable[[], Any]:
    """nf4_dequantize with one of the weight's four parts another."""
    return lambda: ops.nf4_dequantize(*[value if i == part else there for i, there in enumerate(PARTS)], (5, 64))


def layer() -> nn.NF4Linear:
    return nn.NF4Linear(64, 4)


RECIPES: dict[str, list[Wrong]] = {
    "HardTemplate": [
        (lambda: peftk.HardTemplate(3, words), "template", "3"),
        (lambda: peftk.HardTemplate("no place", words), "template", "no place"),
        (lambda: peftk.HardTemplate("[mask] {x}", words), "template", r"\[mask\] \{x\}"),
    ],
    "Verbalizer": [
        (lambda: peftk.Verbalizer([], words), "labels", r"\[\]"),
        (lambda: peftk.Verbalizer(3, words), "labels", "3"),
        (lambda: peftk.Verbalizer("ab", words), "labels", "'ab'"),
        (lambda: peftk.Verbalizer({"a": [], "b": ["b"]}, words), "labels", r"'a': \[\]"),
        (lambda: peftk.Verbalizer(["a", "b"], words, "median"), "score", "'median'"),
    ],
    "eva_init": [
        (lambda: peftk.eva_init(net(), [IDS]), "model", "Net"),
        (lambda: peftk.eva_init(adapted(), [IDS]), "adapter_name", "'default'"),
        (lambda: peftk.eva_init(for_eva(), []), "dataloader", "none"),
        (lambda: peftk.eva_init(for_eva(), 3), "dataloader", "int"),
        (lambda: peftk.eva_init(for_eva(), [IDS], max_batches=0), "max_batches", "0"),
    ],
    "lora_plus_groups": [
        (lambda: peftk.lora_plus_groups(net(), 1e-3), "model", "Net"),
        (lambda: peftk.lora_plus_groups(adapted(), -1.0), "lr", "-1.0"),
        (lambda: peftk.lora_plus_groups(adapted(), math.nan), "lr", "nan"),
        (lambda: peftk.lora_plus_groups(adapted(), "1"), "lr", "'1'"),
        (lambda: peftk.lora_plus_groups(adapted(), 1e-3, 0.5), "ratio", "0.5"),
        (lambda: peftk.lora_plus_groups(adapted(), 1e-3, weight_decay=-1.0), "weight_decay", "-1.0"),
    ],
    "precision_at_1": [
        (lambda: peftk.precision_at_1(torch.ones(0, 3), torch.ones(0).long()), "scores", r"\(0, 3\)"),
        (lambda: peftk.precision_at_1(torch.ones(2), torch.ones(2).long()), "scores", r"\(2,\)"),
        (lambda: peftk.precision_at_1(torch.ones(2, 3), torch.ones(3).long()), "targets", r"\(3,\)"),
        (lambda: peftk.precision_at_1(torch.ones(2, 3), torch.ones(2)), "targets", "float32"),
        (lambda: peftk.precision_at_1(torch.ones(2, 3), torch.tensor([0, 3])), "targets", r"\[0, 3\]"),
    ],
    "prompt_ensemble": [
        (lambda: peftk.prompt_ensemble(net(), ["default"], **IDS), "model", "Net"),
        (lambda: peftk.prompt_ensemble(adapted(), ["other"], **IDS), "names", "'other'"),
        (lambda: peftk.prompt_ensemble(adapted(), [], **IDS), "names", r"\[\]"),
        (lambda: peftk.prompt_ensemble(adapted(), ["default"]), "inputs", "nothing"),
    ],
    "qlora": [
        (lambda: peftk.qlora(3), "model", "int"),
        (lambda: peftk.qlora(net()), "gradient_checkpointing", "Net"),
        (lambda: peftk.qlora(net(), {"r": 8}, **QLORA), "config", "dict"),
        (lambda: peftk.qlora(net(), block_size=3, **QLORA), "block_size", "3"),
        (lambda: peftk.qlora(net(), skip="head", **QLORA), "skip", "'head'"),
    ],
    "qlora_config": [
        (lambda: peftk.qlora_config(r=0), "r", "0"),
        (lambda: peftk.qlora_config(rank=8), "rank", "unexpected"),
    ],
    "qlora_recipe": [
        (lambda: peftk.qlora_recipe(-1), "model", "-1"),
        (lambda: peftk.qlora_recipe(math.nan), "model", "nan"),
        (lambda: peftk.qlora_recipe("7b"), "model", "'7b'"),
    ],
    "report": [(lambda: peftk.report(3), "model", "int")],
    "use_int8_activations": [(lambda: peftk.use_int8_activations("yes").__enter__(), "enabled", "'yes'")],
}
OPS: dict[str, list[Wrong]] = {
    "explain": [
        (lambda: ops.explain("nf4"), "op", "'nf4'"),
        (lambda: ops.explain("nf4_linear", m=-1), "m", "-1"),
        (lambda: ops.explain("nf4_linear", k=1.5), "k", "1.5"),
        (lambda: ops.explain("nf4_linear", dtype=torch.int8), "dtype", "int8"),
        (lambda: ops.explain("nf4_linear", device="tpu"), "device", "'tpu'"),
        (lambda: ops.explain("nf4_linear", block_size=63), "block_size", "63"),
    ],
    "nf4_dequantize": [
        (decoded(0, PARTS[0].view(torch.int8)), "packed", "int8"),
        (decoded(0, PARTS[0][:-1]), "packed", "159"),
        (decoded(1, PARTS[1][:-1]), "absmax", "4"),
        (decoded(1, PARTS[1].float()), "absmax", "float32"),
        (decoded(1, PARTS[1].to("meta")), "absmax", "meta"),
        (decoded(2, PARTS[2].half()), "absmax_scale", "float16"),
        (decoded(2, None), "absmax_scale", "None"),
        (decoded(3, torch.ones(2)), "absmax_offset", "2"),
        (lambda: ops.nf4_dequantize(*PARTS, (-5, 64)), "shape", "-5"),
        (lambda: ops.nf4_dequantize(*PARTS, (5, 64), 0), "block_size", "0"),
        (lambda: ops.nf4_dequantize(*PARTS, (5, 64), 32), "absmax", "blocks of 32"),
        (lambda: ops.nf4_dequantize(*PARTS, (5, 64), 64, "int4"), "quant_type", "'int4'"),
        (lambda: ops.nf4_dequantize(*PARTS, (5, 64), dtype=torch.int8), "dtype", "int8"),
        (lambda: ops.nf4_dequantize(*PARTS, (5, 64), out=torch.ones(4)), "out", r"\(4,\)"),
    ],
}
OPTIM: dict[str, list[Wrong]] = {
    "to_bitsandbytes": [
        (lambda: optim.to_bitsandbytes({}), "state_dict", r"\[\]"),
        (lambda: optim.to_bitsandbytes(3), "state_dict", "int"),
    ],
    "to_torch": [
        (lambda: optim.to_torch({}), "state_dict", r"\[\]"),
        (lambda: optim.to_torch(optim.Lion([torch.nn.Parameter(torch.ones(4))], lr=0.1).state_dict()), "state_dict", "betas"),
    ],
}
PAGING: dict[str, list[Wrong]] = {
    "empty": [
        (lambda: paging.empty((4,), torch.float32, "meta"), "device", "meta"),
        (lambda: paging.empty((-4,), torch.float32, "cpu"), "shape", "-4"),
    ],
    "Pager": [
        (lambda: paging.Pager("meta"), "device", "meta"),
        (lambda: paging.Pager("nowhere"), "device", "nowhere"),
        (lambda: paging.Pager("cpu", -1), "budget", "-1"),
        (lambda: paging.Pager("cpu", 1.5), "budget", "1.5"),
        (lambda: paging.Pager("cpu", folder="/nowhere/at/all"), "folder|nowhere", "/nowhere/at/all"),
    ],
    "resident": [
        (lambda: paging.resident([]), "tensors", "none"),
        (lambda: paging.resident([torch.ones(4)]), "tensors", r"\(4,\)"),
    ],
}
NN: dict[str, list[Wrong]] = {
    "DenseConv1D": [
        (lambda: nn.DenseConv1D(torch.nn.Parameter(torch.ones(4)), None), "weight", r"\(4,\)"),
        (lambda: nn.DenseConv1D.from_conv1d(torch.nn.Linear(4, 4)), "conv1d", "Linear"),
    ],
    "DenseLinear": [
        (lambda: nn.DenseLinear.from_linear(torch.nn.ReLU()), "linear", "ReLU"),
        (lambda: nn.DenseLinear(4, 4).set_dense_weight(torch.ones(4)), "w", r"\(4,\)"),
    ],
    "Experts": [(lambda: nn.Experts.from_module(torch.nn.Linear(4, 4)), "module", "Linear")],
    "NF4Linear": [
        (lambda: nn.NF4Linear(-1, 4), "in_features", "-1"),
        (lambda: nn.NF4Linear(64, 4, block_size=63), "block_size", "63"),
        (lambda: nn.NF4Linear(64, 4, compute_dtype=torch.int8), "compute_dtype", "int8"),
        (lambda: nn.NF4Linear.from_linear(torch.nn.ReLU()), "linear", "ReLU"),
        (lambda: layer().set_dense_weight(torch.ones(4)), "w", r"\(4,\)"),
        (lambda: layer().set_dense_weight(torch.full((4, 64), math.nan)), "w", "nan"),
        (lambda: layer().restore_weight(W4), "snapshot", r"\(5, 64\)"),
        (lambda: layer()(torch.ones(3, 63)), "x", r"\(3, 63\)"),
        (lambda: layer()(torch.ones(3, 64).long()), "x", "int64"),
    ],
    "base_layer": [(lambda: nn.base_layer(torch.nn.ReLU()), "module", "ReLU")],
    "constants_as_parameters": [(lambda: nn.constants_as_parameters(3), "model", "int")],
    "quantizable": [
        (lambda: nn.quantizable(3), "model", "int"),
        (lambda: nn.quantizable(net(), "head"), "skip", "'head'"),
    ],
    "use_int8_activations": RECIPES["use_int8_activations"],
}
