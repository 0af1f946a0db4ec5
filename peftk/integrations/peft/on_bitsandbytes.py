"""HF peft's layers around bitsandbytes' Linear4bit: its bytes are read in place; all but the forward pass is HF peft's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from peftk.format.nf4 import NF4Weight
from peftk.integrations.bitsandbytes.products import is_ours
from peftk.integrations.bitsandbytes.regime import dense_dtypes, is_dense
from peftk.integrations.bitsandbytes.weights import weight_of
from peftk.integrations.peft.fused import is_plain
from peftk.ops import nf4_lora_linear, nf4_lora_linear_rows
from peftk.ops.nf4_lora_linear_rows import has_kernel


class OnBitsandbytes:
    """The base layer's side of ``Fused``. Left to HF peft's own code: what is no product of ours (``is_ours``), one that a dense
    product outruns, and every call of a trace."""

    def _base_runs(self) -> bool:
        base = self.base_layer
        return is_plain(base, type(base)) and base.compute_type_is_set and not torch.compiler.is_compiling()

    def _run(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, dropout: float) -> torch.Tensor | None:
        if (parts := self._parts_of_base(x)) is None:
            return None
        h, w4, bias = parts
        return nf4_lora_linear(h, w4, A, B, scale, bias, dropout=dropout).to(x.dtype)

    def _run_rows(
        self, x: torch.Tensor, A: Sequence[torch.Tensor], B: Sequence[torch.Tensor], scale: Sequence[float], index: Sequence[int]
    ) -> torch.Tensor | None:
        if (parts := self._parts_of_base(x)) is None or not has_kernel(parts[0]):
            return None
        h, w4, bias = parts
        return nf4_lora_linear_rows(h, w4, A, B, scale, index, bias).to(x.dtype)

    def _parts_of_base(self, x: torch.Tensor) -> tuple[torch.Tensor, NF4Weight, torch.Tensor | None] | None:
        """x in the dtype of the computation, the weight and the bias, where a product of ours takes them."""
        base = self.base_layer
        packed, state = base.weight, base.weight.quant_state
        h = x if base.compute_dtype is None else x.to(base.compute_dtype)
        if not is_ours(h, packed, state) or is_dense(h, _dense_dtypes()):
            return None
        return h, weight_of(packed, state), None if base.bias is None else base.bias.to(h.dtype)


@cache
def _dense_dtypes() -> frozenset[torch.dtype]:
    return dense_dtypes()
