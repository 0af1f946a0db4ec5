"""LoRA on the 3-D weights of fused experts: a low-rank branch for each expert, of which only the chosen ones run.

HF peft's shapes and keys (its ``target_parameters``): A (E r, k) holds expert e in rows e r to e r + r, B (n, r E) in the columns
e, e + E, …; where a module has several such weights, the keys of all but the last have a ``base_layer.`` for each that follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftk.methods.adapter import AdapterLayer
from peftk.methods.lora_init import draw
from peftk.methods.low_rank import Matrices
from peftk.nn import Experts
from peftk.nn.dense_linear import add_low_rank

if TYPE_CHECKING:
    from peftk.methods.lora import LoraConfig

# Of one adapter and one weight: A (r, k) and B (n, r) for each expert, scale, dropout.
_Branch = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], float, float]


class LoraExperts(AdapterLayer):
    """Fused experts with low-rank branches: hidden_states (tokens, d), top_k_index, top_k_weights -> (tokens, d).

    No difference of a weight's size is made, as HF peft makes one, or the sum with it, in every forward pass; so dropout works.
    """

    VARIANTS = frozenset({"orthogonal"})

    def __init__(self, module: nn.Module):
        super().__init__(module if isinstance(module, Experts) else Experts.from_module(module), module)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()  # by weight, by adapter
        self.scaling: dict[str, dict[str, float]] = {}  # by adapter, by weight
        self.dropout: dict[str, float] = {}

    @property
    def weight(self) -> torch.Tensor:
        """The first of the weights, or its first expert's."""
        stored = getattr(self.base_layer, self.base_layer.projections()[0])
        return stored[0].weight if isinstance(stored, nn.ModuleList) else stored

    def original(self) -> nn.Module:
        return self._plain().train(self.training)

    def _plain(self) -> nn.Module:
        """The module that stood here, with the weights as they are now: it may have a faster way for all experts at once."""
        module = self._original[0]
        if module is not self.base_layer:
            module._parameters.update(self.base_layer._parameters)
        return module

    def adapter_names(self) -> list[str]:
        return list(self.scaling)

    def targets(self, name: str) -> list[str]:
        """The weights that an adapter has branches for, in the module's order."""
        return [p for p in self.base_layer.projections() if p in self.scaling.get(name, {})]

    def add_adapter(self, name: str, parameter: str, r: int, scaling: float, config: LoraConfig) -> None:
        """Fresh factors for the experts of one weight, each expert's as a linear layer's."""
        n, k = self.base_layer.matrix(parameter, 0).dense_weight().shape
        facts = {"device": self.weight.device, "dtype": self.factor_dtype()}
        drawn = [draw(config.init_lora_weights, n, k, r, **facts) for _ in range(self.base_layer.num_experts)]
        for table, factor in ((self.lora_A, _rows([A for A, _ in drawn])), (self.lora_B, _columns([B for _, B in drawn]))):
            if parameter not in table:
                table[parameter] = nn.ParameterDict()
            table[parameter][name] = nn.Parameter(factor)
        self.scaling.setdefault(name, {})[parameter] = scaling
        self.dropout[name] = config.lora_dropout

    def delete_adapter(self, name: str) -> None:
        for parameter in self.targets(name):
            for table in (self.lora_A, self.lora_B):
                del table[parameter][name]
                if not len(table[parameter]):
                    del table[parameter]
        del self.scaling[name], self.dropout[name]

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [table[parameter][name] for parameter in self.targets(name) for table in (self.lora_A, self.lora_B)]

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        found = {}
        for depth, parameter in enumerate(reversed(self.targets(name))):
            for key, table in (("lora_A", self.lora_A), ("lora_B", self.lora_B)):
                found[f"{'base_layer.' * depth}{key}.weight"] = table[parameter][name]
        return found

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            project = _ByRow(self, hidden_states)
        elif names := self.running():
            project = _Added(self.base_layer, [self._branches(name) for name in names])
        else:
            return self._plain().forward(hidden_states, top_k_index, top_k_weights)
        return self.base_layer.forward(hidden_states, top_k_index, top_k_weights, project)

    def _branches(self, name: str) -> dict[str, _Branch]:
        """By weight. The factors are taken apart once, so that their gradients come together in one tensor each."""
        dropout = self.dropout[name] if self.training else 0.0
        return {p: (*self._apart(name, p), self.scaling[name][p], dropout) for p in self.targets(name)}

    def _apart(self, name: str, parameter: str) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """A (r, k) and B (n, r) for each expert."""
        A, B, count = self.lora_A[parameter][name], self.lora_B[parameter][name], self.base_layer.num_experts
        apart = B.view(B.shape[0], -1, count).permute(2, 0, 1).contiguous()
        return A.view(count, -1, A.shape[1]).unbind(0), apart.unbind(0)

    def matrices(self, name: str) -> Matrices:
        """The factors of what the adapter adds to each weight, one matrix an expert, without the scale."""
        with torch.no_grad():
            wide, targets = self.factor_dtype(), self.targets(name)
            return {f".{p}": tuple(torch.stack(factors).to(wide) for factors in self._apart(name, p)) for p in targets}

    def matrix_scale(self, name: str, label: str) -> float:
        """The scale of ``matrices(name)[label]``."""
        return self.scaling[name][label.removeprefix(".")]

    @torch.no_grad()
    def set_matrices(self, name: str, matrices: Matrices) -> None:
        """Copy values of the adapter's shapes into it."""
        for label, (A, B) in matrices.items():
            self.lora_A[label.removeprefix(".")][name].copy_(_rows(A.unbind(0)))
            self.lora_B[label.removeprefix(".")][name].copy_(_columns(B.unbind(0)))

    def parts(self, names: Iterable[str]) -> list[ExpertPart]:
        """A matrix for each expert of each weight that one of the adapters changes."""
        names = list(names)
        changed = [p for p in self.base_layer.projections() if any(p in self.targets(name) for name in names)]
        return [ExpertPart(self, p, expert) for p in changed for expert in range(self.base_layer.num_experts)]

    def merge(self, names: list[str], keep_original: bool, is_tied: bool) -> None:
        if is_tied:
            raise ValueError("expected experts of a module of its own, got weights that are tied to another module's")
        super().merge(names, keep_original, is_tied)

    def take_snapshot(self) -> dict[str, list[Any]]:
        experts = range(self.base_layer.num_experts)
        return {p: [self.base_layer.matrix(p, e).weight_snapshot() for e in experts] for p in self.lora_A}

    def restore_snapshot(self, snapshot: dict[str, list[Any]]) -> None:
        for parameter, matrices in snapshot.items():
            for expert, stored in enumerate(matrices):
                self.base_layer.matrix(parameter, expert).restore_weight(stored)


def _rows(factors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A (r, k) of each expert -> (E r, k)."""
    return torch.cat(list(factors))


def _columns(factors: Iterable[torch.Tensor]) -> torch.Tensor:
    """B (n, r) of each expert -> (n, r E), the experts side by side in every r."""
    return torch.stack(list(factors), dim=2).flatten(1)


@dataclass
class ExpertPart:
    """One expert's matrix, as a merge sees it."""

    layer: LoraExperts
    parameter: str
    expert: int

    @property
    def label(self) -> str:
        return f".{self.parameter}[{self.expert}]"

    @property
    def _matrix(self) -> Any:
        return self.layer.base_layer.matrix(self.parameter, self.expert)

    @property
    def weight(self) -> torch.Tensor:
        return self._matrix.weight

    def read_weight(self) -> torch.Tensor:
        return self._matrix.dense_weight()

    def write_weight(self, w: torch.Tensor) -> None:
        self._matrix.set_dense_weight(w)

    def rounded(self, w: torch.Tensor) -> torch.Tensor:
        return self._matrix.rounded(w)

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        """s B A (n, k) of the expert; zero for an adapter without this weight."""
        if self.parameter not in self.layer.targets(name):
            return torch.zeros_like(self.read_weight(), dtype=self.layer.factor_dtype())
        A, B = (f[self.expert].to(self.layer.factor_dtype()) for f in self.layer._apart(name, self.parameter))
        return (B @ A).mul_(self.layer.scaling[name][self.parameter])

    @torch.no_grad()
    def merged_weight(self, names: Iterable[str]) -> torch.Tensor:
        """W with the adapters added, in fp32."""
        return sum((self.delta_weight(name) for name in names), self.read_weight().to(self.layer.factor_dtype()))


class _Added:
    """Experts' products with the branches of some adapters added."""

    def __init__(self, base: Experts, adapters: list[dict[str, _Branch]]):
        self._base, self._adapters = base, adapters

    def __call__(self, parameter: str, expert: int, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        matrix = self._base.matrix(parameter, expert)
        branches = [adapter[parameter] for adapter in self._adapters if parameter in adapter]
        if not branches:
            return matrix.forward(x)
        (A, B, scale, dropout), *others = branches
        y = matrix.forward_low_rank(x, A[expert], B[expert], scale, dropout=dropout)
        for A, B, scale, dropout in others:
            y = add_low_rank(y, x, A[expert], B[expert], scale, None, dropout, None)
        return y


class _ByRow:
    """Experts' products with the branches of each token's own adapter; tokens of a batch's row stand together."""

    def __init__(self, layer: LoraExperts, hidden_states: torch.Tensor):
        self._base = layer.base_layer
        groups = layer.rows_of(hidden_states.shape[0], hidden_states.device)
        self._group = torch.zeros(hidden_states.shape[0], dtype=torch.long, device=hidden_states.device)
        self._branches: list[dict[str, _Branch]] = []
        for number, (names, rows) in enumerate(groups.items()):
            self._group[rows] = number
            self._branches.append(layer._branches(names[0]) if names else {})

    def __call__(self, parameter: str, expert: int, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        y = self._base.matrix(parameter, expert).forward(x)
        for number, branches in enumerate(self._branches):
            where = (self._group[tokens] == number).nonzero().flatten()
            if parameter in branches and len(where):
                A, B, scale, dropout = branches[parameter]
                y = y.index_copy(0, where, add_low_rank(y[where], x[where], A[expert], B[expert], scale, None, dropout, None))
        return y
