"""HF peft's layers around bitsandbytes' Linear4bit: its bytes are read in place; all but the forward pass is HF peft's own."""

from __future__ import annotations

from functools import cache

import torch

from peftk.integrations.bitsandbytes.products import is_ours
from peftk.integrations.bitsandbytes.regime import dense_dtypes, is_dense
from peftk.integrations.bitsandbytes.weights import weight_of
from peftk.integrations.peft.fused import is_plain
from peftk.ops import nf4_lora_linear


class OnBitsandbytes:
    """The base layer's side of ``Fused``. Left to HF peft's own code: what is no product of ours (``is_ours``), one that a dense
    product outruns, and every call of a trace."""

    def _base_runs(self) -> bool:
        base = self.base_layer
        return is_plain(base, type(base)) and base.compute_type_is_set and not torch.compiler.is_compiling()

    def _run(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, dropout: float) -> torch.Tensor | None:
        base = self.base_layer
        packed, state = base.weight, base.weight.quant_state
        h = x if base.compute_dtype is None else x.to(base.compute_dtype)
        if not is_ours(h, packed, state) or is_dense(h, _dense_dtypes()):
            return None
        bias = None if base.bias is None else base.bias.to(h.dtype)
        return nf4_lora_linear(h, weight_of(packed, state), A, B, scale, bias, dropout=dropout).to(x.dtype)


@cache
def _dense_dtypes() -> frozenset[torch.dtype]:
    return dense_dtypes()
