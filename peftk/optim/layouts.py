"""State dicts of AdamW as torch and bitsandbytes have them, both ways. Ours is torch's in 32 bits and bitsandbytes' in 8.

bitsandbytes calls fp32 moments state1 and state2 too, and nests the tensors of a parameter under a key of its own; torch wants
fp32 moments throughout and the step as a tensor.
"""

from __future__ import annotations

from typing import Any

import torch

from peftk.format.dynamic8 import STATE_BLOCK, values8
from peftk.optim.moments import BITS, NAMES8, NAMES32, PAIRS, QMAPS, STEP, State, bits_of, converted

BNB_NEST = "__bnb_optimizer_quant_state__"
BNB_GROUP = {"lr", "betas", "eps", "weight_decay", "params"}
BNB_GROUP_EXTRA = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}

StateDict = dict[str, Any]


def to_torch(state_dict: StateDict) -> StateDict:
    """A state dict of peftk's AdamW as torch.optim.AdamW loads it: 8-bit moments as fp32."""

    def convert(state: State) -> State:
        wide = converted(state, 32)
        return {STEP: torch.tensor(float(wide[STEP])), **{name: wide[name] for name in NAMES32}}

    return {"state": _each(state_dict, convert), "param_groups": [dict(group) for group in state_dict["param_groups"]]}


def to_bitsandbytes(state_dict: StateDict) -> StateDict:
    """A state dict of peftk's AdamW as bitsandbytes' AdamW or AdamW8bit loads it: every moment in the bits that it has."""

    def convert(state: State) -> State:
        if bits_of(state) == 8:
            tensors = {name: state[name] for name in (*NAMES8, *QMAPS)}
        else:
            tensors = dict(zip(NAMES8[:2], (state[name] for name in NAMES32), strict=True))
        return {STEP: int(state[STEP]), BNB_NEST: tensors}

    groups = [{key: group[key] for key in group if key in BNB_GROUP} | BNB_GROUP_EXTRA for group in state_dict["param_groups"]]
    return {"state": _each(state_dict, convert), "param_groups": groups}


def from_any(state_dict: StateDict) -> StateDict:
    """A state dict of torch's, bitsandbytes' or peftk's AdamW in peftk's layout. ValueError names the parameter whose state is
    none of these, or has what peftk can't go on with: amsgrad's maximum, other 8-bit values, blocks of another size."""
    return {**state_dict, "state": {key: _ours(key, state) for key, state in state_dict["state"].items()}}


def _each(state_dict: StateDict, convert: Any) -> dict[Any, State]:
    return {key: convert(state) for key, state in state_dict["state"].items() if bits_of(state)}


def _ours(key: Any, state: State) -> State:
    at = f"state[{key!r}]"
    if BNB_NEST in state:
        state = {**{name: value for name, value in state.items() if name != BNB_NEST}, **state[BNB_NEST]}
    if "max_exp_avg_sq" in state:
        raise ValueError(f"{at}: expected AdamW without amsgrad, got max_exp_avg_sq")
    if set(state) <= {BITS}:  # overridden, and no step yet
        return dict(state)
    if STEP not in state:
        raise ValueError(f"{at}: expected a step, got {', '.join(map(str, state)) or 'nothing'}")
    ours: State = {STEP: int(state[STEP]), **({BITS: state[BITS]} if BITS in state else {})}
    if all(name in state for name in NAMES32):
        return ours | {name: state[name] for name in NAMES32}
    if not all(name in state for name in NAMES8[:2]):
        raise ValueError(f"{at}: expected {' and '.join(NAMES32)} or {' and '.join(NAMES8)}, got {', '.join(map(str, state))}")
    if state[NAMES8[0]].dtype != torch.uint8:
        return ours | dict(zip(NAMES32, (state[name] for name in NAMES8[:2]), strict=True))
    return ours | _checked8(at, state)


def _checked8(at: str, state: State) -> State:
    """8-bit moments whose codes mean what ours do."""
    parts: State = {}
    for _, codes, absmax, qmap, signed in PAIRS:
        blocks = -(-state[codes].numel() // STATE_BLOCK)
        if absmax not in state or state[absmax].numel() != blocks:
            got = state[absmax].numel() if absmax in state else "none"
            raise ValueError(f"{at}.{absmax}: expected {blocks} values, one for {STATE_BLOCK} codes, got {got}")
        if qmap in state and not torch.equal(state[qmap].cpu().float(), values8(signed)):
            raise ValueError(f"{at}.{qmap}: expected the {'signed' if signed else 'unsigned'} dynamic 8-bit values, got others")
        parts |= {codes: state[codes], absmax: state[absmax], qmap: values8(signed, state[codes].device)}
    return parts
