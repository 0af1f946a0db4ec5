"""The state of one parameter: its two moments in fp32 under torch's names, or in 8 bits under bitsandbytes'.

32 bits: exp_avg, exp_avg_sq, (p.shape) fp32 (fp64 of an fp64 parameter). 8 bits: state1, state2 (p.shape) uint8; absmax1, absmax2
(ceil(numel / 256),) fp32; qmap1, qmap2 (256,) fp32, the values of the codes, shared by all parameters of a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from peftk.format.dynamic8 import STATE_BLOCK, values8, zero_code8
from peftk.ops import blockwise8_dequantize, blockwise8_quantize

STEP, BITS = "step", "bits"  # the number of steps done; what ``override`` has asked for, where it has
NAMES32 = ("exp_avg", "exp_avg_sq")
NAMES8 = ("state1", "state2", "absmax1", "absmax2")
QMAPS = ("qmap1", "qmap2")
PAIRS = (("exp_avg", "state1", "absmax1", "qmap1", True), ("exp_avg_sq", "state2", "absmax2", "qmap2", False))

State = dict[str, Any]
Empty = Callable[..., torch.Tensor]  # (shape, dtype=, device=) -> tensor


def names(bits: int) -> tuple[str, ...]:
    """Of the tensors that a step reads and writes."""
    return NAMES32 if bits == 32 else NAMES8


def bits_of(state: State) -> int:
    """32 or 8, by what is there; 0 of a state without moments."""
    return 32 if NAMES32[0] in state else 8 if NAMES8[0] in state else 0


def fresh(param: torch.Tensor, bits: int, empty: Empty) -> State:
    """Moments of zero, step 0."""
    state: State = {STEP: 0}
    if bits == 32:
        wide = torch.promote_types(param.dtype, torch.float32)
        return state | {name: empty(param.shape, dtype=wide, device=param.device).zero_() for name in NAMES32}
    blocks = (-(-param.numel() // STATE_BLOCK),)
    for _, codes, absmax, qmap, signed in PAIRS:
        state[codes] = empty(param.shape, dtype=torch.uint8, device=param.device).fill_(zero_code8(signed))
        state[absmax] = empty(blocks, dtype=torch.float32, device=param.device).zero_()
        state[qmap] = values8(signed, param.device)
    return state


def converted(state: State, bits: int) -> State:
    """The same moments in 32 or 8 bits; what else is in the state stays. As it is where it has these bits already."""
    if bits_of(state) == bits:
        return state
    others = {name: value for name, value in state.items() if name not in (*NAMES32, *NAMES8, *QMAPS)}
    for moment, codes, absmax, qmap, signed in PAIRS:
        if bits == 32:
            others[moment] = blockwise8_dequantize(state[codes], state[absmax], STATE_BLOCK, signed=signed)
        else:
            others[codes], others[absmax] = blockwise8_quantize(state[moment].float(), STATE_BLOCK, signed)
            others[qmap] = values8(signed, state[moment].device)
    return others
