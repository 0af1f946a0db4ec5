"""LoRA on a linear layer (Hu et al. 2021, section 4.1), and how DoRA and starts taken out of W fit in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftk.format.nf4 import NF4Weight
from peftk.methods import dora
from peftk.methods.adapter import AdapterLayer
from peftk.methods.dora import Decomposed
from peftk.methods.lora_init import Start, draw
from peftk.methods.row_branches import forward_rows
from peftk.nn import NF4Linear, base_layer
from peftk.nn.dense_linear import add_low_rank
from peftk.ops import quantize_nf4
from peftk.ops.philox_dropout import draw_seed, philox_dropout

if TYPE_CHECKING:
    from peftk.methods.lora import LoraConfig


def keep_off_fast_path(module: nn.Module, arguments: Any) -> None:
    """nn.TransformerEncoderLayer's fast path reads the weights itself, without adapters; it keeps off where a hook is found."""


@dataclass
class Taken:
    """The part s B A of W that an adapter's start took out of the stored weight; ``taken_A`` and ``taken_B`` hold the factors."""

    owner: str | None  # None: the adapter is gone, and the part goes back as soon as nothing is merged
    scaling: float


class LoraLinear(Decomposed, AdapterLayer):
    """A linear base layer, dense or in 4 bits, with low-rank branches: x (..., k) -> (..., n), in the base layer's dtype.

    W is the weight without adapters. The base layer stores W, or, where an adapter's start was taken out of it (PiSSA, OLoRA,
    LoftQ), the rest: the start's factors then go on as a branch of their own wherever that adapter does not run.
    """

    VARIANTS = frozenset({"use_dora", "orthogonal", "pissa", "olora", "loftq", "eva"})

    def __init__(self, module: nn.Module):
        super().__init__(base_layer(module), module)
        if self.base_layer is not module:
            self.base_layer.register_forward_pre_hook(keep_off_fast_path)
        self.in_features, self.out_features = self.base_layer.in_features, self.base_layer.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()  # (r, k) and (n, r)
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.taken: Taken | None = None

    def adapter_names(self) -> list[str]:
        return list(self.lora_A)

    def add_adapter(self, name: str, r: int, scaling: float, config: LoraConfig) -> None:
        """Fresh factors (lora_init.draw), and with DoRA a magnitude."""
        facts = {"device": self.weight.device, "dtype": self.factor_dtype()}
        A, B = draw(config.init_lora_weights, self.out_features, self.in_features, r, **facts)
        self.lora_A[name], self.lora_B[name] = nn.Parameter(A), nn.Parameter(B)
        self.scaling[name], self.dropout[name] = scaling, config.lora_dropout
        if config.use_dora:
            self.add_magnitude(name)

    @torch.no_grad()
    def take_start(self, name: str, start: Start) -> None:
        """Give an adapter the factors of ``start``, and leave in the base layer what they don't say of W."""
        self.lora_A[name].copy_(start.A)
        self.lora_B[name].copy_(start.B)
        if start.w4 is None:
            self.write_weight(torch.addmm(self.read_weight().to(start.A.dtype), start.B, start.A, alpha=-self.scaling[name]))
        else:
            self._become_nf4(start.w4)
        self.taken = Taken(name, self.scaling[name])
        self.register_buffer("taken_A", start.A.clone(), persistent=False)
        self.register_buffer("taken_B", start.B.clone(), persistent=False)
        self.norms.drop()
        if name in self.with_dora:
            self.add_magnitude(name)

    def set_directions(self, name: str, A: torch.Tensor, scaling: float) -> None:
        """A fresh adapter again, with A (r, k) as given, of whatever rank, and B zero: new Parameters."""
        self.lora_A[name] = nn.Parameter(A.to(self.weight.device, self.factor_dtype(), copy=True))
        self.lora_B[name] = nn.Parameter(self.lora_A[name].new_zeros(self.out_features, A.shape[0]))
        self.scaling[name] = scaling
        self.norms.scales.pop(name, None)

    def quantize_base(self, block_size: int, double_quant: bool) -> None:
        """What the base layer stores goes into 4 bits; nothing where it is. The layer is an NF4Linear from then on, also without
        adapters."""
        if not isinstance(self.base_layer, NF4Linear):
            self._become_nf4(quantize_nf4(self.base_layer.dense_weight(), block_size, double_quant))

    def _become_nf4(self, w4: NF4Weight) -> None:
        w4.dtype = self.weight.dtype
        module = NF4Linear.from_linear(self._original[0], w4.block_size, w4.absmax_scale is not None)
        module.restore_weight(w4)
        self._original, self.base_layer = (module,), module
        self.norms.drop()

    def delete_adapter(self, name: str) -> None:
        for table in (self.lora_A, self.lora_B, self.scaling, self.dropout):
            del table[name]
        self.drop_magnitude(name)
        if self.taken is not None and self.taken.owner == name:
            self.taken.owner = None
            self._put_back()

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [self.lora_A[name], self.lora_B[name], *self.magnitudes(name).values()]

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {"lora_A.weight": self.lora_A[name], "lora_B.weight": self.lora_B[name], **self.magnitudes(name)}

    def file_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Of an adapter that started in W a LoRA of rank 2r on W itself. ValueError for a base in 4 bits."""
        found = self.adapter_tensors(name)
        if self.taken is None or self.taken.owner != name:
            return found
        if isinstance(self.base_layer, NF4Linear):
            raise ValueError(
                f"{name} took its start out of weights that were then quantised: what they lost is of full rank, so no LoRA "
                "file on the original weights computes the same. Save model.state_dict(), or merge the adapter"
            )
        A, B = self.difference(name)
        return {**found, "lora_A.weight": A, "lora_B.weight": B}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is not None:
            return self._forward_rows(x)
        names = self.running()
        if self.have_dora(names):
            return self._forward_dora(x, names)
        branches = self._branches(names)
        if not branches:
            return self.base_layer.forward(x)
        first, *others = branches
        y = self.base_layer.forward_low_rank(x, *first[:3], dropout=first[3])
        return self._add(y, x, others)

    def _forward_rows(self, x: torch.Tensor) -> torch.Tensor:
        y = forward_rows(self, x, lambda names: [] if self.have_dora(names) else self._branches(names), self._add)
        for names, rows in self.rows_of(x.shape[0], x.device).items() if self.with_dora else ():
            if self.have_dora(names):
                y = y.index_copy(0, rows, self._forward_dora(x[rows], list(names)))
        return y

    def _forward_dora(self, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        dora.check_unmerged(self)
        dropout = {name: self._dropout(name) for name in names}
        if len(names) == 1 and not dropout[names[0]] and len(branches := self._branches(names)) == 1:
            h = self.base_layer.forward_low_rank(x, *branches[0][:3], with_bias=False)
            return dora.rescaled(dora.scale(self, names[0]), h, self.bias)
        y = self._add(self.base_layer.forward(x), x, self._branches(()))
        for name in names:
            if self.have_dora([name]):
                y = y + self._dora_addition(name, x, dropout[name])
            else:
                y = self._add(y, x, [(*self.difference(name), self.scaling[name], dropout[name])])
        return y

    def _dora_addition(self, name: str, x: torch.Tensor, dropout: float) -> torch.Tensor:
        """(g - 1) W D(x) + g s B A D(x): what DoRA adds to W x, with dropout as HF peft applies it."""
        x = philox_dropout(x, dropout, draw_seed()) if dropout else x
        p = self.product(x)
        h = add_low_rank(p, x, *self.difference(name), self.scaling[name], None, 0.0, None)
        return (dora.scale(self, name) * h - p).to(p.dtype)

    def _branches(self, names: Any) -> list[tuple[torch.Tensor, torch.Tensor, float, float]]:
        """(A, B, scale, dropout) of what is added to the base layer's output where ``names`` run."""
        found = [(*self.own(*self.factors(name)), self.scaling[name], self._dropout(name)) for name in names]
        if self._holds_rest() and self.taken.owner not in names:
            found.append((self.taken_A, self.taken_B, self.taken.scaling, 0.0))
        return found

    @staticmethod
    def _add(y: torch.Tensor, x: torch.Tensor, branches: list) -> torch.Tensor:
        for A, B, scale, dropout in branches:
            y = add_low_rank(y, x, A, B, scale, None, dropout, None)
        return y

    def _dropout(self, name: str) -> float:
        return self.dropout[name] if self.training else 0.0

    def _holds_rest(self) -> bool:
        """Whether the base layer lacks what a start took; merging puts it back."""
        return self.taken is not None and not self.merged

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, k) and B (n, r) of what ``name`` adds to the weight that the base layer stores now."""
        if self.taken is not None and self.taken.owner == name and self.merged:
            return self.difference(name)
        return self.lora_A[name], self.lora_B[name]

    def difference(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of what ``name`` adds to W: of one that started in W, [A; A0] (2r, k) and [B, -B0] (n, 2r)."""
        A, B = self.lora_A[name], self.lora_B[name]
        if self.taken is None or self.taken.owner != name:
            return A, B
        return torch.cat([A, self.taken_A.to(A.dtype)]), torch.cat([B, -self.taken_B.to(B.dtype)], dim=1)

    def _matrix_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.difference(name)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T without the bias, (..., k) -> (..., n)."""
        return self._add(self.base_layer.product(x), x, self._branches(()))

    def matrix_product(self, A: torch.Tensor) -> torch.Tensor:
        dtype = self.weight.dtype
        return self.product(A.to(dtype) if dtype.is_floating_point else A).T

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        if self.have_dora([name]):
            return dora.delta_matrix(self, name)
        return self.product_matrix(name)

    def magnitude_shape(self) -> tuple[int, ...]:
        return (self.out_features,)

    def weight_tensors(self) -> list[torch.Tensor]:
        return [*super().weight_tensors(), *([self.taken_A, self.taken_B] if self._holds_rest() else [])]

    @torch.no_grad()
    def read_weight(self) -> torch.Tensor:
        w = self.base_layer.dense_weight()
        if not self._holds_rest():
            return w
        wide = self.factor_dtype()
        return torch.addmm(w.to(wide), self.taken_B.to(wide), self.taken_A.to(wide), alpha=self.taken.scaling)

    def unmerge(self) -> None:
        super().unmerge()
        if self.taken is not None and self.taken.owner is None:
            self._put_back()

    def leave(self) -> None:
        self._put_back()

    def _put_back(self) -> None:
        """Store W again, rounded once to the layer's dtype; in 4 bits it is quantised again."""
        if self._holds_rest():
            self.write_weight(self.read_weight())
            self.taken = None
            del self.taken_A, self.taken_B
            self.norms.drop()
