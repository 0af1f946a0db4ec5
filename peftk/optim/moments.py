"""The state of one parameter: its moments in fp32 under names of their own, or in 8 bits under bitsandbytes'.

32 bits: exp_avg, exp_avg_sq, exp_avg_slow, (p.shape) fp32 (fp64 of an fp64 parameter). 8 bits: state1, state2, state3 (p.shape)
uint8; absmax1 … absmax3 (ceil(numel / 256),) fp32; qmap1, qmap2 (256,) fp32, the values of the signed and of the unsigned codes,
shared by all parameters of a device. An optimizer has some of these moments.
Of a parameter that is split among processes the moments are split alike; in 8 bits the blocks are those of a process's own part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftk.format.dynamic8 import STATE_BLOCK, values8, zero_code8
from peftk.ops import blockwise8_dequantize, blockwise8_quantize
from peftk.shards import is_shard, part, placed_like, shard_like

STEP, BITS = "step", "bits"  # the number of steps done; what ``override`` has asked for, where it has

State = dict[str, Any]
Full = Callable[..., torch.Tensor]  # (shape, value, dtype=, device=) -> tensor


@dataclass(frozen=True)
class Moment:
    """What it is called in 32 and in 8 bits, and with which code."""

    name: str
    codes: str
    absmax: str
    signed: bool

    @property
    def qmap(self) -> str:
        return "qmap1" if self.signed else "qmap2"


AVERAGE = Moment("exp_avg", "state1", "absmax1", True)
SQUARE = Moment("exp_avg_sq", "state2", "absmax2", False)
SLOW = Moment("exp_avg_slow", "state3", "absmax3", True)
ALL = (AVERAGE, SQUARE, SLOW)


def names(moments: Sequence[Moment], bits: int) -> tuple[str, ...]:
    """Of the tensors that a step reads and writes, in the order in which ops take them."""
    if bits == 32:
        return tuple(m.name for m in moments)
    return (*(m.codes for m in moments), *(m.absmax for m in moments))


def qmaps(moments: Sequence[Moment]) -> dict[str, bool]:
    """Names of the tables of values that a state in 8 bits has, and whether they are the signed code's."""
    return {m.qmap: m.signed for m in moments}


def bits_of(state: State) -> int:
    """32 or 8, by what is there; 0 of a state without moments. Every optimizer has the average."""
    return 32 if AVERAGE.name in state else 8 if AVERAGE.codes in state else 0


def of(state: State) -> tuple[Moment, ...]:
    """The moments that are there."""
    return tuple(m for m in ALL if m.name in state or m.codes in state)


def nbytes(count: int, moments: Sequence[Moment], bits: int, dtype: torch.dtype) -> int:
    """That the moments of a parameter of ``count`` elements of ``dtype`` take."""
    if bits == 32:
        return len(moments) * count * torch.promote_types(dtype, torch.float32).itemsize
    return len(moments) * (count + 4 * -(-count // STATE_BLOCK))


def fresh(param: torch.Tensor, moments: Sequence[Moment], bits: int, full: Full) -> State:
    """Moments of zero, step 0."""
    state: State = {STEP: 0}
    own = part(param)
    if bits == 32:
        wide = torch.promote_types(param.dtype, torch.float32)
        return state | {m.name: shard_like(full(own.shape, 0, dtype=wide, device=param.device), param) for m in moments}
    blocks = (-(-own.numel() // STATE_BLOCK),)
    for m in moments:
        zeros = full(own.shape, zero_code8(m.signed), dtype=torch.uint8, device=param.device)
        state[m.codes] = shard_like(zeros, param)
        state[m.absmax] = full(blocks, 0, dtype=torch.float32, device=param.device)
        state[m.qmap] = values8(m.signed, param.device)
    return state


def converted(state: State, bits: int) -> State:
    """The same moments in 32 or 8 bits; what else is in the state stays. As it is where it has these bits already."""
    if bits_of(state) == bits:
        return state
    there = of(state)
    moved = {*names(there, 32), *names(there, 8), *qmaps(there)}
    others = {name: value for name, value in state.items() if name not in moved}
    for m in there:
        if bits == 32:
            decoded = blockwise8_dequantize(part(state[m.codes]), state[m.absmax], STATE_BLOCK, signed=m.signed)
            others[m.name] = shard_like(decoded, state[m.codes])
        else:
            coded, others[m.absmax] = blockwise8_quantize(part(state[m.name]).float(), STATE_BLOCK, m.signed)
            others[m.codes] = shard_like(coded, state[m.name])
            others[m.qmap] = values8(m.signed, state[m.name].device)
    return others


def can_be_moved(state: State) -> State:
    """A state that another number of processes can load: blocks of 8-bit codes belong to one process's part, so that codes of a
    split parameter are decoded. Coded again they are the same in the same split, but a block of exp_avg whose largest element is
    negative comes back 0.7 % smaller: the signed code has 1 and no -1."""
    return converted(state, 32) if is_shard(state.get(AVERAGE.codes)) else state


def split_like(state: State, param: torch.Tensor) -> State:
    """Whole moments of a parameter that is split, split alike; the state as it is where that has been done or isn't needed."""
    if not is_shard(param) or is_shard(state.get(AVERAGE.name, state.get(AVERAGE.codes))):
        return state
    state = converted(state, 32)
    return state | {m.name: placed_like(state[m.name], param) for m in of(state)}
