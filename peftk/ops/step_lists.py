"""What the steps of all optimizers share: ops on lists of parameters, gradients and moments, in place, and moments in 8 bits as
the references have them. An optimizer's room has its formula."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import increment_version

from peftk.format.dynamic8 import STATE_BLOCK, thresholds8, values8, zero_code8
from peftk.native import NATIVE_DTYPE, native
from peftk.ops import dispatch, library
from peftk.ops.dispatch import Implementation

Tensors = Sequence[torch.Tensor]
Update = Callable[..., tuple[torch.Tensor, ...]]  # (param, grad, *moments, coefficients) -> the new parameter and moments


class StepOp:
    """An op ``peftk::<name>(params, grads, *lists, coefficients)`` that writes params and lists. Called, it takes lists that are
    known to fit and not empty, from an optimizer that made them: the checks of 420 small tensors cost as much as their step."""

    def __init__(self, name: str, lists: Sequence[str], table: Sequence[Implementation]) -> None:
        self.name, self.table = name, table
        written = [f"Tensor({mark}!)[] {of}" for mark, of in zip("abcdefgh", ("params", *lists), strict=False)]
        schema = ", ".join([written[0], "Tensor[] grads", *written[1:], "float[] coefficients"])
        library.define(f"{name}({schema}) -> ()", self._run, lambda *_: None)

    @torch.no_grad()
    def __call__(self, params: Tensors, grads: Tensors, *lists_and_coefficients: Any) -> None:
        arguments = (params, grads, *lists_and_coefficients)
        is_straight = dispatch.is_straight(lists_and_coefficients[0][0])
        (self._run if is_straight else getattr(torch.ops.peftk, self.name))(*arguments)

    def _run(self, *arguments: Any) -> None:
        dispatch.select(self.name, self.table, *arguments)(*arguments)
        params, _, *lists, _ = arguments
        increment_version([*params, *(tensor for tensors in lists for tensor in tensors)])


def check_numbers(betas: Mapping[str, float], amounts: Mapping[str, float], grad_factor: float) -> None:
    """Of a step's hyper-parameters, by name. ValueError names the one that is out of its range, TypeError what is no number."""
    for name, value in (*betas.items(), *amounts.items(), ("grad_factor", grad_factor)):
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a number, got {value!r:.200}")
    for name, beta in betas.items():
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name}: expected a number in [0, 1), got {beta}")
    for name, amount in amounts.items():
        if not 0.0 <= amount < math.inf:
            raise ValueError(f"{name}: expected a finite number, 0 or more, got {amount}")
    if not math.isfinite(grad_factor):
        raise ValueError(f"grad_factor: expected a finite number, got {grad_factor}")


def check_step(step: int) -> None:
    """Which step this is, the first being 1. TypeError for what is no whole number, ValueError for one that can't be."""
    if not isinstance(step, numbers.Integral) or isinstance(step, bool):
        raise TypeError(f"step: expected the number of this step, 1 or more, got {step!r:.200}")
    if not 1 <= step < 2**63:
        raise ValueError(f"step: expected the number of this step, 1 or more, got {step}")


def check(params: Tensors, **lists: Tensors) -> None:
    """Hold the lists against params, one tensor after the other: grads of their dtype, state… uint8, absmax… fp32 with one value
    a block, others fp32 (fp64 where params are)."""
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name}: expected {len(params)} tensors, one for each of params, got {len(tensors)}")
    if not params:
        return
    dtype, device = params[0].dtype, params[0].device
    if not dtype.is_floating_point:
        raise TypeError(f"params[0]: expected a floating-point tensor, got {dtype}")
    for name, tensors in (("params", params), *lists.items()):
        wanted = _dtype_of(name, dtype)
        of_blocks = name.startswith("absmax")
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            shape = (-(-param.numel() // STATE_BLOCK),) if of_blocks else param.shape
            if tensor.dtype != wanted:
                raise TypeError(f"{name}[{i}]: expected {wanted}, got {tensor.dtype}")
            if tensor.shape != shape or not tensor.is_contiguous() or tensor.device != device:
                raise ValueError(
                    f"{name}[{i}]: expected a contiguous tensor of shape {tuple(shape)} on {device}, got {tuple(tensor.shape)} "
                    f"with strides {tensor.stride()} on {tensor.device}"
                )


def _dtype_of(name: str, params: torch.dtype) -> torch.dtype:
    if name in ("params", "grads"):
        return params
    if name.startswith("state"):
        return torch.uint8
    return torch.float32 if name.startswith("absmax") else torch.promote_types(params, torch.float32)


# ---- compiled CPU kernels -----------------------------------------------------------------------------------------------------


def native_step(name: str) -> Implementation:
    """``peftk._C.<name>``, which takes a tuple of addresses for each parameter."""

    def reasons_against(params: Tensors, *_: object) -> list[str]:
        return dispatch.reasons_against_cpu(params[0]) + dispatch.reasons_against_dtype("params", params[0].dtype)

    def run(params: Tensors, *lists_and_coefficients: Any) -> None:
        *lists, coefficients = lists_and_coefficients
        addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (params, *lists)]
        tuples = list(zip(*addresses, [p.numel() for p in params], strict=True))
        getattr(native(), name)(tuples, NATIVE_DTYPE[params[0].dtype], list(coefficients), torch.get_num_threads())

    return Implementation("cpu", run, reasons_against)


# ---- references ---------------------------------------------------------------------------------------------------------------


def reference_step(update: Update) -> Implementation:
    """The formula on one tensor after the other, with moments as they are."""

    def run(params: Tensors, grads: Tensors, *moments_and_coefficients: Any) -> None:
        *moments, coefficients = moments_and_coefficients
        for tensors in zip(params, grads, *moments, strict=True):
            new = update(*tensors, coefficients)
            for old, value in zip((tensors[0], *tensors[2:]), new, strict=True):
                old.copy_(value)

    return Implementation("reference", run, dispatch.no_reason)


def reference_step8(update: Update, signed: Sequence[bool]) -> Implementation:
    """The formula on decoded moments; ``signed``: which have the signed code. Lists: codes of each, then absmax of each."""

    def run(params: Tensors, grads: Tensors, *lists_and_coefficients: Any) -> None:
        *lists, coefficients = lists_and_coefficients
        for param, grad, *codes_and_absmax in zip(params, grads, *lists, strict=True):
            kept = list(zip(codes_and_absmax[: len(signed)], codes_and_absmax[len(signed) :], signed, strict=True))
            new, *moments = update(param, grad, *(decoded(*one) for one in kept), coefficients)
            param.copy_(new)
            for moment, one in zip(moments, kept, strict=True):
                encode(moment, *one)

    return Implementation("reference", run, dispatch.no_reason)


def square_root(x: torch.Tensor) -> torch.Tensor:
    """Correctly rounded, by way of fp64: torch's own on a CPU, MKL's, is now and then one ulp off."""
    return x.double().sqrt().to(x.dtype)


def decoded(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """(codes.shape) fp32"""
    scale = absmax.repeat_interleave(STATE_BLOCK)[: codes.numel()]
    return values8(signed, codes.device)[codes.long()] * scale.view(codes.shape)


def encode(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> None:
    """Write the codes nearest to x and their blocks' absmax. Blocks with nothing above the denormals are zeros: 1 / absmax may
    be infinite there, and zeros of a block must stay zeros."""
    if not x.numel():
        return
    padding = -x.numel() % STATE_BLOCK
    blocks = torch.nn.functional.pad(x.reshape(-1), (0, padding)).view(-1, STATE_BLOCK)
    biggest = blocks.abs().amax(1)
    absmax.copy_(torch.where(biggest < torch.finfo(torch.float32).tiny, 0.0, biggest))
    scaled = blocks * (1 / absmax)[:, None]
    nearest = torch.bucketize(scaled, thresholds8(signed, x.device), out_int32=True).to(torch.uint8)
    nearest[scaled.isnan()] = 0
    nearest[absmax == 0] = zero_code8(signed)
    codes.copy_(nearest.view(-1)[: x.numel()].view(codes.shape))
