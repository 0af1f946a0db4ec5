"""LoRA on dense 2-D and 3-D parameters of any module: its forward pass runs with W + s B A in the parameter's place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftk.methods.lora_experts import LoraExperts
from peftk.nn.experts import DenseExpert


def is_matrix(parameter: torch.Tensor | None) -> bool:
    """Whether a parameter is a dense matrix or a stack of them."""
    return parameter is not None and parameter.dim() in (2, 3) and parameter.dtype.is_floating_point


class LoraParameters(LoraExperts):
    """Any module with low-rank branches on parameters (n, k) or (experts, n, k), by (experts, k, n) where the module says
    ``is_transposed``; takes and returns what the module does.

    Each forward pass makes W + s B A, as HF peft does, for how the module uses W is not known: no dropout, no rows.
    """

    @staticmethod
    def _base_of(module: nn.Module) -> nn.Module:
        return module

    def weights(self) -> list[str]:
        return [name for name, parameter in self.base_layer._parameters.items() if is_matrix(parameter)]

    def count(self, parameter: str) -> int:
        stored = getattr(self.base_layer, parameter)
        return stored.shape[0] if stored.dim() == 3 else 1

    def matrix(self, parameter: str, expert: int) -> DenseExpert:
        return DenseExpert(self._stack(parameter), expert, self._is_transposed(parameter))

    def _stack(self, parameter: str) -> torch.Tensor:
        stored = self.base_layer._parameters[parameter]
        return stored if stored.dim() == 3 else stored[None]

    def _is_transposed(self, parameter: str) -> bool:
        return self.base_layer._parameters[parameter].dim() == 3 and getattr(self.base_layer, "is_transposed", False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is not None:
            raise ValueError(
                f"names: expected adapters that can differ from row to row, got those of {', '.join(self.lora_A)} in a "
                f"{type(self.base_layer).__name__}, which all rows of a call share"
            )
        base, names = self.base_layer, self.running()
        values = {p: self._adapted(p, names) for p in self.lora_A if any(p in self.targets(name) for name in names)}
        base.__dict__.update(values)  # found before the Parameter of that name
        try:
            return base.forward(*args, **kwargs)
        finally:
            for parameter in values:
                del base.__dict__[parameter]

    def _adapted(self, parameter: str, names: list[str]) -> torch.Tensor:
        """W + sum of s B A, in W's shape and dtype."""
        stack = self._stack(parameter)
        for name in names:
            if parameter in self.targets(name):
                A, B = (torch.stack(factors) for factors in self._apart(name, parameter))
                delta = (B @ A).mul(self.scaling[name][parameter]).to(stack.dtype)
                stack = stack + (delta.mT if self._is_transposed(parameter) else delta)
        return stack.view(self.base_layer._parameters[parameter].shape)
