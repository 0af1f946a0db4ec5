"""A step over a group: its parameters sorted into calls of peftk.ops.adamw_step, and these run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peftk.ops.adamw_step import unchecked, unchecked8
from peftk.optim.moments import STEP, State, bits_of, names
from peftk.shards import as_split, is_shard, part, smallest


@dataclass
class Call:
    """Parameters that take their step together: of one dtype, device and number of bits, all at the same step."""

    bits: int
    step: int  # the number of the step that they are about to take
    params: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)

    def moments(self) -> list[list[torch.Tensor]]:
        """Lists in the order in which the op takes them."""
        return [[part(state[name]) for state in self.states] for name in names(self.bits)]

    def count_step(self) -> None:
        for state in self.states:
            state[STEP] = self.step


def calls(group: dict[str, Any], states: Mapping[torch.Tensor, State], start: Callable[[torch.Tensor], State]) -> Iterable[Call]:
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
        if grad.numel() != count or state[names(bits)[0]].numel() != count:
            raise ValueError(
                f"grad: expected a gradient and moments of the parameter's shape {tuple(p.shape)}, got {tuple(grad.shape)} and "
                f"{tuple(state[names(bits)[0]].shape)}"
            )
        key = (dtype, p.device, bits, step)
        call = found.get(key)
        if call is None:
            call = found[key] = Call(bits, step)
        call.params.append(part(p))
        call.grads.append(part(as_split(grad, p)))
        call.states.append(state)
    return found.values()


def run(call: Call, coefficients: Sequence[float]) -> None:
    """One call, at once."""
    with Contiguous(call) as (params, grads):
        update(call.bits, params, grads, call.moments(), coefficients)


def update(
    bits: int,
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    moments: Sequence[Sequence[torch.Tensor]],
    coefficients: Sequence[float],
) -> None:
    """The op on lists of tensors that fit each other."""
    step = unchecked if bits == 32 else unchecked8
    step(params, grads, *moments, coefficients)


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
    sums: dict[torch.device, list[torch.Tensor]] = {}
    for grad in grads:
        sums.setdefault(grad.device, []).append(grad.sum(dtype=torch.promote_types(grad.dtype, torch.float32)).float())
    if all(bool(torch.stack(there).isfinite().all()) for there in sums.values()):
        return None
    return next((i for i, grad in enumerate(grads) if not grad.isfinite().all()), None)
