"""mma.sync and ldmatrix of the emulator: operands laid out by the PTX ISA's formulas, one by one, against numpy in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulation.one_instruction import HEAD, aligned, run
from emulation.ptx import Program

RNG = np.random.default_rng(0)
TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


def kernel(load: str, body: str, store: str, parameters: int) -> Program:
    """Registers %r0 … of each lane from (n, 32) words, and back."""
    names = ", ".join(f".param .u64 k_param_{n}" for n in range(parameters))
    return Program(
        f"{HEAD}.visible .entry k({names})\n{{ .reg .b32 %r<64>; .reg .b64 %rd<8>; .reg .b32 %lane;"
        ".shared .align 16 .b8 tile[512];"
        "mov.u32 %lane, %tid.x; ld.param.u64 %rd1, [k_param_0]; ld.param.u64 %rd2, [k_param_1];"
        f"mad.wide.u32 %rd1, %lane, 4, %rd1; mad.wide.u32 %rd2, %lane, 4, %rd2;{load}{body}{store} ret; }}"
    )


def of_type(kind: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits of random numbers as a type, and the numbers that they are in fp64."""
    if kind in TORCH:
        t = torch.from_numpy(values).to(TORCH[kind])
        return t.view(torch.int16).numpy().view(np.uint16), t.double().numpy()
    if kind == "tf32":
        bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        return bits, bits.view(np.float32).astype(np.float64)
    integers = (values * 50).astype(np.int8 if kind == "s8" else np.uint8)
    return integers.view(np.uint8), integers.astype(np.float64)


def place_a(kind: str, lane: int, i: int) -> tuple[int, int]:
    """Row and column of the i-th element of a lane's A fragment."""
    g, t = lane >> 2, lane % 4
    if kind in TORCH:
        return (g if i % 4 < 2 else g + 8), t * 2 + (i & 1) + (8 if i >= 4 else 0)
    if kind == "tf32":
        return (g if i % 2 == 0 else g + 8), t + (4 if i >= 2 else 0)
    return (g if i % 8 < 4 else g + 8), t * 4 + (i & 3) + (16 if i >= 8 else 0)


def place_b(kind: str, lane: int, i: int) -> tuple[int, int]:
    g, t = lane >> 2, lane % 4
    if kind in TORCH:
        return t * 2 + (i & 1) + (8 if i >= 2 else 0), g
    if kind == "tf32":
        return t + (4 if i >= 1 else 0), g
    return t * 4 + (i & 3) + (16 if i >= 4 else 0), g


def place_c(lane: int, i: int) -> tuple[int, int]:
    g, t = lane >> 2, lane % 4
    return (g if i < 2 else g + 8), t * 2 + (i & 1)


def words(matrix: np.ndarray, places: list[list[tuple[int, int]]]) -> np.ndarray:
    """(registers, 32) words of a lane's elements in order."""
    rows = np.array([[matrix[p] for p in lane] for lane in places])
    return np.ascontiguousarray(rows).view(np.uint32).T.copy()


@pytest.mark.parametrize(
    ("k", "kind_a", "kind_b", "kind_c", "kind_d"),
    [
        (16, "f16", "f16", "f32", "f32"),
        (16, "bf16", "bf16", "f32", "f32"),
        (16, "f16", "f16", "f16", "f16"),
        (8, "f16", "f16", "f32", "f32"),
        (8, "bf16", "bf16", "f32", "f32"),
        (8, "tf32", "tf32", "f32", "f32"),
        (4, "tf32", "tf32", "f32", "f32"),
        (32, "s8", "s8", "s32", "s32"),
        (32, "u8", "s8", "s32", "s32"),
        (16, "u8", "u8", "s32", "s32"),
    ],
)
def test_mma(k: int, kind_a: str, kind_b: str, kind_c: str, kind_d: str):
    size = {"f16": 2, "bf16": 2, "tf32": 4, "s8": 1, "u8": 1}[kind_a]
    a_bits, a = of_type(kind_a, RNG.standard_normal((16, k)))
    b_bits, b = of_type(kind_b, RNG.standard_normal((k, 8)))
    elements_a, elements_b = 16 * k // 32, 8 * k // 32
    a_words = words(a_bits, [[place_a(kind_a, lane, i) for i in range(elements_a)] for lane in range(32)])
    b_words = words(b_bits, [[place_b(kind_b, lane, i) for i in range(elements_b)] for lane in range(32)])
    c = RNG.standard_normal((16, 8)) if kind_c != "s32" else RNG.integers(-1000, 1000, (16, 8))
    c_type = {"f32": np.float32, "f16": np.float16, "s32": np.int32}
    c = c.astype(c_type[kind_c])
    c_words = words(c, [[place_c(lane, i) for i in range(4)] for lane in range(32)])
    source = np.concatenate([a_words, b_words, c_words])
    na, nb, nc, nd = len(a_words), len(b_words), len(c_words), 2 if kind_d == "f16" else 4
    assert na == 16 * k * size // 128 and nb == 8 * k * size // 128
    load = "".join(f"ld.global.b32 %r{n}, [%rd1+{128 * n}];" for n in range(len(source)))
    lists = [range(40, 40 + nd), range(na), range(na, na + nb), range(na + nb, na + nb + nc)]
    registers = ", ".join("{" + ", ".join(f"%r{n}" for n in part) + "}" for part in lists)
    body = f"mma.sync.aligned.m16n8k{k}.row.col.{kind_d}.{kind_a}.{kind_b}.{kind_c} {registers};"
    store = "".join(f"st.global.b32 [%rd2+{128 * n}], %r{40 + n};" for n in range(nd))
    out = np.zeros((nd, 32), np.uint32)
    run(kernel(load, body, store, 2), "k", (1, 1, 1), (32, 1, 1), [source, out])
    got = np.zeros((16, 8), c_type[kind_d])
    for lane in range(32):
        values = out[:, lane].copy().view(c_type[kind_d])
        for i in range(4):
            got[place_c(lane, i)] = values[i]
    wanted = (a @ b + c.astype(np.float64)).astype(c_type[kind_d])
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count: int, transposed: bool):
    """Matrix i's rows lie where lanes 8i … 8i+7 say; lane l gets elements 2·(l % 4) and the next of row l / 4."""
    halves = RNG.integers(0, 2**16, (32, 8), dtype=np.uint16)
    order = RNG.permutation(32).astype(np.uint32)
    source = aligned(160)
    source[:128], source[128:] = halves.view(np.uint32).reshape(-1), order
    registers = ", ".join(f"%r{n}" for n in range(count))
    load = (
        "mov.u32 %r10, tile; mad.lo.u32 %r11, %lane, 16, %r10; "
        "mad.wide.u32 %rd3, %lane, 12, %rd1;"
        "ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd3]; st.shared.v4.b32 [%r11], {%r20, %r21, %r22, %r23}; bar.sync 0;"
        "ld.global.b32 %r12, [%rd1+512]; mad.lo.u32 %r13, %r12, 16, %r10;"
    )
    trans = ".trans" if transposed else ""
    body = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r13];"
    store = "".join(f"st.global.b32 [%rd2+{128 * n}], %r{n};" for n in range(count))
    out = np.zeros((count, 32), np.uint32)
    run(kernel(load, body, store, 2), "k", (1, 1, 1), (32, 1, 1), [source, out])
    for i in range(count):
        matrix = halves[order[8 * i : 8 * i + 8]]
        matrix = matrix.T if transposed else matrix
        for lane in range(32):
            pair = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
            assert out[i, lane] == int(pair[0]) | int(pair[1]) << 16


@pytest.mark.parametrize("finite", ["", ".satfinite"])
def test_integer_sums_wrap_or_saturate(finite: str):
    source = np.concatenate(
        [np.full((4, 32), 0x7F7F7F7F, np.uint32), np.full((2, 32), 0x7F7F7F7F, np.uint32), np.full((4, 32), 2**31 - 1)]
    )
    source, out = source.astype(np.uint32), np.zeros((4, 32), np.int32)
    load = "".join(f"ld.global.b32 %r{n}, [%rd1+{128 * n}];" for n in range(10))
    body = f"mma.sync.aligned.m16n8k32.row.col{finite}.s32.s8.s8.s32 {{%r40,%r41,%r42,%r43}}, {{%r0,%r1,%r2,%r3}}, {{%r4,%r5}},"
    store = "".join(f"st.global.b32 [%rd2+{128 * n}], %r{40 + n};" for n in range(4))
    run(kernel(load, body + "{%r6,%r7,%r8,%r9};", store, 2), "k", (1, 1, 1), (32, 1, 1), [source, out])
    assert (out == (2**31 - 1 if finite else 32 * 127 * 127 - 2**31 - 1)).all()
