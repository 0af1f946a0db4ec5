"""csrc/ops/adamw_step/cuda.cu, cuda_8bit.cu"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftk.native import NATIVE_DTYPE
from peftk.ops import gpu
from peftk.ops.adamw_step.code_tables import code_tables
from peftk.ops.dispatch import Implementation, reasons_against_dtype

Tensors = Sequence[torch.Tensor]


def reasons_against(params: Tensors, *_: object) -> list[str]:
    return gpu.cuda().reasons_against(params[0]) + reasons_against_dtype("params", params[0].dtype)


def run(params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, coefficients: Sequence[float]) -> None:
    gpu.cuda().call("adamw_step", _listed(params, grads, exp_avg, exp_avg_sq), NATIVE_DTYPE[params[0].dtype], list(coefficients))


def run8(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    absmax1: Tensors,
    absmax2: Tensors,
    coefficients: Sequence[float],
) -> None:
    tensors = _listed(params, grads, state1, state2, absmax1, absmax2)
    tables = code_tables(params[0].device)
    gpu.cuda().call("adamw_step8", tensors, NATIVE_DTYPE[params[0].dtype], list(coefficients), tables)


def _listed(params: Tensors, *others: Tensors) -> list[tuple]:
    """A tuple for each parameter: its tensors, and its count of elements."""
    return list(zip(params, *others, [p.numel() for p in params], strict=True))


IMPLEMENTATION = Implementation("cuda", run, reasons_against)
IMPLEMENTATION8 = Implementation("cuda", run8, reasons_against)
