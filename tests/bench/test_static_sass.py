"""What is read out of cubins whose kernels are known, and out of hand-made control flow."""

from __future__ import annotations

import pytest
from static_samples import needs_compilers, samples

from bench.static import flow, nvcc, tools
from bench.static.sass import Instruction, Kernel


@needs_compilers
@pytest.mark.parametrize("target", nvcc.TARGETS)
def test_resources(target: str):
    """Threads from launch bounds; shared memory without the system's own; local memory only where it was forced."""
    kernels = samples(target)
    threads = {"copy": 256, "unpack": 128, "sum": 256, "copy_ragged": 64, "spilling": 1024, "local_array": 64, "multiply": 32}
    assert {name: kernel.threads for name, kernel in kernels.items()} == threads | {"unbounded": 0}
    assert {name: kernel.shared for name, kernel in kernels.items() if kernel.shared} == {"sum": 1024}
    assert {name for name, kernel in kernels.items() if kernel.spills} == {"spilling", "local_array"}
    assert kernels["local_array"].stack == 256 and kernels["spilling"].stack > 0 and kernels["copy"].stack == 0
    assert kernels["spilling"].registers in (32, 64) and 6 <= kernels["copy"].registers <= 16


@needs_compilers
@pytest.mark.parametrize("target", nvcc.TARGETS)
def test_counted_regions(target: str):
    kernels = samples(target)
    copy = flow.counted(kernels["copy"], "path")
    assert copy.opcodes["LDG"] == copy.opcodes["STG"] == copy.opcodes["EXIT"] == 1 and copy.wide_share == 1 and copy.loops == 0
    assert 8 <= copy.instructions <= 14 and "NOP" not in copy.opcodes
    unpack = flow.counted(kernels["unpack"], "path")
    assert unpack.wide_share == 0.5 and unpack.opcodes["STG"] == 4
    hot = flow.counted(kernels["sum"], "loop")
    assert hot.opcodes["FADD"] == 4 and hot.opcodes["LDG"] == 1 and hot.wide_share == 1 and 8 <= hot.instructions <= 11
    whole = flow.counted(kernels["sum"], "path")
    assert whole.loops == 1 and whole.opcodes["FADD"] == 4 and whole.opcodes["STS"] == whole.opcodes["LDS"] == 1
    multiply = flow.counted(kernels["multiply"], "loop")
    assert multiply.mma == "2 HMMA" and multiply.opcodes["LDG"] == 4 and multiply.wide_share == 0
    assert flow.counted(kernels["unbounded"], "path").mma == ""


@needs_compilers
@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_120a"])
def test_the_main_path_is_the_whole_tiles(target: str):
    """The bytewise loop of the last tile lies on another way, and is what a loop would be."""
    ragged = samples(target)["copy_ragged"]
    main = flow.counted(ragged, "path")
    assert main.wide_share == 1 and main.opcodes["LDG"] == main.opcodes["STG"] == 1 and main.loops == 0
    assert flow.counted(ragged, "loop").wide_share == 0


@needs_compilers
def test_no_loop():
    with pytest.raises(ValueError, match="copy: the table counts a loop, and there is none"):
        flow.counted(samples("sm_80")["copy"], "loop")


# ---- hand-made ---------------------------------------------------------------------------------------------------------------


def made(*lines: str, **labels: int) -> Kernel:
    """``"@P0 BRA `(.L_x_1)"`` …, 16 bytes each; labels by their line."""
    code = []
    for number, line in enumerate(lines):
        guard, _, rest = line[1:].partition(" ") if line.startswith("@") else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        code.append(Instruction(16 * number, guard, opcode, operands))
    return Kernel("made", "made", instructions=code, labels={f".L_x_{name[1:]}": 16 * line for name, line in labels.items()})


def opcodes(kernel: Kernel, region: str) -> list[str]:
    return [instruction.opcode for instruction in flow.counted(kernel, region).every]


def test_a_loop_that_is_tested_at_its_top():
    """The way through its body goes on where its head leaves it."""
    kernel = made("MOV", "@P0 BRA `(.L_x_1)", "LDG.E.128", "BRA `(.L_x_0)", "FADD", "EXIT", "NOP", x0=1, x1=4)
    assert opcodes(kernel, "once") == ["MOV", "BRA", "LDG.E.128", "BRA", "FADD", "EXIT"]
    assert opcodes(kernel, "loop") == ["BRA", "LDG.E.128", "BRA"]


def test_a_call_to_a_label_leaves_the_loop():
    kernel = made("LDG.E", "@P0 CALL.REL.NOINC `(.L_x_1)", "BRA `(.L_x_0)", "EXIT", x0=0, x1=3)
    assert opcodes(kernel, "once") == ["LDG.E", "CALL.REL.NOINC", "EXIT"]
    assert flow.counted(kernel, "once").calls == 0


def test_a_call_to_a_function_comes_back():
    kernel = made(
        "LDG.E", "CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath)", "STG.E", "EXIT", "RET.REL.NODEC R2"
    )
    assert opcodes(kernel, "path") == ["LDG.E", "CALL.REL.NOINC", "STG.E", "EXIT"]
    assert flow.counted(kernel, "path").calls == 1


def test_a_slow_path_by_a_call_is_not_the_main_path():
    """As a reciprocal's subnormals: fewer instructions, but a function."""
    fast, slow = ("FFMA", "FFMA", "FFMA"), ("CALL.REL.NOINC `($slowpath)", "BRA `(.L_x_1)")
    kernel = made("@P0 BRA `(.L_x_0)", *fast, "LDG.E", "EXIT", *slow, x0=6, x1=4)
    assert opcodes(kernel, "path") == ["BRA", *fast, "LDG.E", "EXIT"]


def test_divergent_warps_are_not_counted():
    """BRA.DIV leads to shuffles one by one."""
    kernel = made("BRA.DIV ~URZ, `(.L_x_0)", "FADD", "SHFL.IDX PT, R0", "LDG.E", "EXIT", "BRA `(.L_x_1)", x0=5, x1=3)
    assert opcodes(kernel, "path") == ["BRA.DIV", "FADD", "SHFL.IDX", "LDG.E", "EXIT"]


def test_the_hot_loop_of_a_nest():
    """The inner one, whose products the outer one's 128-bit stores don't outweigh."""
    inner = ("LDG.E.128", "HMMA.16816.F32", "@P0 BRA `(.L_x_1)")
    kernel = made("FADD", *inner, "STG.E.128", "@P1 BRA `(.L_x_0)", "EXIT", x0=0, x1=1)
    assert opcodes(kernel, "loop") == ["LDG.E.128", "HMMA.16816.F32", "BRA"]


def test_ragged_edges_inside_a_hot_loop():
    """They loop over more bytes than the main path stores, and are passed by."""
    whole, ragged = ("STG.E.64", "BRA `(.L_x_2)"), ("STG.E", "STG.E", "STG.E", "@P1 BRA `(.L_x_1)")
    kernel = made("LDG.E.128", "@P0 BRA `(.L_x_1)", *whole, *ragged, "@P2 BRA `(.L_x_0)", "EXIT", x0=0, x1=4, x2=8)
    assert opcodes(kernel, "loop") == ["LDG.E.128", "BRA", *("STG.E.64", "BRA"), "BRA"]
    assert flow.counted(kernel, "loop").loops == 0


def test_threads_meet_where_the_barrier_says():
    """BSYNC out of line goes to where its BSSY points."""
    kernel = made(
        "BSSY B0, `(.L_x_1)", "@P0 BRA `(.L_x_0)", "LDG.E.128", "BSYNC B0", "STG.E", "EXIT", "FADD", "BSYNC B0", x0=6, x1=4
    )
    assert opcodes(kernel, "path") == ["BSSY", "BRA", "LDG.E.128", "BSYNC", "STG.E", "EXIT"]
    assert set(flow.basic_blocks(kernel)[6 * 16].successors) == {4 * 16}


def test_waiting_is_no_work():
    """Of nested loops the innermost that loads, multiplies or reads shared memory: not the one that waits for a barrier."""
    wait = ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2", "@!P0 BRA `(.L_x_1)")
    kernel = made("MOV", "FADD", *wait, "HGMMA.64x128x16.F32.BF16 R24", "@P1 BRA `(.L_x_0)", "EXIT", x0=1, x1=2)
    assert opcodes(kernel, "loop") == ["FADD", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA", "HGMMA.64x128x16.F32.BF16", "BRA"]
    assert flow.counted(kernel, "loop").loops == 0


def test_two_entries_are_refused():
    kernel = made("@P0 BRA `(.L_x_1)", "FADD", "LDG.E", "@P1 BRA `(.L_x_0)", "EXIT", x0=1, x1=2)
    with pytest.raises(ValueError, match="a loop with two entries"):
        flow.counted(kernel, "path")


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="BRX at 0x10: no target that is known"):
        flow.counted(made("MOV", "BRX R4 -0x10", "EXIT"), "path")


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("LDG.E.128.CONSTANT", 16),
        ("STG.E.EF.64", 8),
        ("LDG.E.U8", 1),
        ("STG.E.U16", 2),
        ("LDG.E", 4),
        ("LDG.E.ENL2.256", 32),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("LDGSTS.E.LTC128B", 4),
        ("LDS.128", 0),
        ("FADD", 0),
    ],
)
def test_bytes_of_an_access(opcode: str, size: int):
    assert Instruction(0, "", opcode, "").global_bytes == size


@pytest.mark.parametrize(
    ("opcode", "is_mma"),
    [
        ("HMMA.16816.F32.BF16", True),
        ("IMMA.16832.S8.S8", True),
        ("HGMMA.64x128x16.F32", True),
        ("UTCHMMA", True),
        ("QMMA.16832.F32", True),
        ("HFMA2.MMA", False),
        ("FFMA", False),
    ],
)
def test_mma(opcode: str, is_mma: bool):
    assert Instruction(0, "", opcode, "").is_mma is is_mma


def test_has():
    store = Instruction(0, "", "STG.E.EF.128", "")
    assert store.has("STG") and store.has("STG.128") and store.has("HMMA|STG.EF") and not store.has("STG.64|LDG.128")


def test_missing_tools_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tools, "find", lambda name: None)
    assert tools.why_not().startswith("no cuobjdump, nvdisasm, c++filt: neither on the PATH nor in Triton's wheel")
    with pytest.raises(RuntimeError, match="no cuobjdump"):
        tools.output("cuobjdump")
