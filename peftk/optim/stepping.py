"""A step over a group: its parameters sorted into calls of a formula's ops, and these run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peftk.ops.step_lists import StepOp
from peftk.optim.moments import STEP, Moment, State, bits_of, names
from peftk.shards import as_split, is_shard, part, smallest

LOOKED_AT = 1 << 18  # elements of a gradient at once, in search of one that is not finite


@dataclass(frozen=True)
class Formula:
    """What an optimizer of the frame is: its moments in the order in which the ops take them, the ops for 32 and 8 bits, and the
    numbers that these take, of a group's options at a step. ValueError from ``coefficients`` names an option out of its range."""

    moments: tuple[Moment, ...]
    step32: StepOp
    step8: StepOp
    betas: int  # how many a group has
    coefficients: Callable[[Mapping[str, Any], int], Sequence[float]]

    def names(self, bits: int) -> tuple[str, ...]:
        return names(self.moments, bits)

    def op(self, bits: int) -> StepOp:
        return self.step32 if bits == 32 else self.step8


@dataclass
class Call:
    """Parameters that take their step together: of one dtype, device and number of bits, all at the same step."""

    formula: Formula
    bits: int
    step: int  # the number of the step that they are about to take
    params: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)

    def moments(self) -> list[list[torch.Tensor]]:
        """Lists in the order in which the op takes them."""
        return [[part(state[name]) for state in self.states] for name in self.formula.names(self.bits)]

    def count_step(self) -> None:
        for state in self.states:
            state[STEP] = self.step


def calls(
    formula: Formula, group: dict[str, Any], states: Mapping[torch.Tensor, State], start: Callable[[torch.Tensor], State]
) -> Iterable[Call]:
    """Those of a group's parameters that have a gradient. ``start`` makes the state of one that has none. TypeError for a
    gradient that is sparse or of another dtype, ValueError where a parameter has changed its size."""
    found: dict[tuple, Call] = {}
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        dtype = p.dtype
        if grad.layout is not torch.strided or grad.dtype is not dtype:
            raise TypeError(f"grad: expected a dense gradient of {dtype}, got one of {grad.dtype}, {grad.layout}")
        state = states[p]
        if STEP not in state:
            state = start(p)
        bits, step, count = bits_of(state), state[STEP] + 1, p.numel()
        average = state[formula.names(bits)[0]]
        if grad.numel() != count or average.numel() != count:
            raise ValueError(
                f"grad: expected a gradient and moments of the parameter's shape {tuple(p.shape)}, got {tuple(grad.shape)} and "
                f"{tuple(average.shape)}"
            )
        key = (dtype, p.device, bits, step)
        call = found.get(key)
        if call is None:
            call = found[key] = Call(formula, bits, step)
        call.params.append(part(p))
        call.grads.append(part(as_split(grad, p)))
        call.states.append(state)
    return found.values()


def run(call: Call, coefficients: Sequence[float]) -> None:
    """One call, at once."""
    with Contiguous(call) as (params, grads):
        call.formula.op(call.bits)(params, grads, *call.moments(), coefficients)


class Contiguous:
    """A call's parameters and gradients for a ``with``: what is not contiguous as a copy, and parameters copied back."""

    def __init__(self, call: Call) -> None:
        self.originals = call.params
        self.params = [p if p.is_contiguous() else p.contiguous() for p in call.params]
        self.grads = [g if g.is_contiguous() else g.contiguous() for g in call.grads]

    def __enter__(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return self.params, self.grads

    def __exit__(self, error: Any, *_: Any) -> None:
        if error is None:
            for original, used in zip(self.originals, self.params, strict=True):
                if original is not used:
                    original.copy_(used)


def first_not_finite(grads: Sequence[torch.Tensor]) -> int | None:
    """Index of the first with NaN or Inf in it, in whatever process; None where all are finite. A sum is finite only if all of it
    is, and takes less than a tenth of the time of looking at each element. One wait a device."""
    index = _first_not_finite([part(grad) for grad in grads])
    if not any(map(is_shard, grads)):
        return index
    found = smallest(len(grads) if index is None else index, grads[0].device)
    return None if found == len(grads) else found


def _first_not_finite(grads: Sequence[torch.Tensor]) -> int | None:
    room = torch.empty(LOOKED_AT, dtype=torch.float32, device="cpu")
    sums: dict[torch.device, list[torch.Tensor]] = {}
    for grad in grads:
        sums.setdefault(grad.device, []).extend(_sums(grad, room))
    if all(bool(torch.stack(there).isfinite().all()) for there in sums.values()):
        return None
    pieces = (grad.reshape(-1).split(LOOKED_AT) for grad in grads)
    return next((i for i, those in enumerate(pieces) if not all(piece.isfinite().all() for piece in those)), None)


def _sums(grad: torch.Tensor, room: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of a gradient's elements, as a whole or by parts. On a CPU torch widens 16-bit elements before it sums them, twice the
    gradient's bytes, and parts widened in turn leave holes in the heap (29 MB for 8 M elements): hence ``room`` for all."""
    if grad.device.type != "cpu" or grad.element_size() > 2 or not grad.is_contiguous():
        yield grad.sum(dtype=torch.promote_types(grad.dtype, torch.float32)).float()
        return
    for piece in grad.view(-1).split(LOOKED_AT):
        yield room[: piece.numel()].copy_(piece).sum()
