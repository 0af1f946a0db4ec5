"""State dicts as torch and bitsandbytes have them, both ways. Ours is torch's AdamW's in 32 bits and bitsandbytes' in 8.

bitsandbytes calls fp32 moments state1 and state2 too, and nests the tensors of a parameter under a key of its own; of AdEMAMix
it holds both averages in one tensor, (2, *p.shape) state1 and (2, blocks) absmax1, where ours has state3 and absmax3. torch
wants fp32 moments throughout and the step as a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftk.format.dynamic8 import STATE_BLOCK, values8
from peftk.optim.moments import AVERAGE, BITS, SLOW, SQUARE, STEP, Moment, State, bits_of, converted, names, of, qmaps

BNB_NEST = "__bnb_optimizer_quant_state__"
BNB_GROUP = {"lr", "betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3", "params"}
BNB_TWO_STATES = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}  # in groups of its AdamW as well
BNB_ONE_STATE = {"eps": 0.0}  # in groups of its Lion

StateDict = dict[str, Any]


def to_torch(state_dict: StateDict) -> StateDict:
    """A state dict of peftk's AdamW as torch.optim.AdamW loads it: 8-bit moments as fp32. ValueError for another optimizer's."""

    def convert(state: State) -> State:
        if of(state) != (AVERAGE, SQUARE):
            raise ValueError(f"state_dict: expected AdamW's, got one with {', '.join(m.name for m in of(state))}")
        wide = converted(state, 32)
        return {STEP: torch.tensor(float(wide[STEP])), **{m.name: wide[m.name] for m in of(state)}}

    return {"state": _each(state_dict, convert), "param_groups": [dict(group) for group in state_dict["param_groups"]]}


def to_bitsandbytes(state_dict: StateDict) -> StateDict:
    """A state dict of peftk's as bitsandbytes' optimizer of that name loads it, or its 8-bit one: every moment in the
    bits that it has."""

    def convert(state: State) -> State:
        there, bits = of(state), bits_of(state)
        tensors = {m.codes: state[m.name if bits == 32 else m.codes] for m in there}
        if bits == 8:
            tensors |= {m.absmax: state[m.absmax] for m in there} | {name: state[name] for name in qmaps(there)}
        if SLOW in there:
            for both, slow in ((AVERAGE.codes, SLOW.codes), (AVERAGE.absmax, SLOW.absmax))[: 1 if bits == 32 else 2]:
                tensors[both] = torch.stack([tensors[both], tensors.pop(slow)])
        return {STEP: int(state[STEP]), BNB_NEST: tensors}

    def converted_group(group: dict[str, Any]) -> dict[str, Any]:
        extra = BNB_TWO_STATES if "eps" in group else BNB_ONE_STATE
        return extra | {key: group[key] for key in group if key in BNB_GROUP}

    return {"state": _each(state_dict, convert), "param_groups": [converted_group(group) for group in state_dict["param_groups"]]}


def from_any(state_dict: StateDict, moments: Sequence[Moment]) -> StateDict:
    """A state dict of torch's, bitsandbytes' or peftk's optimizer with these moments in peftk's layout. ValueError names the
    parameter whose state is none of these, or has what peftk can't go on with: amsgrad's maximum, other 8-bit values, blocks of
    another size."""
    return {**state_dict, "state": {key: _ours(key, state, moments) for key, state in state_dict["state"].items()}}


def _each(state_dict: StateDict, convert: Any) -> dict[Any, State]:
    return {key: convert(state) for key, state in state_dict["state"].items() if bits_of(state)}


def _ours(key: Any, state: State, moments: Sequence[Moment]) -> State:
    at = f"state[{key!r}]"
    if BNB_NEST in state:
        state = {**{name: value for name, value in state.items() if name != BNB_NEST}, **state[BNB_NEST]}
        state = _parted(state) if SLOW in moments else state
    if "max_exp_avg_sq" in state:
        raise ValueError(f"{at}: expected AdamW without amsgrad, got max_exp_avg_sq")
    if set(state) <= {BITS}:  # overridden, and no step yet
        return dict(state)
    if STEP not in state:
        raise ValueError(f"{at}: expected a step, got {', '.join(map(str, state)) or 'nothing'}")
    ours: State = {STEP: int(state[STEP]), **({BITS: state[BITS]} if BITS in state else {})}
    foreign = [m for m in of(state) if m not in moments]
    if not foreign and all(m.name in state for m in moments):
        return ours | {m.name: state[m.name] for m in moments}
    if foreign or not all(m.codes in state for m in moments):
        wanted = [" and ".join(names(moments, bits)) for bits in (32, 8)]
        raise ValueError(f"{at}: expected {wanted[0]} or {wanted[1]}, got {', '.join(map(str, state))}")
    if state[AVERAGE.codes].dtype != torch.uint8:
        return ours | {m.name: state[m.codes] for m in moments}
    return ours | _checked8(at, state, moments)


def _parted(state: State) -> State:
    """bitsandbytes' AdEMAMix with each average in a tensor of its own."""
    pairs = [(AVERAGE.codes, SLOW.codes), (AVERAGE.absmax, SLOW.absmax)]
    return state | {name: state[both][i] for both, slow in pairs if both in state for i, name in enumerate((both, slow))}


def _checked8(at: str, state: State, moments: Sequence[Moment]) -> State:
    """8-bit moments whose codes mean what ours do."""
    parts: State = {}
    for m in moments:
        blocks = -(-state[m.codes].numel() // STATE_BLOCK)
        if m.absmax not in state or state[m.absmax].numel() != blocks:
            got = state[m.absmax].numel() if m.absmax in state else "none"
            raise ValueError(f"{at}.{m.absmax}: expected {blocks} values, one for {STATE_BLOCK} codes, got {got}")
        if m.qmap in state and not torch.equal(state[m.qmap].cpu().float(), values8(m.signed)):
            raise ValueError(
                f"{at}.{m.qmap}: expected the {'signed' if m.signed else 'unsigned'} dynamic 8-bit values, got others"
            )
        parts |= {m.codes: state[m.codes], m.absmax: state[m.absmax], m.qmap: values8(m.signed, state[m.codes].device)}
    return parts
