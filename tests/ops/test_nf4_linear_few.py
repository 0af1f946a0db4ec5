"""csrc/ops/nf4_linear/cuda_few.cu by itself, as source on the host and as PTX in the emulator."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from emulation.cuda_host import door as doors
from numerics import assert_no_worse_than_twice_plain, row_scaled

import peftk
from peftk.format.code4 import code4
from peftk.native import NATIVE_DTYPE

OP = "nf4_linear_few"
BF16, F16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Output:
    w4: peftk.NF4Weight
    bias: torch.Tensor | None = None
    s: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 0.75
    split: int = 1


@pytest.fixture(params=["cuda-host", "cuda-ptx"])
def door(request: pytest.FixtureRequest):
    door = doors.HostDoor() if request.param == "cuda-host" else doors.PtxDoor()
    if why := door.why_not():
        pytest.skip(why)
    return door


@pytest.fixture
def ptx():
    if why := doors.PtxDoor().why_not():
        pytest.skip(why)
    return doors.PtxDoor()


def make(n: int, k: int, m: int = 1, r: int = 0, dtype=BF16, bias: bool = False, split: int = 1, **format) -> Output:
    w4 = peftk.quantize_nf4(row_scaled(n, k) / k**0.5, **format)
    s, b = (torch.randn(m, r).to(dtype), torch.randn(n, r).to(dtype)) if r else (None, None)
    return Output(w4, torch.randn(n, dtype=dtype) if bias else None, s, b, split=split)


def run(door, x: torch.Tensor, *outputs: Output) -> list[torch.Tensor]:
    """Every y, out of memory that holds NaN before, as do the partial sums."""
    m, k = x.shape
    wired, ys = [], []
    for o in outputs:
        (n, _), w4 = o.w4.shape, o.w4
        ys.append(torch.empty(m, n, dtype=x.dtype))
        weight = (w4.packed, w4.absmax, w4.absmax_scale, w4.absmax_offset, n, w4.block_size, code4(w4.quant_type).number)
        wired.append((weight, o.bias, ys[-1], o.s, o.b, 0 if o.s is None else o.s.shape[1], o.scale, o.split))
    sums = sum(o.split * m * o.w4.shape[0] for o in outputs if o.split > 1)
    partial_sums = torch.empty(sums, dtype=torch.float32) if sums else None
    door.call(OP, wired, k, x, x.stride(0), m, NATIVE_DTYPE[x.dtype], partial_sums)
    return ys


def assert_right(y: torch.Tensor, x: torch.Tensor, o: Output) -> None:
    w = o.w4.dequantize(torch.float32)
    plain, truth = torch.nn.functional.linear(x, w.to(x.dtype), o.bias), x.double() @ w.double().T
    if o.bias is not None:
        truth += o.bias.double()
    if o.s is not None:
        plain = plain + o.scale * (o.s @ o.b.T)
        truth += o.scale * o.s.double() @ o.b.double().T
    assert_no_worse_than_twice_plain(y, plain, truth)


# m, n, k, r, split, double_quant, bias, block_size, quant_type: 1 to 18 steps of a warp, so rounds of 1 to 4; warps without any.
CASES = [
    (1, 32, 64, 0, 1, True, False, 64, "nf4"),
    (2, 33, 192, 1, 1, False, True, 64, "nf4"),
    (3, 7, 576, 5, 1, True, True, 128, "fp4"),
    (4, 50, 320, 64, 2, True, False, 4096, "nf4"),
    (5, 96, 1088, 8, 3, True, True, 64, "nf4"),
    (6, 31, 2624, 16, 1, False, False, 4096, "fp4"),
    (7, 65, 640, 130, 2, False, True, 128, "nf4"),
    (8, 34, 4416, 16, 1, True, True, 64, "fp4"),
    (8, 1, 9088, 0, 1, True, False, 64, "nf4"),
    (8, 40, 128, 8, 5, True, True, 64, "nf4"),  # runs without a step
]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("m,n,k,r,split,double_quant,bias,block_size,quant_type", CASES)
def test_values(door, m, n, k, r, split, double_quant, bias, block_size, quant_type, dtype):
    format = {"double_quant": double_quant, "block_size": block_size, "quant_type": quant_type}
    o = make(n, k, m, r, dtype, bias, split, **format)
    before = o.w4.packed.clone()
    x = torch.randn(m, k + 64, dtype=dtype)[:, :k]
    assert_right(run(door, x, o)[0], x, o)
    assert torch.equal(o.w4.packed, before)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_inputs_with_a_mean(ptx, quant_type, dtype):
    """A rounded code is off by the same wherever it stands, which x of one sign piles up over k."""
    o = make(32, 4096, quant_type=quant_type)
    x = torch.randn(8, 4096).abs().to(dtype)
    assert_right(run(ptx, x, o)[0], x, o)


def test_a_list_is_its_single_calls(door):
    """Sixteen weights of every format, split or not."""
    m, k = 3, 320
    x = torch.randn(m, k, dtype=BF16)
    outputs = [
        make(
            1 + 11 * i, k, m, 5 * (i % 3), bias=i % 2 == 0, split=1 + i % 4 // 2 * 2, double_quant=i % 5 > 1,
            block_size=(64, 128, 4096)[i % 3], quant_type=("nf4", "fp4")[i % 7 // 4],
        )
        for i in range(16)
    ]  # fmt: skip
    together = run(door, x, *outputs)
    if isinstance(door, doors.PtxDoor):
        assert len(door.reports) == 2, "one launch, and one that adds up the split ones' runs"
    for y, o in zip(together, outputs, strict=True):
        assert torch.equal(y, run(door, x, o)[0])


def test_a_row_of_x_does_not_depend_on_the_others(door):
    o = make(40, 576)
    x = torch.randn(8, 576, dtype=F16)
    (whole,) = run(door, x, o)
    for m in (1, 3):
        assert torch.equal(run(door, x[:m], o)[0], whole[:m])
    x[5] = float("nan")
    (spoilt,) = run(door, x, o)
    assert spoilt[5].isnan().all() and torch.equal(spoilt[:5], whole[:5]) and torch.equal(spoilt[6:], whole[6:])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_constant_that_is_not_finite_spoils_its_own_row_only(door, value):
    o = make(34, 640, double_quant=False)
    x = torch.randn(4, 640, dtype=BF16)
    (good,) = run(door, x, o)
    w4 = o.w4
    bad = peftk.NF4Weight(w4.packed, w4.absmax.clone(), None, None, w4.shape, w4.dtype, w4.block_size)
    bad.absmax[5 * 10 + 7] = value
    (y,) = run(door, x, replace(o, w4=bad))
    assert not y[:, 5].isfinite().any()
    assert torch.equal(y[:, :5], good[:, :5]) and torch.equal(y[:, 6:], good[:, 6:])


def test_both_doors_and_every_order_of_threads_give_the_same_bits(ptx):
    x = torch.randn(5, 832, dtype=BF16)
    outputs = [make(50, 832, 5, 16, bias=True), make(33, 832, 5, 5, split=3, double_quant=False)]
    expected = run(ptx, x, *outputs)
    for seed in range(3):
        assert all(map(torch.equal, run(doors.HostDoor(seed), x, *outputs), expected))


@pytest.mark.parametrize("double_quant", [True, False])
def test_traffic(ptx, double_quant):
    """What twice the depth adds: every packed byte once, every constant once, x once a tile of 32 rows; no two lanes of a look-up
    meet in a bank."""
    ptx.traffic = True
    m, n, depths, accesses = 8, 64, (2048, 4096), []
    for k in depths:
        run(ptx, torch.randn(m, k, dtype=BF16), make(n, k, double_quant=double_quant))
        ((_, report),) = ptx.reports
        assert report.bytes_stored["global"] == m * n * 2
        assert double_quant or report.traffic.conflicts == 0, "codes of constants are looked up in a table without copies"
        accesses.append(report.accesses)
    added, more = accesses[1] - accesses[0], depths[1] - depths[0]
    constants = n * more // 64
    expected = {8: n * more // 2 // 8, 16: m * more * 2 // 16 * n // 32, 4: constants} | ({1: constants} if double_quant else {})
    assert {size: count for (space, _, size), count in added.items() if space == "global"} == expected
    look_ups = n * more // 2 + (constants if double_quant else 0)
    assert added[("shared", "load", 4)] == look_ups


def test_no_rows(door):
    o = make(8, 64)
    assert run(door, torch.empty(0, 64, dtype=BF16), o)[0].shape == (0, 8)


def test_bad_arguments_are_refused(door):
    o, odd, small = make(8, 64), make(8, 96), make(8, 64, block_size=32)
    for x, outputs, message in (
        (torch.zeros(9, 64, dtype=BF16), [o], "m: expected 8 at most, got 9"),
        (torch.zeros(1, 96, dtype=BF16), [odd], "k: expected a multiple of 64 below 2.31, got 96"),
        (torch.zeros(1, 64, dtype=BF16), [small], "block_size: expected a multiple of 64, got 32"),
        (torch.zeros(1, 64), [o], "dtype: expected 1 .bf16. or 2 .fp16., got 0"),
        (torch.zeros(1, 64, dtype=BF16), [], "a list of weights: expected 1 to 16, got 0"),
        (torch.zeros(1, 64, dtype=BF16), [o] * 17, "a list of weights: expected 1 to 16, got 17"),
    ):
        with pytest.raises(ValueError, match=message):
            run(door, x, *outputs)
