"""The state of one parameter: its two moments in fp32 under torch's names, or in 8 bits under bitsandbytes'.

32 bits: exp_avg, exp_avg_sq, (p.shape) fp32 (fp64 of an fp64 parameter). 8 bits: state1, state2 (p.shape) uint8; absmax1, absmax2
(ceil(numel / 256),) fp32; qmap1, qmap2 (256,) fp32, the values of the codes, shared by all parameters of a device.
Of a parameter that is split among processes the moments are split alike; in 8 bits the blocks are those of a process's own part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from peftk.format.dynamic8 import STATE_BLOCK, values8, zero_code8
from peftk.ops import blockwise8_dequantize, blockwise8_quantize
from peftk.shards import is_shard, part, placed_like, shard_like

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
    own = part(param)
    if bits == 32:
        wide = torch.promote_types(param.dtype, torch.float32)
        return state | {name: shard_like(empty(own.shape, dtype=wide, device=param.device).zero_(), param) for name in NAMES32}
    blocks = (-(-own.numel() // STATE_BLOCK),)
    for _, codes, absmax, qmap, signed in PAIRS:
        zeros = empty(own.shape, dtype=torch.uint8, device=param.device).fill_(zero_code8(signed))
        state[codes] = shard_like(zeros, param)
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
            decoded = blockwise8_dequantize(part(state[codes]), state[absmax], STATE_BLOCK, signed=signed)
            others[moment] = shard_like(decoded, state[codes])
        else:
            coded, others[absmax] = blockwise8_quantize(part(state[moment]).float(), STATE_BLOCK, signed)
            others[codes] = shard_like(coded, state[moment])
            others[qmap] = values8(signed, state[moment].device)
    return others


def can_be_moved(state: State) -> State:
    """A state that another number of processes can load: blocks of 8-bit codes belong to one process's part, so that codes of a
    split parameter are decoded. Coded again they are the same in the same split, but a block of exp_avg whose largest element is
    negative comes back 0.7 % smaller: the signed code has 1 and no -1."""
    return converted(state, 32) if is_shard(state.get(NAMES8[0])) else state


def split_like(state: State, param: torch.Tensor) -> State:
    """Whole moments of a parameter that is split, split alike; the state as it is where that has been done or isn't needed."""
    if not is_shard(param) or is_shard(state[names(bits_of(state))[0]]):
        return state
    state = converted(state, 32)
    return state | {name: placed_like(state[name], param) for name in NAMES32}
