"""A weight in 4 bits, and its form in a bitsandbytes checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from peftk.format.code4 import BLOCK_SIZES, CODES4, values4
from peftk.format.dynamic8 import NESTED_BLOCK, values8

_JSON_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
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
        """W, ``shape``, in ``dtype`` (as recorded if None), or written to ``out`` in out's dtype."""
        arguments = (*self.tensors(), self.shape, self.block_size, self.quant_type)
        if out is None:
            return torch.ops.peftk.nf4_dequantize(*arguments, dtype or self.dtype)
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
        """bitsandbytes' keys ``<prefix>weight``, ``<prefix>weight.absmax``, … byte for byte as its Linear4bit writes them."""
        facts: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        weight = f"{prefix}weight"
        entries = {
            weight: self.packed.reshape(-1, 1),
            f"{weight}.absmax": self.absmax,
            f"{weight}.quant_map": values4(self.quant_type, self.device),
        }
        if self.absmax_scale is not None:
            entries[f"{weight}.nested_absmax"] = self.absmax_scale
            entries[f"{weight}.nested_quant_map"] = values8(True, self.device)
            offset = 0.0 if self.device.type == "meta" else self.absmax_offset.item()
            facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8).clone()
        entries[f"{weight}.quant_state.bitsandbytes__{self.quant_type}"] = text.to(self.device)
        return entries

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, torch.Tensor], prefix: str = "") -> NF4Weight:
        """Read bitsandbytes' keys under ``prefix``. Every field is held against the others before use; a ValueError names the
        key that doesn't fit. The stored bytes are used as they are, without a copy."""
        weight = f"{prefix}weight"
        parts = {k[len(weight) + 1 :]: v for k, v in state_dict.items() if k.startswith(f"{weight}.")}
        states = [k for k in parts if k.startswith("quant_state.bitsandbytes__")]
        if weight not in state_dict or len(states) != 1:
            raise ValueError(
                f"{weight}: expected it beside exactly one {weight}.quant_state.bitsandbytes__<type>, got "
                f"{sorted(k for k in state_dict if k.startswith(weight))}"
            )
        facts = _read_facts(parts[states[0]], f"{weight}.{states[0]}", states[0].rpartition("__")[2])
        nested = "nested_offset" in facts
        _check_keys(set(parts), nested, states[0], weight)
        _check_table(parts["quant_map"], values4(facts["quant_type"], torch.device("cpu")), f"{weight}.quant_map")
        packed = state_dict[weight].reshape(-1)
        if packed.dtype != torch.uint8:  # bitsandbytes' quant_storage: the same bytes under another dtype
            packed = packed.view(torch.uint8)
        scale = offset = None
        if nested:
            _check_table(parts["nested_quant_map"], values8(True), f"{weight}.nested_quant_map")
            scale = parts["nested_absmax"]
            offset = torch.tensor(facts["nested_offset"], dtype=torch.float32, device=packed.device)
        count = math.prod(facts["shape"])
        blocks = -(-count // facts["blocksize"])
        _check_size(packed, torch.uint8, (count + 1) // 2, weight)
        _check_size(parts["absmax"], torch.uint8 if nested else torch.float32, blocks, f"{weight}.absmax")
        if scale is not None:
            _check_size(scale, torch.float32, -(-blocks // NESTED_BLOCK), f"{weight}.nested_absmax")
        return cls(
            packed,
            parts["absmax"],
            scale,
            offset,
            torch.Size(facts["shape"]),
            _DTYPES[facts["dtype"]],
            facts["blocksize"],
            facts["quant_type"],
        )


def _read_facts(text: torch.Tensor, key: str, quant_type: str) -> dict[str, Any]:
    """The JSON of ``quant_state``, each field checked."""
    try:
        facts = json.loads(bytes(text.tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}: expected the bytes of a JSON object, got {error}") from error
    if not isinstance(facts, dict) or set(facts) not in (_JSON_KEYS, _JSON_KEYS | _NESTED_KEYS):
        got = sorted(facts) if isinstance(facts, dict) else type(facts).__name__
        raise ValueError(f"{key}: expected the fields {sorted(_JSON_KEYS)} and perhaps {sorted(_NESTED_KEYS)}, got {got}")
    shape, is_count = facts["shape"], lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0
    checks = {
        "quant_type": (facts["quant_type"] == quant_type and quant_type in CODES4, quant_type),
        "blocksize": (is_count(facts["blocksize"]) and facts["blocksize"] in BLOCK_SIZES, BLOCK_SIZES),
        "dtype": (isinstance(facts["dtype"], str) and facts["dtype"] in _DTYPES, sorted(_DTYPES)),
        "shape": (isinstance(shape, list) and all(map(is_count, shape)), "a list of sizes"),
    }
    if "nested_offset" in facts:
        offset = facts["nested_offset"]
        checks["nested_blocksize"] = (facts["nested_blocksize"] == NESTED_BLOCK, NESTED_BLOCK)
        checks["nested_dtype"] = (facts["nested_dtype"] == "float32", "float32")
        checks["nested_offset"] = (isinstance(offset, int | float) and math.isfinite(offset), "a finite number")
    for field, (fits, expected) in checks.items():
        if not fits:
            raise ValueError(f"{key}: field {field}: expected {expected}, got {facts[field]!r}")
    return facts


def _check_keys(parts: set[str], nested: bool, state: str, weight: str) -> None:
    expected = {"absmax", "quant_map", state} | ({"nested_absmax", "nested_quant_map"} if nested else set())
    if parts != expected:
        missing, unexpected = sorted(expected - parts), sorted(parts - expected)
        raise ValueError(f"{weight}: missing parts {missing}, unexpected parts {unexpected}")


def _check_table(table: torch.Tensor, ours: torch.Tensor, key: str) -> None:
    """A file's own table is used only where it is ours: kernels hold one table a code."""
    if table.device.type == "meta":
        return
    if table.shape != ours.shape or not torch.equal(table.cpu().float(), ours):
        raise ValueError(f"{key}: expected the {ours.numel()} values of the code that the file names, got other ones")


def _check_size(tensor: torch.Tensor, dtype: torch.dtype, count: int, key: str) -> None:
    if tensor.dtype != dtype or tensor.numel() != count:
        raise ValueError(f"{key}: expected {count} values of {dtype}, got {tensor.numel()} of {tensor.dtype}")
