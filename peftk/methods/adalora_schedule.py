"""AdaLoRA's budget in any training loop: by a hook on the optimizer, or by hand."""

from __future__ import annotations

import dataclasses
import logging
import sys
from types import FrameType
from typing import Any

import torch
from torch import distributed, nn

from peftk.methods.adalora import config_of
from peftk.methods.adalora_layer import AdaLoraLayer, Triplets
from peftk.methods.attach import attached, find_attached, wrappers
from peftk.methods.compaction import compact
from peftk.methods.orthogonality import add_gradient, factors
from peftk.methods.rank_allocator import RankAllocator

logger = logging.getLogger("peftk")


def update_and_allocate(model: nn.Module, step: int, adapter_name: str = "default") -> dict[str, int]:
    """AdaLoRA by hand: call it after ``optimizer.step()`` and before ``zero_grad()``. Returns the rank of each matrix.

    ``step`` is the number of optimizer steps so far. At ``total_step - tfinal`` ranks are final, and from there on pruned values
    are held at 0; ``peftk.compact`` removes them. ValueError: no AdaLoRA adapter, no gradients, or gradients that aren't finite.
    """
    allocator = rank_allocator(model, adapter_name)
    allocator.advance(_matrices(model, adapter_name), step)
    return allocator.ranks()


def rank_allocator(model: nn.Module, adapter_name: str = "default") -> RankAllocator:
    """The adapter's allocator, with ``history``, ``state_dict`` and ``load_state_dict``. ValueError for no AdaLoRA adapter."""
    config, allocators = config_of(model, adapter_name), attached(model).allocators
    if adapter_name not in allocators:
        allocators[adapter_name] = RankAllocator(config, _matrices(model, adapter_name))
    return allocators[adapter_name]


def adalora_schedule(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    total_step: int | None = None,
    adapter_name: str = "default",
    orthogonality: bool = True,
    compact: bool = True,
) -> AdaLoraSchedule:
    """Let each ``optimizer.step()`` do AdaLoRA's part: add the regulariser's gradient before, update ranks after.

    ``total_step`` replaces the config's. ``orthogonality=False``: the loss has ``peftk.orthogonality_loss`` in it already.
    ``compact``: after the last pruning the pruned triplets are removed, also from the optimizer's state. Clipping of gradients
    happens before the step and does not see the regulariser. Steps in which the adapter got no gradients don't count.

    ValueError: no AdaLoRA adapter, parameters of it that the optimizer doesn't have, or a total_step without room for pruning.
    """
    return AdaLoraSchedule(model, optimizer, total_step, adapter_name, orthogonality, compact)


class AdaLoraSchedule:
    """What ``adalora_schedule`` puts on an optimizer; ``remove()`` takes it off."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_step: int | None,
        adapter_name: str,
        orthogonality: bool,
        compact: bool,
    ):
        self.model, self.adapter_name, self.orthogonality, self.compact = model, adapter_name, orthogonality, compact
        self.allocator = rank_allocator(model, adapter_name)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self._check_parameters(optimizer)
        self._drop_states_of_other_ranks(optimizer)
        if total_step is not None:
            dataclasses.replace(self.allocator.config, total_step=total_step)  # its checks
            self.allocator.config.total_step = total_step
        self._counts = True  # whether the step that is going on does
        self._skipped = 0  # steps that the optimizer had skipped before it
        self._frame: FrameType | None = None  # of the step that is going on
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        return self.allocator.step

    @property
    def history(self) -> list[tuple[int, dict[str, int]]]:
        """The allocator's."""
        return self.allocator.history

    def state_dict(self) -> dict[str, Any]:
        """The allocator's: with the adapter and the optimizer's state all that resuming needs."""
        return self.allocator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. ValueError where it belongs to other matrices."""
        self.allocator.load_state_dict(state)

    def remove(self) -> None:
        """Leave the optimizer alone from now on."""
        for handle in self._handles:
            handle.remove()

    def _check_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for path, triplets in _matrices(self.model, self.adapter_name).items():
            if any(id(p) not in theirs for p in triplets):
                raise ValueError(f"optimizer: expected the parameters of {self.adapter_name!r} in it, got one without {path}'s")

    def _drop_states_of_other_ranks(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer that trained fewer triplets, before an earlier checkpoint was loaded into the model, has no use for those
        states, and torch's fused kernels would go past their ends."""
        dropped = []
        for path, triplets in _matrices(self.model, self.adapter_name).items():
            for parameter in triplets:
                tensors = [t for t in optimizer.state.get(parameter, {}).values() if isinstance(t, torch.Tensor) and t.dim() == 2]
                shapes = {t.shape for t in tensors}  # two, where an optimizer keeps sums over rows and over columns
                if len(shapes) == 1 and parameter.shape not in shapes:
                    del optimizer.state[parameter]
                    dropped.append(path)
        if dropped:
            logger.warning(
                "optimizer: states for another number of triplets are dropped, of %s", ", ".join(dict.fromkeys(dropped))
            )

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._is_inside_a_step():
            return
        self._frame, self._counts = sys._getframe(1), False
        if not self._is_in_place():
            return
        self._skipped = getattr(optimizer, "skipped_steps", 0)
        parameters = [p for triplets in _matrices(self.model, self.adapter_name).values() for p in triplets]
        has_closure = any(argument is not None for argument in (*args[1:], *kwargs.values()))  # args[0] is the optimizer
        self._counts = has_closure or any(p.grad is not None for p in parameters)
        if not self._counts or not self.orthogonality:
            return
        if has_closure:
            raise ValueError(
                "optimizer.step: expected no closure, which would compute the gradients anew and lose the regulariser's; give "
                "adalora_schedule orthogonality=False and add peftk.orthogonality_loss(model) to the loss"
            )
        weight = self.allocator.config.orth_reg_weight
        if weight:
            add_gradient(factors(self.model, self.adapter_name), weight * _grad_scale(optimizer))

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._frame is not sys._getframe(1):
            return
        self._frame = None
        if not self._counts or _found_infinity(optimizer) or getattr(optimizer, "skipped_steps", 0) > self._skipped:
            return
        was_final = self.allocator.is_final
        matrices = _matrices(self.model, self.adapter_name)
        self.allocator.advance(matrices, self.allocator.step + 1)
        if self.compact and self.allocator.is_final and not was_final:
            self._compact(optimizer)

    def _is_inside_a_step(self) -> bool:
        """Where an optimizer's step calls its parent class's, torch calls hooks for both; the outer one counts. A step that ended
        with an exception is on the stack no more."""
        frame = sys._getframe(2)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def _is_in_place(self) -> bool:
        """Whether the adapter is still there, and no other under its name."""
        state = find_attached(self.model)
        return state is not None and state.allocators.get(self.adapter_name) is self.allocator

    def _compact(self, optimizer: torch.optim.Optimizer) -> None:
        """Where shapes can't change the values stay 0, and a line says so: training goes on all the same."""
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            logger.warning("pruned triplets stay, with value 0: gradients are shared among processes; peftk.compact removes them")
            return
        try:
            compact(self.model, optimizer, self.adapter_name)
        except ValueError as error:
            logger.warning("pruned triplets stay, with value 0: %s", error)


def _matrices(model: nn.Module, name: str) -> dict[str, Triplets]:
    layers = wrappers(model, AdaLoraLayer)
    return {path: layer.triplets(name) for path, layer in layers if name in layer.adapter_names()}


def _grad_scale(optimizer: torch.optim.Optimizer) -> float | torch.Tensor:
    """What a gradient scaler leaves to a fused optimizer to divide by, for the length of a step. After the step the gradients
    are divided: torch's fused kernels write them back."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else scale


def _found_infinity(optimizer: torch.optim.Optimizer) -> bool:
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
