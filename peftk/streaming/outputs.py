"""What becomes of a weight in the new checkpoint: copied, cast, or in 4 bits; written in pieces, then held against W."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from peftk.format.dynamic8 import NESTED_BLOCK
from peftk.format.nf4 import NF4Weight
from peftk.ops.nf4_quantize import double_quantized, nf4_quantize, quantize_nf4, refuse_nonfinite
from peftk.streaming.safetensors_file import Entry, Writer
from peftk.streaming.source import Tensor
from peftk.streaming.values import Values, part_of, ranges

_COPIED = 4 << 20  # bytes
_DIGITS = 24  # bytes; the longest that a double takes in JSON


@dataclass(frozen=True)
class Error:
    """How far a stored weight Q lies from W, in Frobenius norms."""

    layer: str
    kind: str  # nf4, bfloat16, …
    shape: tuple[int, ...]
    relative: float  # |Q - W| / |W|; of a merge W is the exact sum
    largest: float  # the largest |Q - W| of an element
    of_adapter: float | None = None  # |Q - W| / |W - base|: from 1 on the rounding is as large as what the adapter adds
    base: float | None = None  # of the base alone in the same form


class Output(Protocol):
    """One weight of the new checkpoint; ``entries`` are the file's. ``write`` returns its error where it has one."""

    key: str
    entries: list[Entry]

    def write(self, file: Writer) -> Error | None: ...


class Copied:
    """The same bytes."""

    def __init__(self, key: str, tensor: Tensor):
        self.key, self._tensor = key, tensor
        self.entries = [Entry(key, tensor.dtype, tuple(tensor.shape), tensor.nbytes)]

    def write(self, file: Writer) -> None:
        for start in range(0, self._tensor.nbytes, _COPIED):
            stop = min(start + _COPIED, self._tensor.nbytes)
            file.put(self.key, self._tensor.read(start, stop), start)


class Cast:
    """Rounded once to another dtype. ``measured``: its error is told. ValueError where a value leaves the dtype's range."""

    def __init__(self, key: str, values: Values, dtype: torch.dtype, measured: bool = False):
        self.key, self._values, self._dtype, self._measured = key, values, dtype, measured
        self.entries = [Entry.of(key, torch.empty(values.shape, dtype=dtype, device="meta"))]

    def write(self, file: Writer) -> Error | None:
        sums = Sums(self._values)
        for start, stop in ranges(self._values):
            exact = self._values.flat(start, stop)
            stored = exact.to(self._dtype)
            if self._dtype == torch.float16:
                self._check_range(exact, stored)
            file.put(self.key, stored, start * self._dtype.itemsize)
            if self._measured:
                sums.add(exact, stored, start, stop)
        self._values.release()
        return sums.error(self.key, str(self._dtype).removeprefix("torch.")) if self._measured else None

    def _check_range(self, exact: torch.Tensor, stored: torch.Tensor) -> None:
        if bool((exact.isfinite() & ~stored.isfinite()).any()):
            largest = exact[exact.isfinite()].abs().max().item()
            raise ValueError(f"{self.key}: expected values in {self._dtype}'s range, got one of {largest:.4g}; take bf16 or fp32")


class Quantised:
    """In 4 bits, under bitsandbytes' keys: byte for byte what ``quantize_nf4`` makes of the whole weight.

    ``dtype``: the one that the file records, in which the weight is used. ``base``: a weight whose own error in this form is
    told beside.
    """

    def __init__(
        self,
        key: str,
        values: Values,
        dtype: torch.dtype,
        block_size: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
        base: Values | None = None,
    ):
        self.key, self._values, self._base = key, values, base
        whole = torch.empty(values.shape, dtype=dtype, device="meta")
        self._form = quantize_nf4(whole, block_size, double_quant, quant_type=quant_type)
        self._prefix = key.removesuffix("weight")
        self.entries = [_entry(name, tensor) for name, tensor in self._form.state_dict(self._prefix).items()]

    def write(self, file: Writer) -> Error:
        w4 = replace(self._form, **self._write_codes(self._values, lambda codes, at: file.put(self.key, codes, at)))
        for name, tensor in replace(w4, packed=torch.empty(0, dtype=torch.uint8)).state_dict(self._prefix).items():
            if name != self.key:
                file.put(name, tensor)
        sums = self._measured(w4, self._values, lambda start, stop: file.get(self.key, start, stop))
        self._values.release()
        return sums.error(self.key, w4.quant_type, None if self._base is None else self._error_of(self._base))

    def _write_codes(self, values: Values, put: Callable[[torch.Tensor, int], None]) -> dict[str, torch.Tensor | None]:
        """Quantise, and give the codes to ``put``, with the byte they start at. Returns the constants."""
        block = self._form.block_size
        absmax = torch.empty(-(-math.prod(values.shape) // block))
        for start, stop in ranges(values, NESTED_BLOCK * block):
            w = values.flat(start, stop)
            codes, here = nf4_quantize(w, block, self._form.quant_type)
            refuse_nonfinite(w, here, block, self.key, start, values.shape)
            put(codes, start // 2)
            absmax[start // block : -(-stop // block)] = here
        is_double = self._form.absmax_scale is not None
        constants = double_quantized(absmax) if is_double else (absmax, None, None)
        return dict(zip(("absmax", "absmax_scale", "absmax_offset"), constants, strict=True))

    def _measured(self, w4: NF4Weight, values: Values, codes: Callable[[int, int], torch.Tensor]) -> Sums:
        """``codes``: the bytes from one to another."""
        sums = Sums(values)
        for start, stop in ranges(values, NESTED_BLOCK * w4.block_size):
            stored = part_of(w4, start, stop, codes(start // 2, (stop + 1) // 2)).dequantize(torch.float32)
            sums.add(values.flat(start, stop), stored, start, stop)
        return sums

    def _error_of(self, values: Values) -> float:
        """|Q - W| / |W| of another weight in this form; nothing is stored."""
        kept = torch.empty(self._form.packed.numel(), dtype=torch.uint8)

        def keep(codes: torch.Tensor, at: int) -> None:
            kept[at : at + codes.numel()] = codes

        w4 = replace(self._form, **self._write_codes(values, keep))
        found = self._measured(w4, values, lambda start, stop: kept[start:stop]).error(self.key, w4.quant_type).relative
        values.release()
        return found


def _entry(name: str, tensor: torch.Tensor) -> Entry:
    """``quant_state`` has the offset's digits in it, so its size shows late."""
    if ".quant_state." not in name:
        return Entry.of(name, tensor)
    room = tensor.numel() + _DIGITS
    return Entry(name, "U8", (room,), room, late=True)


class Sums:
    """Of squares and the largest, of what was stored against what should have been. ``values`` of a merge tell their base."""

    def __init__(self, values: Values):
        self._values, self._base = values, getattr(values, "base", None)
        self._of_error = self._of_weight = self._of_change = self._largest = 0.0

    def add(self, exact: torch.Tensor, stored: torch.Tensor, start: int, stop: int) -> None:
        """The elements from start to stop, in any floating-point dtype."""
        exact = exact.float()
        off = stored.float() - exact
        self._of_error += _square(off)
        self._of_weight += _square(exact)
        self._largest = max(self._largest, torch.linalg.vector_norm(off, torch.inf).item() if off.numel() else 0.0)
        if self._base is not None:
            self._of_change += _square(exact - self._base(start, stop))

    def error(self, key: str, kind: str, base: float | None = None) -> Error:
        """Of all that was added."""
        changed = None if self._base is None else _root_of_ratio(self._of_error, self._of_change)
        relative = _root_of_ratio(self._of_error, self._of_weight)
        return Error(key.removesuffix(".weight"), kind, tuple(self._values.shape), relative, self._largest, changed, base)


def _square(values: torch.Tensor) -> float:
    return torch.linalg.vector_norm(values).item() ** 2


def _root_of_ratio(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if part == 0 else math.inf
    return math.sqrt(part / whole)
