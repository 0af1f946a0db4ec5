"""The experts of a mixture whose weights stand in 3-D parameters, one expert's matrix at a time.

What is served are modules that follow transformers' protocol for fused experts (its ``use_experts_implementation``): parameters
``gate_up_proj`` or ``up_proj``, and ``down_proj``, each (experts, n, k) or, where ``is_transposed``, (experts, k, n); the flags
``has_gate``, ``has_bias``, ``has_post_expert_norm``; and forward(hidden_states, top_k_index, top_k_weights).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peftk.nn.dense_linear import Dense
from peftk.nn.nf4_linear import NF4Linear

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts", "_apply_gate")

# (projection, expert, x (tokens, k), which tokens of hidden_states these are) -> (tokens, n)
Project = Callable[[str, int, torch.Tensor, torch.Tensor], torch.Tensor]


def is_experts(module: nn.Module) -> bool:
    """Whether the module's forward pass can be served: it follows the protocol, and is no ``Experts`` yet."""
    if isinstance(module, Experts) or not all(hasattr(module, flag) for flag in _FLAGS):
        return False
    wanted = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return all(isinstance(p := module._parameters.get(name), nn.Parameter) and p.dim() == 3 for name in wanted)


def has_other_experts(module: nn.Module) -> bool:
    """Whether the module has 3-D parameters with a matrix for each of its experts, but a forward pass of its own."""
    count = getattr(module, "num_experts", None)
    if isinstance(module, Experts) or is_experts(module) or not isinstance(count, int):
        return False
    return any(p is not None and p.dim() == 3 and p.shape[0] == count for p in module._parameters.values())


class DenseExpert(Dense):
    """One expert's W (n, k) in a dense 3-D parameter, behind the base-layer interface."""

    bias = None

    def __init__(self, stored: torch.Tensor, expert: int, is_transposed: bool):
        self.weight, self._is_transposed = stored[expert], is_transposed  # a view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T, (..., k) -> (..., n)."""
        return self.product(x)

    def _rows(self) -> torch.Tensor:
        return self.weight.T if self._is_transposed else self.weight

    def dense_weight(self) -> torch.Tensor:
        """W (n, k) in its own dtype; a view."""
        return self._rows().detach()

    @torch.no_grad()
    def set_dense_weight(self, w: torch.Tensor) -> None:
        """Replace W by w (n, k), rounded once to the parameter's dtype."""
        self._rows().copy_(w)


class Experts(nn.Module):
    """Experts in the place of a module that follows the protocol, each projection dense or in 4 bits.

    hidden_states (tokens, d), top_k_index and top_k_weights (tokens, chosen) -> (tokens, d). Only experts that are chosen run,
    one after another, and no more than one expert's matrix is ever decoded. A projection in 4 bits is a list of NF4Linear, one
    an expert, under the parameter's name: its state_dict has bitsandbytes' keys below ``gate_up_proj.<expert>.``, and a dense
    3-D weight that is loaded is quantised as it comes.
    """

    @classmethod
    def from_module(cls, module: nn.Module) -> Experts:
        """Shares the module's parameters, parts and attributes: nothing is copied. TypeError names a class that isn't served."""
        if not is_experts(module):
            raise TypeError(f"module: expected fused experts by transformers' protocol, got {type(module).__name__}")
        layer = cls()
        layer.__dict__.update({key: value for key, value in vars(module).items() if key not in vars(layer)})
        for table in ("_parameters", "_buffers", "_modules"):
            getattr(layer, table).update(getattr(module, table))
        layer.kind = type(module)
        return layer.train(module.training)

    def projections(self) -> list[str]:
        """Names of the weights, in the order of the products."""
        return [name for name in PROJECTIONS if hasattr(self, name)]

    def matrix(self, name: str, expert: int) -> NF4Linear | DenseExpert:
        """W (n, k) of one expert, behind the base-layer interface, without the bias."""
        stored = getattr(self, name)
        return stored[expert] if isinstance(stored, nn.ModuleList) else DenseExpert(stored, expert, self.is_transposed)

    def quantize(self, name: str, block_size: int = 64, double_quant: bool = True, path: str = "experts") -> None:
        """Put the projection's matrices in 4 bits, each by itself; the dense parameter goes. ValueError names the expert and the
        first bad index where a matrix isn't finite; nothing has changed then."""
        made = []
        for expert in range(self.num_experts):
            w = self.matrix(name, expert).dense_weight()
            linear = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(w, requires_grad=False)
            made.append(NF4Linear.from_linear(linear, block_size, double_quant, name=f"{path}.{name}[{expert}]"))
        delattr(self, name)
        setattr(self, name, nn.ModuleList(made).train(self.training))

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        project: Project | None = None,
    ) -> torch.Tensor:
        """``project``: in the place of the plain product with one expert's matrix."""
        product = self._product if project is None else project
        first = "gate_up_proj" if self.has_gate else "up_proj"
        out = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        for expert, chosen in self._chosen(top_k_index):
            tokens = chosen // top_k_index.shape[-1]
            h = self._biased(first, expert, product(first, expert, hidden_states[tokens], tokens))
            h = self.kind._apply_gate(self, h) if self.has_gate else self.act_fn(h)
            y = self._biased("down_proj", expert, product("down_proj", expert, h.to(hidden_states.dtype), tokens))
            y = self.post_expert_norm(y) if self.has_post_expert_norm else y
            y = y * top_k_weights.flatten()[chosen, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out.to(hidden_states.dtype)

    def _chosen(self, top_k_index: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """(expert, flat places in top_k_index) of the experts that any token goes to; other numbers mean no expert."""
        flat = top_k_index.flatten()
        places = flat.argsort(stable=True).split(torch.bincount(flat, minlength=self.num_experts).tolist())
        return [(expert, where) for expert, where in enumerate(places[: self.num_experts]) if len(where)]

    def _product(self, name: str, expert: int, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.matrix(name, expert).forward(x)

    def _biased(self, name: str, expert: int, y: torch.Tensor) -> torch.Tensor:
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self.projections():
            dense = state_dict.get(f"{prefix}{name}")
            if isinstance(getattr(self, name), nn.ModuleList) and isinstance(dense, torch.Tensor) and dense.dim() == 3:
                matrices = state_dict.pop(f"{prefix}{name}").unbind(0)
                for expert, w in enumerate(matrices):
                    state_dict[f"{prefix}{name}.{expert}.weight"] = w.T if self.is_transposed else w
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        kinds = (f"{n}: {'nf4' if isinstance(getattr(self, n), nn.ModuleList) else 'dense'}" for n in self.projections())
        return f"{self.kind.__name__}, {self.num_experts} experts, {', '.join(kinds)}"
