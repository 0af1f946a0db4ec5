"""HF peft's layers around an NF4Linear: adapters that start from the weight, merging, DoRA."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftk.format.nf4 import NF4Weight
from peftk.integrations.peft.decomposed import Decomposition, OwnForward, take_over
from peftk.integrations.peft.fused import is_plain
from peftk.methods.dora import rescaled, scale
from peftk.nn import NF4Linear

_DRAWN = (True, False, "gaussian", "eva")  # starts that need no weight
_TOO_LATE = {
    "loftq": "fits adapters to what quantisation loses",
    "corda": "is prepared from float weights",
    "lora_ga": "is prepared from gradients of the weights",
}


@dataclass
class Original:
    """A base layer as it was before a merge."""

    weight: NF4Weight
    bias: torch.Tensor | None


class OnNF4:
    """For any tuner of HF peft: its own code that makes, merges and unmerges adapters sees a dense base layer.

    Merged adapters are summed in fp32 onto the original weight, which is then quantised once; the original bytes are kept, and
    unmerging puts them back.
    """

    original: Original | None = None

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """A new adapter. One that starts from the weight leaves the rest of it, which is quantised once."""
        if not isinstance(self.base_layer, NF4Linear) or not self._starts_from_weight(args, kwargs):
            return super().update_layer(*args, **kwargs)
        with self._dense_base() as dense:
            super().update_layer(*args, **kwargs)
        if not torch.equal(dense.weight, self.base_layer.dense_weight()):
            self.base_layer.set_dense_weight(dense.weight)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """ValueError where the sum isn't finite, whatever ``safe_merge``; the layer is then as before."""
        base = self.base_layer
        if not isinstance(base, NF4Linear):  # HF peft's own code below, which merges and unmerges by the way
            return super().merge(safe_merge, adapter_names)
        from peft.tuners.tuners_utils import check_adapters_to_merge

        names, before = check_adapters_to_merge(self, adapter_names), list(self.merged_adapters)
        if not names:
            return
        original = self.original or Original(base.weight_snapshot(), None if base.bias is None else base.bias.detach().clone())
        try:
            with self._dense_base(original) as dense:
                self.merged_adapters = []
                super().merge(safe_merge, [*before, *names])
            if self.merged_adapters != before:
                self._store(dense)
                self.original = original
        except BaseException:
            self.merged_adapters = before
            raise

    def unmerge(self) -> None:
        """Exact: the bytes of before the merge."""
        if not isinstance(self.base_layer, NF4Linear) or not self.merged:
            return super().unmerge()
        self.base_layer.restore_weight(self.original.weight)
        if self.original.bias is not None:
            self.base_layer.bias.data.copy_(self.original.bias)
        self.original, self.merged_adapters = None, []

    def _starts_from_weight(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        return True

    @contextlib.contextmanager
    def _dense_base(self, original: Original | None = None) -> Iterator[nn.Linear]:
        """An nn.Linear with the decoded weight, fp32, stands in the base layer's place."""
        base = self.base_layer
        w = base.dense_weight() if original is None else original.weight.to(base.weight.device).dequantize(torch.float32)
        bias = base.bias if original is None else original.bias
        dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta").train(base.training)
        dense._parameters["weight"] = nn.Parameter(w, requires_grad=False)  # past HF peft's context that makes all on meta
        dense._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self._modules["base_layer"] = dense
        try:
            yield dense
        finally:
            self._modules["base_layer"] = base

    def _store(self, dense: nn.Linear) -> None:
        if not torch.isfinite(dense.weight).all():
            raise ValueError(f"adapter_names: expected finite merged weights, got NaN or Inf with {self.merged_adapters}")
        self.base_layer.set_dense_weight(dense.weight)
        if dense.bias is not None:
            self.base_layer.bias.data.copy_(dense.bias)

    # ---- the base layer's side of Fused ---------------------------------------------------------------------------------

    def _base_runs(self) -> bool:
        return is_plain(self.base_layer, NF4Linear)

    def _run(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, dropout: float) -> torch.Tensor:
        return self.base_layer.forward_low_rank(x, A, B, scale, dropout=dropout)

    def _run_rows(
        self, x: torch.Tensor, A: Sequence[torch.Tensor], B: Sequence[torch.Tensor], scale: Sequence[float], index: Sequence[int]
    ) -> torch.Tensor:
        return self.base_layer.forward_low_rank_rows(x, A, B, scale, index)


class AdaLoraOnNF4(OnNF4):
    """adalora.SVDLinear."""

    def _starts_from_weight(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        return False


class LoraOnNF4(OnNF4):
    """lora.Linear."""

    decomposition: Decomposition | None = None  # where an adapter has DoRA

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        super().update_layer(*args, **kwargs)
        if take_over(self.lora_variant):
            self.decomposition = self.decomposition or Decomposition(self)

    def _starts_from_weight(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """ValueError for a start that comes too late."""
        given = inspect.signature(self.STOCK.update_layer).bind(self, *args, **kwargs).arguments
        config = given.get("config")  # before 0.19 its fields
        start = given.get("init_lora_weights", True) if config is None else config.init_lora_weights
        if isinstance(start, str) and start.lower() in _TOO_LATE:
            raise ValueError(
                f"init_lora_weights: {start!r} {_TOO_LATE[start.lower()]}, and {kwargs.get('target_name') or 'this layer'} is in "
                "4 bits already: prepare it before quantising (peftk.attach has LoftQ), or use True, 'eva', 'pissa' or 'olora'. "
                "An adapter whose base was prepared so loads with init_lora_weights=True in its config"
            )
        has_dora = given.get("use_dora", False) if config is None else config.use_dora
        return start not in _DRAWN or has_dora or getattr(config, "kasa_config", None) is not None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        super().merge(safe_merge, adapter_names)
        self._forget_norms()

    def unmerge(self) -> None:
        super().unmerge()
        self._forget_norms()

    def _forget_norms(self) -> None:
        if self.decomposition is not None:
            self.decomposition.norms.drop()

    def _needs_variant(self, name: str) -> bool:
        return name in self.lora_variant and not isinstance(self.lora_variant[name], OwnForward)

    def _fused(self, x: torch.Tensor, name: str) -> torch.Tensor | None:
        if name not in self.lora_variant:
            return super()._fused(x, name)
        parts = self._parts(name)
        if parts is None or parts[-1]:
            return None
        h = self.base_layer.forward_low_rank(x, *parts[:3], with_bias=False)
        return rescaled(scale(self.decomposition, name), h, self.base_layer.bias)
