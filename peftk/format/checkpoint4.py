"""The form of a 4-bit weight in a bitsandbytes checkpoint: written byte for byte, read with every field checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from peftk.format.code4 import BLOCK_SIZES, CODES4, values4
from peftk.format.dynamic8 import NESTED_BLOCK, values8

if TYPE_CHECKING:
    from peftk.format.nf4 import NF4Weight

_JSON_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_LARGEST_SIZE = 2**63 - 1  # of a tensor, in elements


def write_entries(w4: NF4Weight, prefix: str) -> dict[str, torch.Tensor]:
    """``NF4Weight.state_dict``."""
    facts: dict[str, Any] = {
        "quant_type": w4.quant_type,
        "blocksize": w4.block_size,
        "dtype": str(w4.dtype).removeprefix("torch."),
        "shape": list(w4.shape),
    }
    weight = f"{prefix}weight"
    entries = {
        weight: w4.packed.reshape(-1, 1),
        f"{weight}.absmax": w4.absmax,
        f"{weight}.quant_map": values4(w4.quant_type, w4.device).clone(),
    }
    if w4.absmax_scale is not None:
        entries[f"{weight}.nested_absmax"] = w4.absmax_scale
        entries[f"{weight}.nested_quant_map"] = values8(True, w4.device).clone()
        offset = 0.0 if w4.device.type == "meta" else w4.absmax_offset.item()
        facts |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8).clone()
    entries[f"{weight}.quant_state.bitsandbytes__{w4.quant_type}"] = text.to(w4.device)
    return entries


def read_entries(state_dict: Mapping[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    """The fields of an NF4Weight from the keys under ``prefix``; a ValueError names the key that doesn't fit."""
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
    return {
        "packed": packed,
        "absmax": parts["absmax"].contiguous(),
        "absmax_scale": scale if scale is None else scale.contiguous(),
        "absmax_offset": offset,
        "shape": torch.Size(facts["shape"]),
        "dtype": _DTYPES[facts["dtype"]],
        "block_size": facts["blocksize"],
        "quant_type": facts["quant_type"],
    }


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
        raise ValueError(f"expected each field once, got {[name for name, _ in pairs]}")
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
