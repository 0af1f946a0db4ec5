"""A weight in 4 bits, and its form in a bitsandbytes checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch

from peftk.format.checkpoint4 import read_entries, write_entries


@dataclass(eq=False)  # tensors have no one truth value: two weights are equal where their state dicts are
class NF4Weight:
    """4-bit codes and the constants of their blocks; made by ``peftk.quantize_nf4``.

    One layout, bitsandbytes' flat one: blocks run over the row-major elements, element 2i in the high nibble of byte i.
    """

    packed: torch.Tensor  # ceil(numel / 2) bytes, uint8
    absmax: torch.Tensor  # (blocks,) fp32, or uint8 codes where double quantised
    absmax_scale: torch.Tensor | None  # (ceil(blocks / 256),) fp32, double quantised only
    absmax_offset: torch.Tensor | None  # () fp32, the mean of the absmax, double quantised only
    shape: torch.Size
    dtype: torch.dtype  # of the weight that was quantised; what dequantize() returns
    block_size: int = 64  # elements
    quant_type: str = "nf4"  # or "fp4"

    def __post_init__(self) -> None:
        self.shape = torch.Size(self.shape)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__("_straight_code", None)  # ops note here that they have checked the parts against each other
        super().__setattr__(name, value)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of all constants."""
        return sum(t.numel() * t.element_size() for t in self.tensors() if t is not None)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """packed, absmax, absmax_scale, absmax_offset: what ops take."""
        return self.packed, self.absmax, self.absmax_scale, self.absmax_offset

    def dequantize(self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """W, ``shape``, in ``dtype`` (as recorded if None), or written to ``out`` in out's dtype. TypeError or ValueError
        names the argument that doesn't fit."""
        arguments = (*self.tensors(), self.shape, self.block_size, self.quant_type)
        wanted = (dtype or self.dtype) if out is None else out.dtype
        if not wanted.is_floating_point:
            raise TypeError(f"{'dtype' if out is None else 'out'}: expected a floating-point dtype, got {wanted}")
        if out is None:
            return torch.ops.peftk.nf4_dequantize(*arguments, wanted)
        if dtype is not None and dtype != out.dtype:
            raise ValueError(f"dtype: expected out's {out.dtype} or none, got {dtype}")
        if out.shape != self.shape or not out.is_contiguous() or out.device != self.device:
            raise ValueError(
                f"out: expected a contiguous tensor of shape {tuple(self.shape)} on {self.device}, got "
                f"{tuple(out.shape)} with strides {out.stride()} on {out.device}"
            )
        torch.ops.peftk.nf4_dequantize_(*arguments, out)
        return out

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same bytes on another device. Stored bytes have no other dtype: a dtype is a TypeError."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"device: expected a device, got {device}; dequantize(dtype) makes floats of a quantised weight")
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in moved.items()})

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """bitsandbytes' keys ``<prefix>weight``, ``<prefix>weight.absmax``, … byte for byte as its Linear4bit writes them.

        Codes and constants are the weight's own tensors; the tables are copies, since safetensors refuses shared memory."""
        return write_entries(self, prefix)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> NF4Weight:
        """Read bitsandbytes' keys under ``prefix``. Every field is held against the others before use; a ValueError names the
        key that doesn't fit. The stored bytes are used as they are, without a copy."""
        return cls(**read_entries(state_dict, prefix))
