"""A linear layer whose weight is stored in 4 bits (Dettmers et al. 2023, QLoRA, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from peftk.format.nf4 import NF4Weight
from peftk.nn import sharded_state
from peftk.nn.dense_linear import add_low_rank, add_low_rank_rows, is_conv1d
from peftk.nn.int8_activations import wants_int8
from peftk.ops import nf4_linear, nf4_linear_int8, nf4_lora_linear, nf4_lora_linear_rows, quantize_nf4
from peftk.ops.nf4_lora_linear_rows import has_kernel
from peftk.shards import check_whole, factor, part, whole

BEFORE = "change weights before they are split"
_CONSTANTS = ("absmax", "absmax_scale", "absmax_offset")


def check_compute_dtype(dtype: torch.dtype | None) -> None:
    """TypeError for what is neither None nor a floating-point dtype."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"compute_dtype: expected a floating-point dtype or None, got {dtype!r}")


class NF4Linear(nn.Linear):
    """y = x W^T + bias with W (out_features, in_features) in 4 bits; x fp32|bf16|fp16, y in x.dtype.

    ``weight`` is a uint8 Parameter of shape (n, k/2), or (ceil(n*k/2), 1) where k is odd, so that dim 0 shards by rows. The
    stored bytes, constants included, stay as they are under .half(), .to(dtype), .eval() and .train(). ``compute_dtype``: x is
    cast to it, and y back; None computes in x.dtype.

    ``int8_activations``, an attribute that may be set at any time and that no state_dict holds: x is rounded to 8 bits
    (``peftk.ops.nf4_linear_int8``) in eval mode where no gradient is wanted; training, and every call where x, the bias or
    adapter factors want one, takes the exact path.
    """

    int8_activations: bool = False
    is_tensor_parallel: bool = False  # each process computes with its own rows or columns (nn/tensor_parallel.py)

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
        int8_activations: bool = False,
    ):
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 0:
                raise ValueError(f"{name}: expected 0 or more, got {size}")
        check_compute_dtype(compute_dtype)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.quant_type, self.int8_activations = "nf4", int8_activations
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
        int8_activations: bool = False,
    ) -> NF4Linear:
        """Quantise an nn.Linear or a transformers Conv1D; the bias Parameter is shared. ValueError names ``name`` and the first
        bad index where the weight isn't finite; TypeError names another class."""
        if not is_conv1d(linear) and (not isinstance(linear, nn.Linear) or isinstance(linear, NF4Linear)):
            raise TypeError(f"linear: expected nn.Linear or Conv1D with a dense weight, got {type(linear).__name__}")
        check_whole(linear, "linear", BEFORE)
        check_compute_dtype(compute_dtype)
        weight = linear.weight.detach()
        if is_conv1d(linear):
            weight = weight.T
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = weight.shape
        layer.quant_type, layer.int8_activations = "nf4", int8_activations
        layer.block_size, layer.double_quant, layer.compute_dtype = block_size, double_quant, compute_dtype
        layer._store(layer._quantised(weight, name or "weight"))
        layer.register_parameter("bias", linear.bias)
        return layer.train(linear.training)

    def _quantised(self, weight: torch.Tensor, name: str) -> NF4Weight:
        return quantize_nf4(weight, self.block_size, self.double_quant, name=name, quant_type=self.quant_type)

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, as nn.Linear does, and quantise the weight in place."""
        if self.weight.is_floating_point():  # nn.Linear's constructor calls this before there are codes
            return super().reset_parameters()
        facts = {"device": self.weight.device, "dtype": self.weight_dtype}
        drawn = nn.Linear(self.in_features, self.out_features, self.bias is not None, **facts)
        self.set_dense_weight(drawn.weight.detach())
        if self.bias is not None:
            self.bias.data.copy_(drawn.bias.detach())

    def _store(self, w4: NF4Weight, in_place: bool = False) -> None:
        """Take over a quantised weight; ``in_place`` keeps the Parameter object and writes the bytes into it."""
        n, k = self.out_features, self.in_features
        held = self._parameters.pop("absmax", None) is not None
        packed = w4.packed.reshape((n, k // 2) if k % 2 == 0 else (-1, 1))
        if in_place and self.weight.shape == packed.shape and not self.weight.is_meta:
            self.weight.data.copy_(packed)
        else:
            self.weight = nn.Parameter(packed, requires_grad=False)
        for name in _CONSTANTS:
            self.register_buffer(name, getattr(w4, name), persistent=False)
        self.block_size, self.double_quant = w4.block_size, w4.absmax_scale is not None
        self.quant_type, self.weight_dtype = w4.quant_type, w4.dtype
        self.__dict__.pop("_kept_w4", None)
        if held:
            self.hold_absmax_as_parameter()

    def hold_absmax_as_parameter(self) -> None:
        """``absmax`` becomes a uint8 Parameter, (blocks,) codes or (blocks, 4) bytes of fp32: what shards parameters shards it
        too, and no policy casts it. ``peftk.nn.constants_as_parameters`` does this to a model."""
        if "absmax" not in self._parameters:
            absmax = self._buffers.pop("absmax")
            stored = absmax if self.double_quant else absmax.view(-1, 1).view(torch.uint8)
            self.register_parameter("absmax", nn.Parameter(stored, requires_grad=False))
            self.__dict__.pop("_kept_w4", None)

    @property
    def w4(self) -> NF4Weight:
        """The stored weight; its tensors are the layer's own. Of a layer that is split among processes all of it, gathered: every
        process must ask for it."""
        return self._weight_of(whole, (self.out_features, self.in_features))

    def _own_part(self) -> NF4Weight:
        """This process's rows or columns; all of a layer that isn't split."""
        rows, columns = part(self.weight).shape if self.is_tensor_parallel else (self.out_features, self.in_features // 2)
        return self._weight_of(part, (rows, 2 * columns) if self.is_tensor_parallel else (rows, self.in_features))

    def _weight_of(self, take: Callable[[Any], Any], shape: tuple[int, int]) -> NF4Weight:
        absmax = take(self.absmax.detach())
        if absmax.dim() == 2:
            absmax = (absmax if self.double_quant else absmax.view(torch.float32)).view(-1)
        constants = (absmax, take(self.absmax_scale), take(self.absmax_offset))
        packed, facts = take(self.weight.detach()), (self.weight_dtype, self.block_size, self.quant_type)
        return NF4Weight(packed, *constants, torch.Size(shape), *facts)

    @property
    def stored_bytes(self) -> int:
        """Of the codes and constants of the whole layer."""
        return sum(t.numel() * t.element_size() for t in (self.weight, *self.constants()))

    @property
    def quant_facts(self) -> torch.Tensor:
        """What the state dict of a split layer says of it beside its tensors, uint8."""
        return sharded_state.quant_facts(self)

    def constants(self) -> list[torch.Tensor]:
        """The blocks' constants as the layer holds them: absmax and, double quantised, its scale and offset."""
        return [constant for name in _CONSTANTS if (constant := getattr(self, name)) is not None]

    def _own_w4(self) -> NF4Weight:
        """``w4`` around the Parameter itself, kept from call to call: making it anew costs as much as a small product."""
        if torch.compiler.is_compiling() or self.is_tensor_parallel or "absmax" in self._parameters:
            return self._own_part()
        kept = self.__dict__.get("_kept_w4")
        weight, constants = self._parameters["weight"], self._buffers
        if (
            kept is None
            or kept.packed is not weight
            or kept.absmax is not constants["absmax"]
            or kept.absmax_scale is not constants["absmax_scale"]
            or kept.absmax_offset is not constants["absmax_offset"]
        ):
            parts, shape = (constants[name] for name in _CONSTANTS), torch.Size((self.out_features, self.in_features))
            kept = NF4Weight(weight, *parts, shape, self.weight_dtype, self.block_size, self.quant_type)
            self.__dict__["_kept_w4"] = kept
        return kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self._own_bias()
        product = nf4_linear if self.training or not wants_int8(self, x, bias) else nf4_linear_int8
        if self.compute_dtype is None:
            return product(x, self._own_w4(), bias)
        return product(x.to(self.compute_dtype), self._own_w4(), bias).to(x.dtype)

    def forward_low_rank(
        self,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        scale: float,
        z: torch.Tensor | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
        with_bias: bool = True,
    ) -> torch.Tensor:
        """forward(x) + scale * D(x if z is None else z) A^T B^T in one op: ``peftk.ops.nf4_lora_linear``. With 8-bit
        activations the low-rank branch is computed apart, from x as it is."""
        h, z = self._in_compute_dtype(x), z if z is None else self._in_compute_dtype(z)
        bias = self._own_bias() if with_bias else None
        if wants_int8(self, x, A, B, z, bias):
            y = add_low_rank(nf4_linear_int8(h, self._own_w4(), bias), h, A, B, scale, z, dropout, seed)
        else:
            y = nf4_lora_linear(h, self._own_w4(), A, B, scale, bias, z, dropout, seed)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def forward_low_rank_rows(
        self,
        x: torch.Tensor,
        A: Sequence[torch.Tensor],
        B: Sequence[torch.Tensor],
        scale: Sequence[float],
        index: Sequence[int],
        z: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """forward(x), and for row i of the batch the branch of adapter index[i], -1 for none, in one op:
        ``peftk.ops.nf4_lora_linear_rows``. By parts with 8-bit activations, and where the op has no kernel."""
        h, z = self._in_compute_dtype(x), z if z is None else self._in_compute_dtype(z)
        bias = self._own_bias()
        if wants_int8(self, x, *A, *B, z, bias):
            y = add_low_rank_rows(nf4_linear_int8(h, self._own_w4(), bias), h, A, B, scale, index, z)
        elif has_kernel(h):
            y = nf4_lora_linear_rows(h, self._own_w4(), A, B, scale, index, bias, z)
        else:
            y = add_low_rank_rows(nf4_linear(h, self._own_w4(), bias), h, A, B, scale, index, z)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T, (..., k) -> (..., n), without the bias and never with 8-bit activations."""
        return nf4_linear(self._in_compute_dtype(x), self._own_w4()).to(x.dtype)

    def _own_bias(self) -> torch.Tensor | None:
        parameters = self._parameters  # past nn.Module's search for attributes, where the bias has no parametrization
        bias = parameters["bias"] if "bias" in parameters else self.bias
        return factor(bias) if self.is_tensor_parallel and bias is not None else bias

    def _in_compute_dtype(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def dense_weight(self) -> torch.Tensor:
        """W (n, k), decoded to fp32."""
        return self.w4.dequantize(torch.float32)

    def set_dense_weight(self, w: torch.Tensor) -> None:
        """Quantise w (n, k) in place of the stored weight, with the layer's block size. ValueError for another shape or values
        that aren't finite; the layer is then as before."""
        if tuple(w.shape) != (self.out_features, self.in_features):
            raise ValueError(f"w: expected {(self.out_features, self.in_features)}, got {tuple(w.shape)}")
        check_whole(self, "layer", BEFORE)
        w4 = self._quantised(w.to(self.weight.device), "w")
        w4.dtype = self.weight_dtype
        self._store(w4, in_place=True)

    def rounded(self, w: torch.Tensor) -> torch.Tensor:
        """w (n, k) as ``set_dense_weight(w)`` would store it, decoded to fp32; nothing is stored."""
        return self._quantised(w, "w").dequantize(torch.float32)

    def weight_snapshot(self) -> NF4Weight:
        """The stored bytes, a copy."""
        w4 = self.w4
        constants = [None if t is None else t.clone() for t in w4.tensors()]
        return NF4Weight(*constants, w4.shape, w4.dtype, w4.block_size, w4.quant_type)

    def restore_weight(self, snapshot: NF4Weight) -> None:
        """Put a snapshot back, bit for bit. ValueError for one of another shape."""
        if tuple(snapshot.shape) != (self.out_features, self.in_features):
            raise ValueError(f"snapshot: expected {(self.out_features, self.in_features)}, got {tuple(snapshot.shape)}")
        check_whole(self, "layer", BEFORE)
        self._store(snapshot.to(self.weight.device), in_place=True)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> NF4Linear:
        stored = [self.weight, *self.constants()]

        def without_cast(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            is_stored = any(tensor is t for t in stored)
            return tensor.to(moved.device) if is_stored and moved.dtype != tensor.dtype else moved

        return super()._apply(without_cast, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if sharded_state.is_used(self):
            return sharded_state.save(self, destination, prefix, keep_vars)
        entries = self.w4.state_dict(prefix)
        destination[f"{prefix}weight"] = entries.pop(f"{prefix}weight")
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
        destination.update(entries)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Takes bitsandbytes' keys as they are, and a plain float weight by quantising it."""
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        assign = local_metadata.get("assign_to_params_buffers", False)
        if sharded_state.is_used(self) and f"{prefix}absmax" in state_dict:
            return sharded_state.load(self, state_dict, prefix, assign, strict, missing_keys, unexpected_keys, error_msgs)
        weight, bias = f"{prefix}weight", f"{prefix}bias"
        parts = {key for key in state_dict if key.startswith(f"{weight}.")}
        if weight not in state_dict:
            missing_keys.append(weight)
        else:
            try:
                self._store_loaded(self._loaded(state_dict, prefix, bool(parts)), assign)
            except (ValueError, TypeError, RuntimeError) as error:
                error_msgs.append(str(error))
        if self.bias is not None and bias not in state_dict:
            missing_keys.append(bias)
        elif self.bias is not None:
            self._load_bias(state_dict[bias], assign, bias, error_msgs)
        if strict:
            known = {weight, bias} if self.bias is not None else {weight}
            known |= parts if weight in state_dict else set()
            unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k not in known)

    def _loaded(self, state_dict: dict[str, torch.Tensor], prefix: str, has_parts: bool) -> NF4Weight:
        """The file's 4-bit weight, or its float weight in 4 bits. Nothing of the layer changes yet."""
        key, shape = f"{prefix}weight", (self.out_features, self.in_features)
        check_whole(
            self,
            "layer",
            "load whole weights before it is split, or what torch.distributed.checkpoint saved of split ones",
            prefix,
        )
        w = state_dict[key]
        if has_parts or not isinstance(w, torch.Tensor) or not w.dtype.is_floating_point:
            w = NF4Weight.from_state_dict(state_dict, prefix)
        if tuple(w.shape) != shape:
            raise ValueError(f"size mismatch for {key}: expected shape {shape}, got {tuple(w.shape)}")
        return w if isinstance(w, NF4Weight) else self._quantised(w, key)

    def _store_loaded(self, w4: NF4Weight, assign: bool) -> None:
        """``assign`` shares the file's tensors, on their device; else they are copied to the layer's (a meta layer has none)."""
        if not assign:
            device = w4.device if self.weight.is_meta else self.weight.device
            copies = [None if t is None else t.to(device, copy=True) for t in w4.tensors()]
            w4 = NF4Weight(*copies, w4.shape, w4.dtype, w4.block_size, w4.quant_type)
        self._store(w4, in_place=not assign)

    def _load_bias(self, bias: torch.Tensor, assign: bool, key: str, error_msgs: list[str]) -> None:
        if bias.shape != self.bias.shape:
            error_msgs.append(f"size mismatch for {key}: expected shape {tuple(self.bias.shape)}, got {tuple(bias.shape)}")
        elif assign or self.bias.is_meta:
            bias = bias.detach() if assign else bias.detach().clone()
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        else:
            self.bias.data.copy_(bias)

    def extra_repr(self) -> str:
        nested = ", double_quant" if self.double_quant else ""
        int8 = ", int8_activations" if self.int8_activations else ""
        return f"{super().extra_repr()}, {self.quant_type}, block_size={self.block_size}{nested}{int8}"
