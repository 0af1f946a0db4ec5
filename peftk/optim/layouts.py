"""State dicts as torch and bitsandbytes have them, both ways. Ours is torch's AdamW's in 32 bits and bitsandbytes' in 8.

bitsandbytes calls fp32 moments state1 and state2 too, and nests the tensors of a parameter under a key of its own; of AdEMAMix
it holds both averages in one tensor, (2, *p.shape) state1 and (2, blocks) absmax1, where ours has state3 and absmax3. torch
wants fp32 moments throughout and the step as a tensor.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
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

    _check_form(state_dict)
    states = _each(state_dict, convert)
    if other := [group for group in state_dict["param_groups"] if "eps" not in group or "alpha" in group]:
        raise ValueError(f"state_dict: expected AdamW's, got a group with {', '.join(sorted(map(str, other[0])))}")
    return {"state": states, "param_groups": [dict(group) for group in state_dict["param_groups"]]}


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

    _check_form(state_dict)
    return {"state": _each(state_dict, convert), "param_groups": [converted_group(group) for group in state_dict["param_groups"]]}


def from_any(state_dict: StateDict, moments: Sequence[Moment]) -> StateDict:
    """A state dict of torch's, bitsandbytes' or peftk's optimizer with these moments in peftk's layout. ValueError names the
    parameter whose state is none of these, or has what peftk can't go on with: amsgrad's maximum, other 8-bit values, blocks of
    another size; or what isn't a state dict at all."""
    _check_form(state_dict)
    return {**state_dict, "state": {key: _ours(key, state, moments) for key, state in state_dict["state"].items()}}


def _check_form(state_dict: Any) -> None:
    """Parts of the right kinds, and no state of a parameter that no group has."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        got = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(f"state_dict: expected state and param_groups, got {got}")
    groups, states = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, list | tuple) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError(f"param_groups: expected a list of dicts, got {_kinds(groups)}")
    known: set[Any] = set()
    for i, group in enumerate(groups):
        ids, given = group.get("params"), group.get("param_names")
        if not isinstance(ids, list | tuple) or not all(isinstance(one, int | str) for one in ids):
            raise ValueError(f"param_groups[{i}]['params']: expected a list of numbers, got {ids!r:.200}")
        if given is not None and (not isinstance(given, list | tuple) or len(given) != len(ids)):
            raise ValueError(f"param_groups[{i}]['param_names']: expected {len(ids)} names, got {given!r:.200}")
        known.update(ids)
    if not isinstance(states, Mapping) or not all(isinstance(state, Mapping) for state in states.values()):
        raise ValueError(f"state: expected a dict of dicts, got {_kinds(states)}")
    if unknown := [key for key in states if key not in known]:
        raise ValueError(f"state: expected parameters that param_groups has, got {unknown!r:.200}")


def _kinds(tree: Any) -> str:
    inside = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    return f"a {type(tree).__name__} of {', '.join(sorted({type(one).__name__ for one in inside})) or 'nothing'}"


def _each(state_dict: StateDict, convert: Any) -> dict[Any, State]:
    return {key: convert(state) for key, state in state_dict["state"].items() if bits_of(state)}


def _ours(key: Any, state: State, moments: Sequence[Moment]) -> State:
    at = f"state[{key!r}]"
    if BNB_NEST in state:
        if not isinstance(state[BNB_NEST], Mapping):
            raise ValueError(f"{at}.{BNB_NEST}: expected a dict, got a {type(state[BNB_NEST]).__name__}")
        state = {**{name: value for name, value in state.items() if name != BNB_NEST}, **state[BNB_NEST]}
        state = _parted(state) if SLOW in moments else state
    if "max_exp_avg_sq" in state:
        raise ValueError(f"{at}: expected AdamW without amsgrad, got max_exp_avg_sq")
    if set(state) <= {BITS}:  # overridden, and no step yet
        return dict(state)
    if STEP not in state:
        raise ValueError(f"{at}: expected a step, got {', '.join(map(str, state)) or 'nothing'}")
    ours: State = {STEP: _steps(at, state[STEP]), **({BITS: state[BITS]} if BITS in state else {})}
    foreign = [m for m in of(state) if m not in moments]
    if state.get(BITS, 32) not in (32, 8):
        raise ValueError(f"{at}.{BITS}: expected 32 or 8, got {state[BITS]!r}")
    if not foreign and all(m.name in state for m in moments):
        return ours | {m.name: _floats(f"{at}.{m.name}", state[m.name]) for m in moments}
    if foreign or not all(m.codes in state for m in moments):
        wanted = [" and ".join(names(moments, bits)) for bits in (32, 8)]
        raise ValueError(f"{at}: expected {wanted[0]} or {wanted[1]}, got {', '.join(map(str, state))}")
    if getattr(state[AVERAGE.codes], "dtype", None) != torch.uint8:
        return ours | {m.name: _floats(f"{at}.{m.codes}", state[m.codes]) for m in moments}
    return ours | _checked8(at, state, moments)


def _steps(at: str, value: Any) -> int:
    """How many have been done; torch holds the number as a tensor."""
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta else value
    if not isinstance(value, numbers.Real) or not math.isfinite(value) or value != int(value) or not 0 <= value < 2**53:
        raise ValueError(f"{at}.{STEP}: expected the number of steps done, got {value!r:.200}")
    return int(value)


def _floats(at: str, value: Any) -> torch.Tensor:
    return _tensor(at, value, "a floating-point tensor", getattr(value, "is_floating_point", bool)())


def _tensor(at: str, value: Any, expected: str, fits: bool) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not fits or value.layout != torch.strided or value.is_meta:
        told = f"{value.dtype} {tuple(value.shape)} {value.device}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{at}: expected {expected}, got {told}")
    return value


def _parted(state: State) -> State:
    """bitsandbytes' AdEMAMix with each average in a tensor of its own."""
    pairs = [(AVERAGE.codes, SLOW.codes), (AVERAGE.absmax, SLOW.absmax)]
    return state | {name: state[both][i] for both, slow in pairs if both in state for i, name in enumerate((both, slow))}


def _checked8(at: str, state: State, moments: Sequence[Moment]) -> State:
    """8-bit moments whose codes mean what ours do."""
    parts: State = {}
    for m in moments:
        codes = _tensor(f"{at}.{m.codes}", state[m.codes], "uint8 codes", getattr(state[m.codes], "dtype", None) == torch.uint8)
        blocks, absmax = -(-codes.numel() // STATE_BLOCK), state.get(m.absmax)
        fits = isinstance(absmax, torch.Tensor) and absmax.dtype == torch.float32 and tuple(absmax.shape) == (blocks,)
        _tensor(f"{at}.{m.absmax}", absmax, f"{blocks} fp32 values, one for {STATE_BLOCK} codes", fits)
        table = state.get(m.qmap, values8(m.signed))
        fits = isinstance(table, torch.Tensor) and not table.is_meta and torch.equal(table.cpu().float(), values8(m.signed))
        _tensor(f"{at}.{m.qmap}", table, f"the {'signed' if m.signed else 'unsigned'} dynamic 8-bit values", fits)
        parts |= {m.codes: codes, m.absmax: absmax, m.qmap: values8(m.signed, codes.device)}
    return parts
