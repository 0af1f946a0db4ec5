"""PTX's scalar types as numpy sees them."""

from __future__ import annotations

import numpy as np

# Bytes of a type; a predicate lies in a byte of its own.
SIZE = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1,
    "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4,
    "b64": 8, "u64": 8, "s64": 8, "f64": 8,
    "b128": 16,
}  # fmt: skip

# The view of a register that holds a type: bf16 and packed pairs travel as bits.
VIEW = {
    "pred": "pred", "b8": "u8", "u8": "u8", "s8": "s8",
    "b16": "u16", "u16": "u16", "s16": "s16", "f16": "f16", "bf16": "u16",
    "b32": "u32", "u32": "u32", "s32": "s32", "f32": "f32", "f16x2": "u32", "bf16x2": "u32", "tf32": "f32",
    "b64": "u64", "u64": "u64", "s64": "s64", "f64": "f64",
    "b128": "b128",
}  # fmt: skip

BITS128 = np.dtype(np.complex128)  # 16 bytes that numpy moves in one piece and never computes with
DTYPE = {
    "pred": np.dtype(np.bool_), "u8": np.dtype(np.uint8), "s8": np.dtype(np.int8),
    "u16": np.dtype(np.uint16), "s16": np.dtype(np.int16), "f16": np.dtype(np.float16),
    "u32": np.dtype(np.uint32), "s32": np.dtype(np.int32), "f32": np.dtype(np.float32),
    "u64": np.dtype(np.uint64), "s64": np.dtype(np.int64), "f64": np.dtype(np.float64),
    "b128": BITS128,
}  # fmt: skip
UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64), 16: BITS128}
WIDER = {"u8": "u16", "s8": "s16", "u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def dtype_of(kind: str) -> np.dtype:
    """numpy's dtype of a PTX type's view."""
    return DTYPE[VIEW[kind]]


def is_float(kind: str) -> bool:
    """Whether a type has a sign, an exponent and a fraction."""
    return kind.startswith(("f", "bf", "tf"))
