"""Loads and stores of every space."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..decode import LOCAL_WINDOW, SHARED_WINDOW, Decoder, Get, Step, Values, instruction
from ..faults import Misaligned, OutOfBounds
from ..memory import Lanes, lane_of
from ..state import State
from ..syntax import Address, Symbol
from ..types import SIZE, UNSIGNED, dtype_of

SPACES = ("global", "shared", "shared:cta", "local", "const", "param")
ORDER = ("volatile", "relaxed", "acquire", "release", "acq_rel", "weak")
SCOPE = ("cta", "cluster", "gpu", "sys")
CACHE = (
    "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt",
    "L1:evict_normal", "L1:evict_unchanged", "L1:evict_first", "L1:evict_last", "L1:no_allocate",
    "L2:64B", "L2:128B", "L2:256B", "L2:evict_first", "L2:evict_last", "L2:evict_normal",
)  # fmt: skip
KINDS = ("b8", "u8", "s8", "b16", "u16", "s16", "f16", "bf16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64", "b128")


def qualifiers(d: Decoder) -> str:
    """Takes what orders and caches accesses, which changes nothing here; the space, "generic" where none is named."""
    for group in (ORDER, SCOPE):
        d.take(*group)
    space = d.take(*SPACES)
    while d.take(*CACHE):
        pass
    if d.take("L2:cache_hint"):
        d.operands = d.operands[:-1]
    return (space or "generic").split(":")[0]


def shape(d: Decoder) -> tuple[str, int]:
    """The type of an element and how many there are."""
    kind = d.kind(*KINDS)
    count = {"v2": 2, "v4": 4, "": 1}[d.take("v2", "v4")]
    if SIZE[kind] * count > 16:
        raise d.unsupported("more than 16 bytes")
    return kind, count


@instruction("ld", "ldu")
def load(d: Decoder) -> Step:
    kind, count = shape(d)
    space = qualifiers(d)
    d.arity(2)
    size = SIZE[kind] * count
    puts = [d.target(item, kind) for item in d.items(0, count)]
    dtype = dtype_of(kind)
    fetch = constant_parameter(d, dtype, count) if space == "param" else None
    if fetch is None:
        d.moves("global" if space in ("const", "param") else space, loads=size)
        address = d.address(1, space)
        fetch = reader(d, space, in_parameters(address) if space == "param" else address, size)
    if count == 1:
        (put,) = puts
        return lambda s, lanes: put(s, lanes, fetch(s, lanes).view(dtype))

    def step(s: State, lanes: Lanes) -> None:
        elements = fetch(s, lanes).view(dtype).reshape(-1, count)
        for number, put in enumerate(puts):
            put(s, lanes, elements[:, number])

    return step


def constant_parameter(d: Decoder, dtype: np.dtype, count: int) -> Get | None:
    """ld.param of a place that is known: the same for all lanes. None where a register holds the address."""
    operand = d.operands[1]
    if not isinstance(operand, Address) or not isinstance(operand.base, Symbol):
        return None
    if operand.base.name not in d.code.entry.parameters:
        raise d.unsupported(f"no parameter {operand.base.name}")
    offset, size = d.code.entry.parameters[operand.base.name]
    first, last = offset + operand.offset, offset + operand.offset + dtype.itemsize * count
    if operand.offset < 0 or last > offset + size:
        raise d.unsupported("outside the parameter")
    if count == 1:
        return lambda s, lanes: s.launch.parameters[first:last].view(dtype)[0]
    return lambda s, lanes: s.launch.parameters[first:last]


def in_parameters(address: Get) -> Get:
    """An address in the .param space, where 32 bits are enough, as one of the machine's."""

    def get(s: State, lanes: Lanes) -> Values:
        base = np.uint64(s.launch.parameters.ctypes.data)
        return base + ((address(s, lanes) - base) & np.uint64(0xFFFFFFFF))

    return get


@instruction("st")
def store(d: Decoder) -> Step:
    kind, count = shape(d)
    space = qualifiers(d)
    d.arity(2)
    if space in ("param", "const"):
        raise d.unsupported()
    size = SIZE[kind] * count
    d.moves(space, stores=size)
    put = writer(d, space, d.address(0, space), size)
    bits = "b128" if kind == "b128" else f"u{8 * SIZE[kind]}"
    gets = [d.source(item, bits) for item in d.items(1, count)]
    if count == 1:
        (get,) = gets
        return lambda s, lanes: put(s, lanes, get(s, lanes))
    element, whole = dtype_of(bits), UNSIGNED[size]

    def step(s: State, lanes: Lanes) -> None:
        values = np.empty((s.count(lanes), count), element)
        for number, get in enumerate(gets):
            values[:, number] = get(s, lanes)
        put(s, lanes, values.view(whole).ravel())

    return step


def reader(d: Decoder, space: str, address: Get, size: int) -> Get:
    """Fetches ``size`` bytes for each active lane, as bits."""
    if space in ("shared", "generic"):
        d.watches_shared(size)
    if space == "shared":
        return lambda s, lanes: s.shared.load(s, lanes, address(s, lanes), size)
    if space == "local":
        return lambda s, lanes: load_local(s, lanes, address(s, lanes), size)
    if space == "generic":
        return lambda s, lanes: load_generic(s, lanes, address(s, lanes), size)
    return lambda s, lanes: s.memory.load(lanes, address(s, lanes), size)


def writer(d: Decoder, space: str, address: Get, size: int) -> Callable[[State, Lanes, Values], None]:
    """Stores bits of each active lane."""
    if space in ("shared", "generic"):
        d.watches_shared(size)
    if space == "shared":
        return lambda s, lanes, values: s.shared.store(s, lanes, address(s, lanes), values, size)
    if space == "local":
        return lambda s, lanes, values: store_local(s, lanes, address(s, lanes), values, size)
    if space == "generic":
        return lambda s, lanes, values: store_generic(s, lanes, address(s, lanes), values, size)
    return lambda s, lanes, values: s.memory.store(lanes, address(s, lanes), values, size)


# ---- local memory -------------------------------------------------------------------------------------------------------------


def local_index(s: State, lanes: Lanes, address: np.ndarray, size: int) -> np.ndarray:
    """Elements of ``size`` bytes in all lanes' local memory."""
    if int(address.max()) + size > s.local_stride:
        at = int(address.argmax())
        raise OutOfBounds(f"{size} bytes at local address {int(address[at]):#x} of {s.local_stride} bytes", lane_of(lanes, at))
    if int(np.bitwise_or.reduce(address)) & (size - 1):
        at = int(np.flatnonzero(address & np.uint64(size - 1))[0])
        raise Misaligned(f"{size} bytes at local address {int(address[at]):#x}, no multiple of {size}", lane_of(lanes, at))
    return (s.numbers(lanes) * s.local_stride + address.astype(np.int64)) >> (size.bit_length() - 1)


def load_local(s: State, lanes: Lanes, address: np.ndarray, size: int) -> np.ndarray:
    return s.local.view(UNSIGNED[size]).take(local_index(s, lanes, address, size))


def store_local(s: State, lanes: Lanes, address: np.ndarray, values: Values, size: int) -> None:
    s.local.view(UNSIGNED[size])[local_index(s, lanes, address, size)] = values


# ---- generic addresses --------------------------------------------------------------------------------------------------------


def by_space(s: State, lanes: Lanes, address: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Each space that is met: positions among the active lanes, their lanes, their addresses within the space."""
    window = address >> np.uint64(56)
    numbers = s.numbers(lanes)
    parts = []
    for space, base in (("global", 0), ("shared", SHARED_WINDOW), ("local", LOCAL_WINDOW)):
        here = np.flatnonzero(window == np.uint64(base >> 56))
        if len(here):
            parts.append((space, here, numbers[here], address[here] - np.uint64(base)))
    if sum(len(here) for _, here, _, _ in parts) < len(address):
        at = int(np.flatnonzero(window > np.uint64(LOCAL_WINDOW >> 56))[0])
        raise OutOfBounds(f"generic address {int(address[at]):#x} lies in no space", lane_of(lanes, at))
    return parts


def load_generic(s: State, lanes: Lanes, address: np.ndarray, size: int) -> np.ndarray:
    values = np.empty(address.shape, UNSIGNED[size])
    for space, here, numbers, place in by_space(s, lanes, address):
        if space == "global":
            values[here] = s.memory.load(numbers, place, size)
        elif space == "shared":
            values[here] = s.shared.load(s, numbers, place, size)
        else:
            values[here] = load_local(s, numbers, place, size)
    return values


def store_generic(s: State, lanes: Lanes, address: np.ndarray, values: Values, size: int) -> None:
    values = np.broadcast_to(values, address.shape)
    for space, here, numbers, place in by_space(s, lanes, address):
        if space == "global":
            s.memory.store(numbers, place, values[here], size)
        elif space == "shared":
            s.shared.store(s, numbers, place, values[here], size)
        else:
            store_local(s, numbers, place, values[here], size)
