"""A linear layer whose weight is stored in 4 bits (Dettmers et al. 2023, QLoRA, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peftk.format.nf4 import NF4Weight
from peftk.nn.dense_linear import is_conv1d
from peftk.ops import nf4_linear, nf4_lora_linear, quantize_nf4

_CONSTANTS = ("absmax", "absmax_scale", "absmax_offset")


class NF4Linear(nn.Linear):
    """y = x W^T + bias with W (out_features, in_features) in 4 bits; x fp32|bf16|fp16, y in x.dtype.

    ``weight`` is a uint8 Parameter of shape (n, k/2), or (ceil(n*k/2), 1) where k is odd, so that dim 0 shards by rows. The
    stored bytes, constants included, stay as they are under .half(), .to(dtype), .eval() and .train(). ``compute_dtype``: x is
    cast to it, and y back; None computes in x.dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.block_size, self.double_quant, self.compute_dtype = block_size, double_quant, compute_dtype
        self._store(self._quantised(self.weight.detach(), "weight"))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> NF4Linear:
        """Quantise an nn.Linear or a transformers Conv1D; the bias Parameter is shared. ValueError names ``name`` and the first
        bad index where the weight isn't finite."""
        weight = linear.weight.detach()
        if is_conv1d(linear):
            weight = weight.T
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = weight.shape
        layer.block_size, layer.double_quant, layer.compute_dtype = block_size, double_quant, compute_dtype
        layer.register_parameter("bias", linear.bias)
        layer._store(layer._quantised(weight, name or "weight"))
        return layer.train(linear.training)

    def _quantised(self, weight: torch.Tensor, name: str) -> NF4Weight:
        return quantize_nf4(weight, self.block_size, self.double_quant, name=name)

    def _store(self, w4: NF4Weight, in_place: bool = False) -> None:
        """Take over a quantised weight; ``in_place`` keeps the Parameter object and writes the bytes into it."""
        n, k = self.out_features, self.in_features
        packed = w4.packed.reshape((n, k // 2) if k % 2 == 0 else (-1, 1))
        if in_place and self.weight.shape == packed.shape and not self.weight.is_meta:
            self.weight.data.copy_(packed)
        else:
            self.weight = nn.Parameter(packed, requires_grad=False)
        for name in _CONSTANTS:
            self.register_buffer(name, getattr(w4, name), persistent=False)
        self.block_size, self.double_quant = w4.block_size, w4.absmax_scale is not None
        self.quant_type, self.weight_dtype = w4.quant_type, w4.dtype

    @property
    def w4(self) -> NF4Weight:
        """The stored weight; its tensors are the layer's own."""
        return NF4Weight(
            self.weight.detach(),
            self.absmax,
            self.absmax_scale,
            self.absmax_offset,
            torch.Size((self.out_features, self.in_features)),
            self.weight_dtype,
            self.block_size,
            self.quant_type,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nf4_linear(x if self.compute_dtype is None else x.to(self.compute_dtype), self.w4, self.bias)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def forward_low_rank(
        self,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        scale: float,
        z: torch.Tensor | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
    ) -> torch.Tensor:
        """forward(x) + scale * D(x if z is None else z) A^T B^T in one op: ``peftk.ops.nf4_lora_linear``."""
        if self.compute_dtype is None:
            return nf4_lora_linear(x, self.w4, A, B, scale, self.bias, z, dropout, seed)
        z = z if z is None else z.to(self.compute_dtype)
        y = nf4_lora_linear(x.to(self.compute_dtype), self.w4, A, B, scale, self.bias, z, dropout, seed)
        return y.to(x.dtype)

    def dense_weight(self) -> torch.Tensor:
        """W (n, k), decoded to fp32."""
        return self.w4.dequantize(torch.float32)

    def set_dense_weight(self, w: torch.Tensor) -> None:
        """Quantise w (n, k) in place of the stored weight, with the layer's block size. ValueError for another shape or values
        that aren't finite; the layer is then as before."""
        if tuple(w.shape) != (self.out_features, self.in_features):
            raise ValueError(f"w: expected {(self.out_features, self.in_features)}, got {tuple(w.shape)}")
        w4 = quantize_nf4(w.to(self.weight.device), self.block_size, self.double_quant, name="w", quant_type=self.quant_type)
        w4.dtype = self.weight_dtype
        self._store(w4, in_place=True)

    def weight_snapshot(self) -> NF4Weight:
        """The stored bytes, a copy."""
        w4 = self.w4
        constants = [None if t is None else t.clone() for t in w4.tensors()]
        return NF4Weight(*constants, w4.shape, w4.dtype, w4.block_size, w4.quant_type)

    def restore_weight(self, snapshot: NF4Weight) -> None:
        """Put a snapshot back, bit for bit."""
        self._store(snapshot.to(self.weight.device), in_place=True)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NF4Linear:
        before = {name: getattr(self, name) for name in _CONSTANTS}
        super()._apply(fn, recurse)
        for name, stored in before.items():
            moved = getattr(self, name)
            if stored is not None and moved.dtype != stored.dtype:  # a cast: stored constants keep their bytes
                setattr(self, name, stored.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update(self.w4.state_dict(prefix))
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Takes bitsandbytes' keys as they are, and a plain float weight by quantising it."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        weight = f"{prefix}weight"
        quantised = any(key.startswith(f"{weight}.") for key in state_dict)
        try:
            if weight not in state_dict:
                missing_keys.append(weight)
            elif quantised or not state_dict[weight].dtype.is_floating_point:
                self._load_w4(NF4Weight.from_state_dict(state_dict, prefix), assign, weight)
            else:
                self._load_dense(state_dict[weight], assign, weight)
            self._load_bias(state_dict, f"{prefix}bias", assign, missing_keys)
        except (ValueError, TypeError) as error:
            error_msgs.append(str(error))
        known = {f"{prefix}bias"} if self.bias is not None else set()
        if strict:
            ours = (k for k in state_dict if k.startswith(prefix) and k != weight and not k.startswith(f"{weight}."))
            unexpected_keys.extend(k for k in ours if k not in known)

    def _load_w4(self, w4: NF4Weight, assign: bool, key: str) -> None:
        if tuple(w4.shape) != (self.out_features, self.in_features):
            raise ValueError(f"{key}: expected shape {(self.out_features, self.in_features)}, got {tuple(w4.shape)}")
        assign = assign or self.weight.is_meta
        if not assign:
            copies = [None if t is None else t.to(self.weight.device, copy=True) for t in w4.tensors()]
            w4 = NF4Weight(*copies, w4.shape, w4.dtype, w4.block_size, w4.quant_type)
        self._store(w4, in_place=not assign)

    def _load_dense(self, w: torch.Tensor, assign: bool, key: str) -> None:
        if tuple(w.shape) != (self.out_features, self.in_features):
            raise ValueError(f"{key}: expected shape {(self.out_features, self.in_features)}, got {tuple(w.shape)}")
        assign = assign or self.weight.is_meta
        self._store(self._quantised(w if assign else w.to(self.weight.device), key), in_place=not assign)

    def _load_bias(self, state_dict: dict[str, torch.Tensor], key: str, assign: bool, missing_keys: list[str]) -> None:
        if self.bias is None:
            return
        if key not in state_dict:
            missing_keys.append(key)
            return
        bias = state_dict[key]
        if bias.shape != self.bias.shape:
            raise ValueError(f"{key}: expected shape {tuple(self.bias.shape)}, got {tuple(bias.shape)}")
        if assign or self.bias.is_meta:
            self.bias = nn.Parameter(bias.detach(), requires_grad=self.bias.requires_grad)
        else:
            self.bias.data.copy_(bias)

    def extra_repr(self) -> str:
        nested = ", double_quant" if self.double_quant else ""
        return f"{super().extra_repr()}, {self.quant_type}, block_size={self.block_size}{nested}"
