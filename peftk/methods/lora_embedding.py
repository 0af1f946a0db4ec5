"""LoRA on an embedding (Hu et al. 2021): low-rank branches looked up by token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from peftk.methods import dora
from peftk.methods.adapter import PlainLayer
from peftk.methods.dora import Decomposed

if TYPE_CHECKING:
    from peftk.methods.lora import LoraConfig


class LoraEmbedding(Decomposed, PlainLayer):
    """An embedding with low-rank branches: rows of A^T, then B. A (r, tokens) is zero at first and B (d, r) Gaussian.

    ids (...) -> (..., d). Dropout does not apply to token ids.
    """

    VARIANTS = frozenset({"use_dora"})

    def __init__(self, module: nn.Embedding):
        super().__init__(module, module)
        self.num_embeddings, self.embedding_dim, self.padding_idx = (
            module.num_embeddings,
            module.embedding_dim,
            module.padding_idx,
        )
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}

    def adapter_names(self) -> list[str]:
        return list(self.lora_embedding_A)

    def add_adapter(self, name: str, r: int, scaling: float, config: LoraConfig) -> None:
        """Fresh factors: A zero, or Gaussian where ``init_lora_weights`` is False; B Gaussian."""
        facts = {"device": self.weight.device, "dtype": self.factor_dtype()}
        make = torch.randn if config.init_lora_weights is False else torch.zeros
        self.lora_embedding_A[name] = nn.Parameter(make(r, self.num_embeddings, **facts))
        self.lora_embedding_B[name] = nn.Parameter(torch.randn(self.embedding_dim, r, **facts))
        self.scaling[name] = scaling
        if config.use_dora:
            self.add_magnitude(name)

    def matrix(self) -> torch.Tensor:
        """W^T (d, tokens): a magnitude a dimension."""
        return self.read_weight().T

    def delete_adapter(self, name: str) -> None:
        for table in (self.lora_embedding_A, self.lora_embedding_B, self.scaling):
            del table[name]
        self.drop_magnitude(name)

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return [self.lora_embedding_A[name], self.lora_embedding_B[name], *self.magnitudes(name).values()]

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        factors = {"lora_embedding_A": self.lora_embedding_A[name], "lora_embedding_B": self.lora_embedding_B[name]}
        return {**factors, **self.magnitudes(name)}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        base = y = self.base_layer.forward(ids)
        if self.rows is None:
            for name in self.running():
                y = y + self._addition(name, ids, base)
            return y
        for names, rows in self.rows_of(ids.shape[0], ids.device).items():
            for name in names:
                y = y.index_add(0, rows, self._addition(name, ids[rows], base[rows]))
        return y

    def _addition(self, name: str, ids: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the base layer's output: its branch, or with DoRA (g - 1) times it and g times the branch."""
        rows = functional.embedding(ids, self.lora_embedding_A[name].T, self.padding_idx)
        scale = getattr(self.base_layer, "embed_scale", 1.0)  # transformers' scaled embeddings multiply their rows by it
        added = self.scaling[name] * scale * functional.linear(rows, self.lora_embedding_B[name])
        if self.have_dora([name]):
            dora.check_unmerged(self)
            added = dora.scale(self, name) * (base + added) - base
        return added.to(base.dtype)

    @torch.no_grad()
    def delta_weight(self, name: str) -> torch.Tensor:
        """(tokens, d)"""
        if self.have_dora([name]):
            return dora.delta_matrix(self, name).T
        return self.product_matrix(name).T
