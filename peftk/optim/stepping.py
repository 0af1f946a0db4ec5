"""A step over a group: its parameters sorted into calls of peftk.ops.adamw_step, and these run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peftk.ops.adamw_step import unchecked, unchecked8
from peftk.optim.moments import NAMES8, NAMES32, STEP, State


@dataclass
class Call:
    """Parameters that take their step together: of one dtype, device and number of bits, all at the same step."""

    bits: int
    step: int  # the number of the step that they are about to take
    params: list[torch.Tensor] = field(default_factory=list)
    grads: list[torch.Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)

    def count_step(self) -> None:
        for state in self.states:
            state[STEP] = self.step


def calls(group: dict[str, Any], states: Mapping[torch.Tensor, State], start: Callable[[torch.Tensor], State]) -> Iterable[Call]:
    """Those of a group's parameters that have a gradient. ``start`` makes the state of one that has none. TypeError for a sparse
    gradient."""
    found: dict[tuple, Call] = {}
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        if grad.layout is not torch.strided:
            raise TypeError(f"grad: expected a dense gradient, got one of layout {grad.layout}")
        state = states[p]
        if STEP not in state:
            state = start(p)
        bits, step = 32 if "exp_avg" in state else 8, state[STEP] + 1
        key = (p.dtype, p.device, bits, step)
        call = found.get(key)
        if call is None:
            call = found[key] = Call(bits, step)
        call.params.append(p)
        call.grads.append(grad)
        call.states.append(state)
    return found.values()


def run(call: Call, coefficients: Sequence[float]) -> None:
    """One call. Tensors that are not contiguous take part as copies."""
    params = [p if p.is_contiguous() else p.contiguous() for p in call.params]
    grads = [g if g.is_contiguous() else g.contiguous() for g in call.grads]
    names, step = (NAMES32, unchecked) if call.bits == 32 else (NAMES8, unchecked8)
    step(params, grads, *([state[name] for state in call.states] for name in names), coefficients)
    for original, used in zip(call.params, params, strict=True):
        if original is not used:
            original.copy_(used)


def is_finite(grad: torch.Tensor) -> bool:
    """Whether every element is."""
    values = grad.coalesce().values() if grad.layout is torch.sparse_coo else grad
    return not values.numel() or bool(torch.linalg.vector_norm(values, torch.inf).isfinite())
