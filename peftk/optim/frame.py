"""The frame of all optimizers: groups, moments in 32 or 8 bits, paged or not, gradients that are not finite, state dicts. What an
optimizer is, is a Formula; a step is one call of its op for all tensors of a dtype."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from peftk.optim import layouts, moments, stepping
from peftk.optim.moments import BITS, STEP
from peftk.optim.pages import Pages
from peftk.shards import part, shard_like

NONFINITE = ("keep", "skip", "raise")
NUMBERS = {2: "two", 3: "three"}
logger = logging.getLogger("peftk")


@dataclass(frozen=True)
class Options:
    """Of an optimizer as a whole; its groups have the others."""

    min_8bit_size: int  # elements
    nonfinite: str  # of NONFINITE
    paged: bool
    budget: int | None  # bytes
    folder: str | os.PathLike | None

    def __post_init__(self) -> None:
        if self.nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite: expected one of {', '.join(NONFINITE)}, got {self.nonfinite!r}")
        for name in ("budget", "folder"):
            if getattr(self, name) is not None and not self.paged:
                raise ValueError(f"{name}: expected only with paged=True, got {getattr(self, name)!r}")


class _Kept:
    """A parameter's loaded state, which torch.optim.Optimizer would cast to the parameter's dtype."""

    def __init__(self, state: moments.State) -> None:
        self.state = state


class Frame(torch.optim.Optimizer):
    """An optimizer with a FORMULA of its own; ``defaults`` are what its groups have beside ``bits`` and ``maximize``."""

    OPTIONS: ClassVar[str] = """
    params: as torch takes them, with names if they come from ``named_parameters()``; a group may have options of its own. fp32,
    bf16 or fp16.
    bits: of the moments, 32 or 8. In 8 bits parameters of fewer than ``min_8bit_size`` elements (4096), and those that
    ``override`` names, stay at 32.
    nonfinite: what a gradient with NaN or Inf does. "keep": it goes into the parameter and its moments, as in torch. "skip":
    nothing is changed by that step, a warning names the parameter, ``skipped_steps`` counts. "raise": FloatingPointError names
    it, and nothing is changed. Looking costs one pass over the gradients.
    maximize: up the gradient instead of down.
    paged: moments may leave memory between two steps. At most ``budget`` bytes of them are resident on a device at a time (None:
    as many as the system lets); the rest lies in a page file in ``folder`` (TMPDIR if None) on a CPU, in host memory on a GPU.
    OSError, before anything is trained, where no page file can be made there or its disk has no room for all moments together.

    Moments of a loaded state come to the bits of this optimizer. ValueError names an argument out of its range.
    """
    FORMULA: ClassVar[stepping.Formula]

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        bits: int = 32,
        min_8bit_size: int = 4096,
        nonfinite: str = "keep",
        maximize: bool = False,
        paged: bool = False,
        budget: int | None = None,
        folder: str | os.PathLike | None = None,
    ) -> None:
        self.options = Options(min_8bit_size, nonfinite, paged, budget, folder)
        self.skipped_steps = 0
        self._pages = Pages(budget, folder) if paged else None
        super().__init__(params, defaults | dict(maximize=maximize, bits=bits))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. ValueError or TypeError names the option or the parameter that doesn't fit; OSError as when made."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group, self._names(len(self.param_groups) - 1))
            if self._pages:
                self._pages.check_room(self._missing_bytes())
        except (OSError, TypeError, ValueError):
            self.param_groups.pop()
            raise

    def override(self, param: torch.Tensor | str, bits: int) -> None:
        """Keep this parameter's moments in so many bits, 32 or 8, whatever its size; ``param`` may be its name where the
        optimizer knows names. What is there already is converted. KeyError for a parameter that isn't here."""
        _check_bits("bits", bits)
        for group, name, p in self._all():
            if p is param or (isinstance(param, str) and name == param):
                state = self.state[p]
                state[BITS] = bits
                if STEP in state:
                    self.state[p] = self._placed(p, group, state, name)
                return
        known = param if isinstance(param, str) else f"a tensor of shape {tuple(param.shape)}"
        raise KeyError(f"param: expected a parameter of this optimizer, or its name if it was given names, got {known}")

    def cut_state(self, param: torch.Tensor, dim: int, index: torch.Tensor) -> None:
        """Keep only ``index`` along ``dim`` of a parameter's moments; ``param`` has its new shape already (``peftk.compact``).
        8-bit moments are decoded, cut and coded anew, in 32 bits where the parameter has become too small for 8."""
        for group, name, p in self._all():
            if p is not param or not moments.bits_of(self.state.get(p, {})):
                continue
            state = moments.converted(self.state.pop(p), 32)
            cut = {key: state[key].index_select(dim, index.to(state[key].device)) for key in self.FORMULA.names(32)}
            if p.numel():
                self.state[p] = self._placed(p, group, state | cut, name)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter with a gradient; the loss where a closure computes it again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.options.nonfinite != "keep" and self._is_stopped():
            return loss
        work = [
            (call, self.FORMULA.coefficients(group, call.step))
            for group in self.param_groups
            for call in stepping.calls(self.FORMULA, group, self.state, lambda p, group=group: self._start(p, group))
        ]
        if self._pages:
            self._pages.run(work)
        else:
            for call, numbers in work:
                stepping.run(call, numbers)
        for call, _ in work:
            call.count_step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's. 8-bit moments of parameters that are split among processes come in 32 bits, which any split can load."""
        found = super().state_dict()
        return found | {"state": {key: moments.can_be_moved(state) for key, state in found["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; also of bitsandbytes' optimizer of that name. Moments come to the bits of this optimizer and to the
        parameter's device, and are paged where this is paged; byte for byte where they have these bits. ValueError or TypeError
        names what doesn't fit; nothing has changed then."""
        ours = layouts.from_any(state_dict, self.FORMULA.moments)
        before = {"state": self.state, "param_groups": self.param_groups}
        try:
            super().load_state_dict(ours | {"state": {key: _Kept(state) for key, state in ours["state"].items()}})
            for i, (group, old) in enumerate(zip(self.param_groups, before["param_groups"], strict=True)):
                group["bits"] = old["bits"]
                self._check_group(group, self._names(i))
            for group, name, p in self._all():
                if isinstance(kept := self.state.get(p), _Kept):
                    self.state[p] = self._placed(p, group, kept.state, name)
        except BaseException:
            self.__dict__.update(before)
            raise

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"options": self.options, "skipped_steps": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if "options" in state:  # unpickled or copied: what was paged is ordinary memory now
            self._pages = Pages(self.options.budget, self.options.folder) if self.options.paged else None
            for group, name, p in self._all() if self._pages else ():
                if p in self.state:
                    self.state[p] = self._placed(p, group, self.state[p], name)

    def _start(self, param: torch.Tensor, group: dict[str, Any]) -> moments.State:
        """The state of a parameter before its first step; what ``override`` has noted stays."""
        state = self.state[param]
        state.update(moments.fresh(param, self.FORMULA.moments, self._bits(param, group, state), (self._pages or torch).full))
        return state

    def _placed(self, param: torch.Tensor, group: dict[str, Any], state: moments.State, name: str) -> moments.State:
        """A state in the bits, on the device and in the memory that it has here; of its own, not shared with the one given."""
        if not (had := moments.bits_of(state)):
            return dict(state)
        bits = self._bits(param, group, state)
        for moment in self.FORMULA.moments:
            key = moment.name if had == 32 else moment.codes
            if state[key].numel() != param.numel():
                raise ValueError(f"{name}.{key}: expected shape {tuple(param.shape)}, got {tuple(state[key].shape)}")
        there = {key: value.to(param.device) if isinstance(value, torch.Tensor) else value for key, value in state.items()}
        placed, own = moments.converted(moments.split_like(there, param), bits), part(param)
        for key in self.FORMULA.names(bits):
            value = part(placed[key])
            shape = own.shape if value.numel() == own.numel() else value.shape
            dtype = torch.promote_types(param.dtype, torch.float32) if bits == 32 else value.dtype
            source = value.view(shape)
            made = self._pages.copied(source, dtype) if self._pages else _copied(source, dtype)
            placed[key] = shard_like(made, placed[key])
        return placed

    def _bits(self, param: torch.Tensor, group: dict[str, Any], state: moments.State) -> int:
        """Of a parameter's moments: as overridden; else those of the group where it is large enough; 32 for fp64."""
        if param.dtype == torch.float64:
            return 32
        return state.get(BITS) or (group["bits"] if param.numel() >= self.options.min_8bit_size else 32)

    def _missing_bytes(self) -> dict[torch.device, int]:
        """That moments will take on each device, of all parameters that train and have none yet."""
        missing: dict[torch.device, int] = {}
        for group, _, p in self._all():
            if p.requires_grad and not moments.bits_of(self.state.get(p, {})):
                bits = self._bits(p, group, self.state.get(p, {}))
                nbytes = moments.nbytes(part(p).numel(), self.FORMULA.moments, bits, p.dtype)
                missing[p.device] = missing.get(p.device, 0) + nbytes
        return missing

    def _check_group(self, group: dict[str, Any], names: list[str]) -> None:
        _check_bits("bits", group["bits"])
        if not isinstance(group["betas"], list | tuple) or len(group["betas"]) != self.FORMULA.betas:
            raise ValueError(f"betas: expected {NUMBERS[self.FORMULA.betas]} numbers, got {group['betas']}")
        if not isinstance(group["maximize"], bool):
            raise TypeError(f"maximize: expected True or False, got {group['maximize']!r}")
        if not isinstance(group["lr"], torch.Tensor | int | float) or isinstance(group["lr"], bool):
            raise TypeError(f"lr: expected a number, got {group['lr']!r}")
        if isinstance(group["lr"], torch.Tensor) and group["lr"].numel() != 1:
            raise ValueError(f"lr: expected a number, got a tensor of shape {tuple(group['lr'].shape)}")
        self.FORMULA.coefficients(group, 1)
        for name, p in zip(names, group["params"], strict=True):
            if not p.is_floating_point():
                raise TypeError(f"{name}: expected a floating-point parameter, got {p.dtype}")

    def _is_stopped(self) -> bool:
        """Whether a gradient that isn't finite forbids this step."""
        found = [(name, p.grad) for _, name, p in self._all() if p.grad is not None and p.grad.layout is torch.strided]
        index = stepping.first_not_finite([grad for _, grad in found])
        if index is None:
            return False
        message = f"the gradient of {found[index][0]} has elements that are not finite"
        if self.options.nonfinite == "raise":
            raise FloatingPointError(message)
        self.skipped_steps += 1
        logger.warning("%s: this step changes nothing (%d skipped so far)", message, self.skipped_steps)
        return True

    def _all(self) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
        """Every parameter with its group and its name."""
        for i, group in enumerate(self.param_groups):
            for name, p in zip(self._names(i), group["params"], strict=True):
                yield group, name, p

    def _names(self, group: int) -> list[str]:
        """Of a group's parameters: as they were given, or their places."""
        chosen = self.param_groups[group]
        return chosen.get("param_names") or [f"param_groups[{group}]['params'][{i}]" for i in range(len(chosen["params"]))]


def _check_bits(name: str, bits: int) -> None:
    if bits not in (32, 8):
        raise ValueError(f"{name}: expected 32 or 8, got {bits}")


def _copied(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(source.shape, dtype=dtype, device=source.device).copy_(source)


def sign_of(group: Mapping[str, Any]) -> float:
    """What a group's gradients are multiplied by."""
    return -1.0 if group["maximize"] else 1.0
