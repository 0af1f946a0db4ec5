"""bitsandbytes' 4-bit parameter and QuantState as an NF4Weight: views of the same bytes, checked once and remembered."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from peftk.format.dynamic8 import NESTED_BLOCK, values8
from peftk.format.nf4 import NF4Weight

Constants = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # absmax, absmax_scale, absmax_offset

_known: dict[int, tuple[weakref.ref, tuple, NF4Weight]] = {}  # by id of the QuantState; an entry goes when that does


def weight_of(packed: torch.Tensor, state: Any) -> NF4Weight:
    """``packed`` (any shape and ``quant_storage``) and its QuantState, without a copy. ValueError where they don't fit."""
    facts = _facts(state)
    if (known := _known.get(id(state))) is not None:
        _, before, weight = known
        if weight.packed.data_ptr() == packed.data_ptr() and all(a is b for a, b in zip(before, facts, strict=True)):
            return weight
    weight = NF4Weight(as_bytes(packed), *constants_of(state), state.shape, state.dtype, state.blocksize, state.quant_type)
    if weight.absmax is state.absmax:  # else they were decoded, and would not follow a change
        key = id(state)
        _known[key] = weakref.ref(state, lambda _: _known.pop(key, None)), facts, weight
    return weight


def forget(state: Any) -> None:
    """A weight that is used elsewhere now must not keep its bytes in this machine's memory."""
    _known.pop(id(state), None)


def _facts(state: Any) -> tuple:
    """What a remembered weight stands on."""
    nested = state.state2
    inner = (None, None) if nested is None else (nested.absmax, nested.code)
    return state.absmax, state.offset, *inner, state.shape, state.blocksize, state.quant_type


def as_bytes(packed: torch.Tensor) -> torch.Tensor:
    """The codes as a row of uint8, whatever shape and dtype they are stored as: a view."""
    flat = packed.detach().reshape(-1)
    return flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)


def constants_of(state: Any) -> Constants:
    """Those of a QuantState, its own tensors where the kernels can read them."""
    if state.state2 is None:
        return plain_constants(state.absmax)
    return constants(state.absmax, state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)


def plain_constants(absmax: torch.Tensor) -> Constants:
    return absmax.reshape(-1).float() if absmax.dim() != 1 else absmax.float(), None, None


def constants(
    codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor, offset: torch.Tensor, block_size: int = NESTED_BLOCK
) -> Constants:
    """Of nested statistics: as they are where they are in blocks of 256 with the signed dynamic code, else decoded."""
    if block_size == NESTED_BLOCK and codes.dtype == torch.uint8 and is_dynamic8(table, signed=True):
        return codes, scale.float(), offset.float()
    decoded = torch.ops.bitsandbytes.dequantize_blockwise(codes, scale, table, block_size, torch.float32)
    return decoded + offset, None, None


def is_dynamic8(table: torch.Tensor, signed: bool) -> bool:
    """Whether the 256 values are the dynamic code's."""
    return table.dtype == torch.float32 and torch.equal(table, values8(signed, table.device))


# ---- the layout that bitsandbytes gave a weight in eval mode -----------------------------------------------------------------


def left_as_it_is(original: Callable[..., Any]) -> Callable[..., Any]:
    """For ``_convert_weight_packed_for_cpu``: the kernels read a weight as it is stored."""

    def convert(qweight: torch.Tensor, quant_state: Any, block_n: int = 32) -> tuple[torch.Tensor, Any]:
        return qweight, quant_state

    return convert


def restore_layout(parameter: torch.Tensor, state: Any) -> None:
    """Undo a repacking from before peftk took over, in place, by bitsandbytes' own inverse. That leaves constants which were not
    nested in bf16 and transposed; and what bf16 rounded off stays lost."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    parameter.data, _ = _convert_weight_packed_for_cpu_inverse(parameter.data, state)
    if state.absmax.dim() == 2:
        state.absmax = state.absmax.T.reshape(-1).float()
