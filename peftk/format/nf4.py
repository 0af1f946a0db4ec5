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
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_LARGEST_SIZE = 2**63 - 1  # of a tensor, in elements


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
            f"{weight}.quant_map": values4(self.quant_type, self.device).clone(),
        }
        if self.absmax_scale is not None:
            entries[f"{weight}.nested_absmax"] = self.absmax_scale
            entries[f"{weight}.nested_quant_map"] = values8(True, self.device).clone()
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
        _check_tensors({weight: state_dict[weight], **{f"{weight}.{part}": tensor for part, tensor in parts.items()}}, weight)
        facts = _read_facts(parts[states[0]], f"{weight}.{states[0]}", states[0].rpartition("__")[2])
        nested = "nested_offset" in facts
        _check_keys(set(parts), nested, states[0], weight)
        _check_table(parts["quant_map"], values4(facts["quant_type"], torch.device("cpu")), f"{weight}.quant_map")
        packed = _as_bytes(state_dict[weight], weight)
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
            parts["absmax"].contiguous(),
            scale if scale is None else scale.contiguous(),
            offset,
            torch.Size(facts["shape"]),
            _DTYPES[facts["dtype"]],
            facts["blocksize"],
            facts["quant_type"],
        )


def _read_facts(text: torch.Tensor, key: str, quant_type: str) -> dict[str, Any]:
    """The JSON of ``quant_state``, each field checked."""
    if text.dtype != torch.uint8 or text.dim() != 1 or text.is_meta:
        raise ValueError(f"{key}: expected JSON as a row of uint8, got {text.dtype} {tuple(text.shape)} on {text.device}")
    try:
        facts = json.loads(bytes(text.tolist()).decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key}: expected the bytes of a JSON object, got {error}") from error
    if not isinstance(facts, dict) or set(facts) not in (_JSON_KEYS, _JSON_KEYS | _NESTED_KEYS):
        got = sorted(facts) if isinstance(facts, dict) else type(facts).__name__
        raise ValueError(f"{key}: expected the fields {sorted(_JSON_KEYS)} and perhaps {sorted(_NESTED_KEYS)}, got {got}")
    checks = {
        "quant_type": (facts["quant_type"] == quant_type and quant_type in CODES4, quant_type),
        "blocksize": (_is_number(facts["blocksize"], int) and facts["blocksize"] in BLOCK_SIZES, BLOCK_SIZES),
        "dtype": (isinstance(facts["dtype"], str) and facts["dtype"] in _DTYPES, sorted(_DTYPES)),
        "shape": (_is_shape(facts["shape"]), "a list of sizes"),
    }
    if "nested_offset" in facts:
        offset, block = facts["nested_offset"], facts["nested_blocksize"]
        in_range = _is_number(offset, int | float) and abs(offset) <= torch.finfo(torch.float32).max
        checks["nested_blocksize"] = (_is_number(block, int) and block == NESTED_BLOCK, NESTED_BLOCK)
        checks["nested_dtype"] = (facts["nested_dtype"] == "float32", "float32")
        checks["nested_offset"] = (in_range, "a finite fp32 number")
    for field, (fits, expected) in checks.items():
        if not fits:
            raise ValueError(f"{key}: field {field}: expected {expected}, got {facts[field]!r}")
    return facts


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError(f"a field twice in {[name for name, _ in pairs]}")
    return dict(pairs)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_shape(value: Any) -> bool:
    """Whether JSON's value is a shape that a tensor can have; a size of 0 doesn't make the others boundless."""
    sizes = isinstance(value, list) and all(_is_number(size, int) and size >= 0 for size in value)
    return sizes and math.prod(max(size, 1) for size in value) <= _LARGEST_SIZE


def _check_tensors(entries: dict[str, Any], weight: str) -> None:
    """Plain tensors only, and every constant that is used beside the codes on the codes' device."""
    for key, tensor in entries.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{key}: expected a dense tensor, got {getattr(tensor, 'layout', type(tensor).__name__)}")
    device = entries[weight].device
    for key in (f"{weight}.absmax", f"{weight}.nested_absmax"):
        if key in entries and entries[key].device != device:
            raise ValueError(f"{key}: expected it on {device} as {weight}, got {entries[key].device}")


def _as_bytes(packed: torch.Tensor, key: str) -> torch.Tensor:
    """The codes as a row of uint8. Files with bitsandbytes' ``quant_storage`` hold the same bytes under another dtype."""
    if packed.dtype == torch.bool or packed.is_complex() or packed.is_quantized:
        raise ValueError(f"{key}: expected packed codes, uint8 or as floats, got {packed.dtype}")
    return packed.detach().reshape(-1).contiguous().view(torch.uint8)


def _check_keys(parts: set[str], nested: bool, state: str, weight: str) -> None:
    expected = {"absmax", "quant_map", state} | ({"nested_absmax", "nested_quant_map"} if nested else set())
    if parts != expected:
        missing, unexpected = sorted(expected - parts), sorted(parts - expected)
        raise ValueError(f"{weight}: missing parts {missing}, unexpected parts {unexpected}")


def _check_table(table: torch.Tensor, ours: torch.Tensor, key: str) -> None:
    """A file's own table is used only where it is ours: kernels hold one table a code."""
    if table.shape != ours.shape or table.dtype != ours.dtype:
        raise ValueError(f"{key}: expected {ours.numel()} values of {ours.dtype}, got {tuple(table.shape)} of {table.dtype}")
    if not table.is_meta and not torch.equal(table.detach().cpu(), ours):
        raise ValueError(f"{key}: expected the {ours.numel()} values of the code that the file names, got other ones")


def _check_size(tensor: torch.Tensor, dtype: torch.dtype, count: int, key: str) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != (count,):
        raise ValueError(f"{key}: expected {count} values of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}")
