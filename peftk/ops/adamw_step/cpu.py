"""csrc/ops/adamw_step/cpu.cpp"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peftk.native import NATIVE_DTYPE, native
from peftk.ops.dispatch import Implementation, reasons_against_cpu, reasons_against_dtype

Tensors = Sequence[torch.Tensor]


def reasons_against(params: Tensors, *_: object) -> list[str]:
    return reasons_against_cpu(params[0]) + reasons_against_dtype("params", params[0].dtype)


def run(params: Tensors, grads: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors, coefficients: Sequence[float]) -> None:
    native().adamw_step(_addresses(params, grads, exp_avg, exp_avg_sq), *_rest(params, coefficients))


def run8(
    params: Tensors,
    grads: Tensors,
    state1: Tensors,
    state2: Tensors,
    absmax1: Tensors,
    absmax2: Tensors,
    coefficients: Sequence[float],
) -> None:
    native().adamw_step8(_addresses(params, grads, state1, state2, absmax1, absmax2), *_rest(params, coefficients))


def _addresses(params: Tensors, *others: Tensors) -> list[tuple[int, ...]]:
    """A tuple for each parameter: where its tensors lie, and its count of elements."""
    lists = [[tensor.data_ptr() for tensor in tensors] for tensors in (params, *others)]
    return list(zip(*lists, [p.numel() for p in params], strict=True))


def _rest(params: Tensors, coefficients: Sequence[float]) -> tuple[int, list[float], int]:
    return NATIVE_DTYPE[params[0].dtype], list(coefficients), torch.get_num_threads()


IMPLEMENTATION = Implementation("cpu", run, reasons_against)
IMPLEMENTATION8 = Implementation("cpu", run8, reasons_against)
