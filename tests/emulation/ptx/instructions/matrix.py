"""Tensor-core instructions: ldmatrix and mma.sync. A warp's fragments are unfolded into matrices, multiplied in fp64 (or int64)
and rounded once. Lane = 4·g + t; the fragment layouts are those of the PTX ISA, section "Matrix Fragments for mma"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..decode import Collective, Decoder, Get, Put, Values, instruction
from ..memory import Lanes
from ..numerics import bf16_to_f32
from ..state import State

ALL = slice(None)


def active_warps(s: State, lanes: Lanes) -> np.ndarray | slice:
    """The warps that take part; all 32 lanes of each do."""
    warps = s.warps(lanes)
    return ALL if warps is None else warps


def fragment(s: State, gets: list[Get], warps: np.ndarray | slice) -> np.ndarray:
    """Registers as (warps, registers, 8, 4): register, g, t."""
    rows = [np.broadcast_to(get(s, None), s.lanes).reshape(-1, 32)[warps] for get in gets]
    return np.stack(rows, axis=1).reshape(-1, len(gets), 8, 4)


def store_fragment(s: State, puts: list[Put], warps: np.ndarray | slice, values: np.ndarray) -> None:
    """(warps, registers, 8, 4) into the warps' lanes."""
    lanes = None if isinstance(warps, slice) else (warps[:, None] * 32 + np.arange(32)).ravel()
    for number, put in enumerate(puts):
        put(s, lanes, np.ascontiguousarray(values[:, number]).reshape(-1))


@instruction("ldmatrix")
def load_matrix(d: Decoder) -> Collective:
    d.need("sync")
    d.need("aligned")
    d.need("m8n8")
    count = {"x1": 1, "x2": 2, "x4": 4}[d.need("x1", "x2", "x4")]
    transposed = bool(d.take("trans"))
    d.take("shared", "shared:cta")
    d.kind("b16")
    d.arity(2)
    puts = [d.target(item, "b32") for item in d.items(0, count)]
    address = d.address(1, "shared")
    d.moves("shared", loads=4 * count)
    d.watches_shared(16)

    def step(s: State, lanes: Lanes) -> None:
        warps = active_warps(s, lanes)
        # Lanes 8i … 8i+7 hold the addresses of matrix i's rows.
        readers = (np.arange(s.lanes).reshape(-1, 32)[warps, : 8 * count]).reshape(-1)
        rows = s.shared.load(s, readers, address(s, readers), 16)
        matrices = rows.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        store_fragment(s, puts, warps, matrices.view(np.uint32))

    return Collective(step)


@dataclass(frozen=True)
class Element:
    """How a type lies in a 32-bit register: ``pack`` of them, as ``bits``, widened to what is multiplied."""

    pack: int
    bits: type
    widen: Callable[[Values], Values]


def half_to_f64(bits: Values) -> Values:
    return bits.view(np.float16).astype(np.float64)


ELEMENTS = {
    "f16": Element(2, np.uint16, half_to_f64),
    "bf16": Element(2, np.uint16, lambda bits: bf16_to_f32(bits).astype(np.float64)),
    "tf32": Element(1, np.uint32, lambda bits: (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)),
    "s8": Element(4, np.uint8, lambda bits: bits.view(np.int8).astype(np.float64)),
    "u8": Element(4, np.uint8, lambda bits: bits.astype(np.float64)),
}
SHAPES = {
    ("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16"), ("m16n8k8", "bf16"), ("m16n8k8", "tf32"), ("m16n8k4", "tf32"),
    ("m16n8k32", "s8"), ("m16n8k32", "u8"), ("m16n8k16", "s8"), ("m16n8k16", "u8"),
}  # fmt: skip


@instruction("mma")
def multiply_matrices(d: Decoder) -> Collective:
    """D (16, 8) = A (16, k) B (k, 8) + C: A by rows, B by columns."""
    d.need("sync")
    d.need("aligned")
    shape = d.need("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32")
    d.need("row")
    d.need("col")
    saturates = bool(d.take("satfinite"))
    if len(d.modifiers) != 4:
        raise d.unsupported()
    kind_d, kind_a, kind_b, kind_c = d.modifiers
    d.modifiers = []
    sums = {"s8": ("s32",), "u8": ("s32",), "f16": ("f16", "f32")}.get(kind_a, ("f32",))
    if (shape, kind_a) not in SHAPES or (shape, kind_b) not in SHAPES or kind_d not in sums or kind_c not in sums:
        raise d.unsupported()
    if kind_a != kind_b and not {kind_a, kind_b} <= {"s8", "u8"}:
        raise d.unsupported()
    d.arity(4)
    k = int(shape.partition("k")[2])
    a_element, b_element = ELEMENTS[kind_a], ELEMENTS[kind_b]
    a_count, b_count = 16 * k // 32 // a_element.pack, 8 * k // 32 // b_element.pack
    a_gets = [d.source(item, "b32") for item in d.items(1, a_count)]
    b_gets = [d.source(item, "b32") for item in d.items(2, b_count)]
    accumulators = {"f32": ("f32", 4), "f16": ("b32", 2), "s32": ("s32", 4)}
    type_c, count_c = accumulators[kind_c]
    type_d, count_d = accumulators[kind_d]
    c_gets = [d.source(item, type_c) for item in d.items(3, count_c)]
    puts = [d.target(item, type_d) for item in d.items(0, count_d)]

    def step(s: State, lanes: Lanes) -> None:
        warps = active_warps(s, lanes)
        a = unfold_a(fragment(s, a_gets, warps), a_element, k)
        b = unfold_b(fragment(s, b_gets, warps), b_element, k)
        c = unfold_c(fragment(s, c_gets, warps), kind_c)
        total = a @ b.swapaxes(1, 2) + c
        if kind_d == "s32":
            values = np.clip(total, -(2.0**31), 2.0**31 - 1) if saturates else total
            values = values.astype(np.int64).astype(np.int32)
        else:
            values = total.astype(np.float32 if kind_d == "f32" else np.float16)
        store_fragment(s, puts, warps, fold_c(values, kind_d))

    return Collective(step)


def unfold_a(registers: np.ndarray, element: Element, k: int) -> np.ndarray:
    """A (warps, 16, k): register i of a pair holds row g + 8·i, each pair the next 4·pack columns, from pack·t on."""
    warps = len(registers)
    parts = registers.reshape(warps, -1, 2, 8, 4)  # columns / (4·pack), row half, g, t
    elements = parts.view(element.bits).reshape(warps, parts.shape[1], 2, 8, 4, element.pack)
    return element.widen(np.ascontiguousarray(elements.transpose(0, 2, 3, 1, 4, 5)).reshape(warps, 16, k))


def unfold_b(registers: np.ndarray, element: Element, k: int) -> np.ndarray:
    """B transposed (warps, 8, k): column g, register i holds the rows from 4·pack·i + pack·t on."""
    warps = len(registers)
    elements = registers.view(element.bits).reshape(warps, -1, 8, 4, element.pack)
    return element.widen(np.ascontiguousarray(elements.transpose(0, 2, 1, 3, 4)).reshape(warps, 8, k))


def unfold_c(registers: np.ndarray, kind: str) -> np.ndarray:
    """C (warps, 16, 8): rows g and g + 8, columns 2·t and 2·t + 1."""
    warps = len(registers)
    if kind == "f16":
        halves = registers.view(np.float16).reshape(warps, 2, 8, 4, 2)
        return halves.reshape(warps, 16, 8).astype(np.float64)
    pairs = registers.reshape(warps, 2, 2, 8, 4).transpose(0, 1, 3, 4, 2)
    return pairs.reshape(warps, 16, 8).astype(np.float64)


def fold_c(values: np.ndarray, kind: str) -> np.ndarray:
    """(warps, 16, 8) back to (warps, registers, 8, 4)."""
    warps = len(values)
    if kind == "f16":
        return np.ascontiguousarray(values).view(np.uint32).reshape(warps, 2, 8, 4)
    return values.reshape(warps, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3).reshape(warps, 4, 8, 4)
