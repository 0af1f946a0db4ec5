"""The base layer and one active adapter in one op, in front of HF peft's own forward, which does all else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Parts = tuple[torch.Tensor, torch.Tensor, float, float]  # A (r, k), B (n, r), scale, dropout


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class says: no hooks, no forward of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks and "forward" not in module.__dict__


class Fused:
    """A layer of HF peft with A and B; ``_base_runs`` and ``_run`` are the base layer's side."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., k) -> (..., n) in x.dtype."""
        y = None
        if kwargs.get("adapter_names") is not None and len(kwargs) == 1 and not args:
            y = self._mixed(x, kwargs["adapter_names"])
        elif not args and not kwargs and (name := self._lone_adapter()) is not None:
            y = self._fused(x, name)
        return super().forward(x, *args, **kwargs) if y is None else y

    def _mixed(self, x: torch.Tensor, names: list[str]) -> torch.Tensor | None:
        """The layer's output with an adapter for each row; None where HF peft's own code is needed."""
        return None

    def _lone_adapter(self) -> str | None:
        """The one adapter that runs beside the base layer; None where none does, or several do."""
        if self._disable_adapters or self.merged_adapters or not self.cast_input_dtype_enabled:
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        return names[0] if len(names) == 1 and self._base_runs() else None

    def _fused(self, x: torch.Tensor, name: str) -> torch.Tensor | None:
        """The layer's output; None where the adapter or the base layer needs HF peft's own code."""
        parts = self._parts(name)
        return None if parts is None else self._run(x, *parts)

    def _parts(self, name: str) -> Parts | None:
        raise NotImplementedError

    def _base_runs(self) -> bool:
        raise NotImplementedError

    def _run(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, dropout: float) -> torch.Tensor | None:
        raise NotImplementedError

    def _run_rows(
        self, x: torch.Tensor, A: Sequence[torch.Tensor], B: Sequence[torch.Tensor], scale: Sequence[float], index: Sequence[int]
    ) -> torch.Tensor | None:
        raise NotImplementedError

    def _dropout(self, name: str) -> float | None:
        """The probability now; None where the op has none for it."""
        module = self.lora_dropout[name]
        if type(module) is nn.Identity:
            return 0.0
        if not is_plain(module, nn.Dropout) or module.p >= 1:
            return None
        return module.p if module.training else 0.0


class FusedLora(Fused):
    """lora.Linear and lora.Linear4bit."""

    def _parts(self, name: str) -> Parts | None:
        A, B, scaling, dropout = self.lora_A[name], self.lora_B[name], self.scaling[name], self._dropout(name)
        plain = is_plain(A, nn.Linear) and is_plain(B, nn.Linear) and A.bias is None and B.bias is None
        if not plain or dropout is None or not isinstance(scaling, (int, float)) or self._needs_variant(name):
            return None
        return A.weight, B.weight, scaling, dropout

    def _needs_variant(self, name: str) -> bool:
        return name in self.lora_variant

    def _mixed(self, x: torch.Tensor, names: list[str]) -> torch.Tensor | None:
        self._check_forward_args(x, adapter_names=names)
        used = [name for name in dict.fromkeys(names) if name in self.lora_A]
        if self._disable_adapters or not self.cast_input_dtype_enabled or not self._base_runs():
            return None
        parts = [None if name in self.lora_variant else self._parts(name) for name in used]
        if not used or any(one is None or one[-1] for one in parts):
            return None
        numbers = {name: number for number, name in enumerate(used)}
        A, B, scale, _ = zip(*parts, strict=True)
        return self._run_rows(x, A, B, scale, [numbers.get(name, -1) for name in names])


class FusedAdaLora(Fused):
    """adalora.SVDLinear and SVDLinear4bit: the op's A is A * E * scaling / ranknum."""

    def _parts(self, name: str) -> Parts | None:
        A, dropout = self.lora_A[name], self._dropout(name)
        if dropout is None or not len(A):
            return None
        E = self.lora_E[name] * (self.scaling[name] / (self.ranknum[name] + 1e-5))
        return A * E, self.lora_B[name], 1.0, dropout
