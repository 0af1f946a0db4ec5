"""Which implementation of an op runs: the first of its TABLE with no reason against it. A forced one that can't run says why.

An implementation is a module-level ``Implementation`` in ``peftk/ops/<op>/{reference,cpu,cuda,triton_kernel}.py``; the TABLE in
the op's ``__init__`` lists them, fastest first. ``reasons_against`` gets the arguments of ``run`` and returns a list of reasons.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from peftk.native import NATIVE_DTYPE, native, why_not_native

NAMES = ("reference", "cpu", "cuda", "triton")
logger = logging.getLogger("peftk")

_forced: ContextVar[str | None] = ContextVar("peftk_implementation", default=None)
_warned: set[tuple[str, str]] = set()
# No ContextVar: autograd runs the backward pass of meta tensors on a thread of its own.
_meta = {"stands for": "meta"}
_asked: list[list[Choice]] = []  # no ContextVar for the same reason


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op."""

    name: str  # of NAMES
    run: Callable[..., Any]
    reasons_against: Callable[..., list[str]]
    kernel: Callable[..., str] | None = None  # which of its kernels takes these arguments, in words


@dataclass(frozen=True)
class Candidate:
    """What a TABLE's implementation says to some arguments."""

    name: str
    against: tuple[str, ...]  # empty: it can run
    kernel: str  # of those it has; empty where there is one, or where it can't run


@dataclass(frozen=True)
class Choice:
    """What ``select`` would do for some arguments: the first candidate with nothing against it runs."""

    op: str
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> str | None:
        return next((one.name for one in self.candidates if not one.against), None)


class Answered(Exception):
    """Ends a call that only asks, inside ``asking``."""


def select(op: str, table: Sequence[Implementation], *arguments: Any) -> Callable[..., Any]:
    """The ``run`` of the first implementation without a reason against these arguments; RuntimeError with every reason."""
    forced = _forced.get()
    if _asked:
        _asked[-1].append(Choice(op, tuple(_candidate(one, forced, arguments) for one in table)))
        raise Answered
    reasons: list[str] = []
    for implementation in table:
        if forced is not None and implementation.name != forced:
            continue
        against = implementation.reasons_against(*arguments)
        if not against:
            if forced is None and implementation.name == "reference" and reasons:
                _warn_once(op, "; ".join(reasons))
            return implementation.run
        reasons += [f"{implementation.name}: {reason}" for reason in against]
    if forced is not None and not reasons:
        reasons = [f"{forced}: this op has no such implementation (it has {', '.join(i.name for i in table)})"]
    raise RuntimeError(f"peftk.ops.{op} can't run: " + "; ".join(reasons))


def _warn_once(op: str, reason: str) -> None:
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        logger.warning("%s runs on the reference implementation, which is slow: %s", op, reason)


def _candidate(implementation: Implementation, forced: str | None, arguments: Sequence[Any]) -> Candidate:
    against = implementation.reasons_against(*arguments)
    if forced not in (None, implementation.name):
        against = [f"peftk.use({forced!r}) forces another", *against]
    kernel = implementation.kernel(*arguments) if implementation.kernel and not against else ""
    return Candidate(implementation.name, tuple(against), kernel)


@contextlib.contextmanager
def asking() -> Iterator[list[Choice]]:
    """Inside the ``with``, ops on meta tensors note in the list what ``select`` would choose for them, backward passes included,
    and make their fake results."""
    _asked.append([])
    try:
        yield _asked[-1]
    finally:
        _asked.pop()


def is_asking() -> bool:
    return bool(_asked)


@contextlib.contextmanager
def meta_stands_for(device_type: str) -> Iterator[None]:
    """Inside the ``with`` code that asks which way to compute takes meta tensors for those of this device ("cpu" or "cuda"): a
    planner runs a model's step without memory, and the step is to be the one that the device would run."""
    before, _meta["stands for"] = _meta["stands for"], device_type
    try:
        yield
    finally:
        _meta["stands for"] = before


def device_type(tensor: torch.Tensor) -> str:
    """As torch names it: cpu, cuda, …; of a meta tensor what it stands for."""
    return _meta["stands for"] if tensor.is_meta else tensor.device.type


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force an implementation inside the ``with``: "reference", "cpu", "cuda" or "triton"; "cpu-avx2" forces an instruction set
    too (scalar, avx2, avx512, avx512_bf16, amx_bf16). Ops that can't run on it raise RuntimeError with every reason."""
    base, _, tier = name.partition("-")
    if base not in NAMES or (tier and base != "cpu"):
        raise ValueError(f"name: expected one of {', '.join(NAMES)} or cpu-<instruction set>, got {name!r}")
    module = native() if tier else None
    if tier and module is None:
        raise RuntimeError(f"cpu: {why_not_native()}")
    before = module.tier() if module else None
    if module:
        module.set_tier(tier)
    token = _forced.set(base)
    try:
        yield
    finally:
        _forced.reset(token)
        if module:
            module.set_tier(before)


def is_straight(x: torch.Tensor) -> bool:
    """Whether a call with ``x`` may go to its CPU kernel past torch's dispatcher and the TABLE, which cost 20 us: a plain CPU
    tensor, no gradient wanted for it, no implementation forced, nothing that watches or transforms calls (modes, traces,
    autocast, functorch)."""
    c = torch._C
    return not (
        type(x) is not torch.Tensor
        or not x.is_cpu
        or (x.requires_grad and torch.is_grad_enabled())
        or _forced.get() is not None
        or c._len_torch_dispatch_stack()
        or c._len_torch_function_stack()
        or c._functorch.peek_interpreter_stack() is not None
        or c._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
        or native() is None
    )


def reasons_against_cpu(*tensors: torch.Tensor | None) -> list[str]:
    """Why compiled CPU kernels can't take these tensors."""
    if native() is None:
        return [why_not_native()]
    elsewhere = [device_type(t) for t in tensors if t is not None and device_type(t) != "cpu"]
    return [f"a tensor is on {elsewhere[0]}"] if elsewhere else []


def reasons_against_dtype(argument: str, dtype: torch.dtype) -> list[str]:
    """Why compiled kernels can't read or write this dtype."""
    return [] if dtype in NATIVE_DTYPE else [f"{argument} is {dtype}, the kernels take fp32, bf16 and fp16"]


def no_reason(*_: Any) -> list[str]:
    """The reference runs everywhere."""
    return []
