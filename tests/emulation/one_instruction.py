"""Kernels of hand-written PTX; of one instruction: load operands, execute, store. Values travel as unsigned bits."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from emulation.ptx import Memory, Program, Report

WIDTH = {"b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "pred": 32} | {
    kind: 32 for kind in ("b32", "u32", "s32", "f32", "f16x2", "bf16x2")
}
WIDTH |= {kind: 64 for kind in ("b64", "u64", "s64", "f64")}
HEAD = ".version 9.0\n.target sm_80\n.address_size 64\n"


@dataclass(frozen=True)
class Case:
    """``template`` with {0} the destination and {1}, {2}, … the sources; ``define`` takes and returns unsigned bits."""

    opcode: str
    result: str
    sources: tuple[str, ...]
    define: Callable[..., int]
    template: str = ""

    def __str__(self) -> str:
        return self.opcode


def kernel_text(case: Case) -> str:
    """One thread an operand tuple."""
    registers = {8: "rs", 16: "rs", 32: "r", 64: "rd"}
    kinds = [case.result, *case.sources]
    names, lines = [], []
    for n, kind in enumerate(kinds):
        names.append(f"%p{n}" if kind == "pred" else f"%{registers[WIDTH[kind]]}{10 + n}")
    for n, kind in enumerate(case.sources, 1):
        size = WIDTH[kind] // 8
        where = f"%r{10 + n}" if kind == "pred" else names[n]
        lines += [
            f"ld.param.u64 %rd1, [k_param_{n}];",
            f"mad.wide.u32 %rd2, %r1, {size}, %rd1;",
            f"ld.global.{'u' if WIDTH[kind] == 8 else 'b'}{8 * size} {where}, [%rd2];",
        ]
        if kind == "pred":
            lines.append(f"setp.ne.u32 {names[n]}, {where}, 0;")
    template = case.template or case.opcode + " " + ", ".join(f"{{{n}}}" for n in range(len(kinds))) + ";"
    lines.append(template.format(*names))
    if case.result == "pred":
        lines.append(f"selp.u32 %r10, 1, 0, {names[0]};")
    size = WIDTH[case.result] // 8
    stored = "%r10" if case.result == "pred" else names[0]
    lines += [
        "ld.param.u64 %rd1, [k_param_0];",
        f"mad.wide.u32 %rd2, %r1, {size}, %rd1;",
        f"st.global.b{8 * size} [%rd2], {stored};",
    ]
    parameters = ",\n".join(f".param .u64 k_param_{n}" for n in range(len(kinds)))
    return (
        f"{HEAD}.visible .entry k({parameters})\n{{\n.reg .pred %p<9>; .reg .b16 %rs<20>; .reg .b32 %r<20>; .reg .b64 %rd<20>;\n"
        "mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\nmad.lo.u32 %r1, %r2, 64, %r1;\n" + "\n".join(lines) + "\nret;\n}\n"
    )


def execute(case: Case, operands: Sequence[Sequence[int]]) -> list[int]:
    """The instruction's result for each operand tuple."""
    padded = -(-len(operands) // 64) * 64
    columns = [np.zeros(padded, f"u{WIDTH[case.result] // 8}")]
    for n, kind in enumerate(case.sources):
        column = np.zeros(padded, f"u{WIDTH[kind] // 8}")
        column[: len(operands)] = [values[n] for values in operands]
        columns.append(column)
    run(Program(kernel_text(case)), "k", (padded // 64, 1, 1), (64, 1, 1), columns)
    return [int(value) for value in columns[0][: len(operands)]]


def run(
    program: Program,
    entry: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: Sequence[np.ndarray | bytes],
    shared_bytes: int = 0,
    read_only: Sequence[int] = (),
    **options: bool,
) -> Report:
    """Launches with numpy arrays as pointers, bytes as they are; returns the report."""
    memory, raw = Memory(), []
    for n, argument in enumerate(arguments):
        if isinstance(argument, np.ndarray):
            memory.allow(argument.ctypes.data, argument.nbytes, f"argument {n}", writable=n not in read_only)
            raw.append(struct.pack("<Q", argument.ctypes.data))
        else:
            raw.append(argument)
    return program.run(entry, grid, block, shared_bytes, raw, memory, **options)


def kernel(body: str, parameters: int = 2, module: str = "") -> Program:
    """%rd1, %rd2, … are the parameters, %r1 the thread's number; p, q predicates."""
    names = ", ".join(f".param .u64 k_param_{n}" for n in range(parameters))
    load = "".join(f"ld.param.u64 %rd{n + 1}, [k_param_{n}];" for n in range(parameters))
    return Program(
        f"{HEAD}{module}.visible .entry k({names})\n{{ .reg .pred p, q; .reg .b16 %rs<20>; .reg .b32 %r<40>; .reg .b64 %rd<40>;"
        f"{load} mov.u32 %r1, %tid.x; {body} ret; }}"
    )


def launch(body: str, *arrays: np.ndarray, threads: int = 32, shared_bytes: int = 0, module: str = "", **options: bool) -> Report:
    """One block runs a kernel of this body."""
    return run(kernel(body, len(arrays), module), "k", (1, 1, 1), (threads, 1, 1), arrays, shared_bytes, **options)


def aligned(n: int, dtype: type = np.uint32) -> np.ndarray:
    """Zeros on a multiple of 16 bytes."""
    raw = np.zeros(n * np.dtype(dtype).itemsize + 16, np.uint8)
    return raw[-raw.ctypes.data % 16 :][: n * np.dtype(dtype).itemsize].view(dtype)


def signed(bits: int, width: int) -> int:
    """Two's complement."""
    return bits - (1 << width) if bits >> (width - 1) & 1 else bits


def unsigned(value: int, width: int) -> int:
    """The low bits."""
    return value & ((1 << width) - 1)
