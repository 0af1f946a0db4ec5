"""nf4_linear_tile, the tensor-core forward for any number of rows of x, door by door: against fp64, and its traffic."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from emulation.cuda_host.door import HostDoor, PtxDoor
from numerics import assert_no_worse_than_twice_plain, row_scaled

import peftk
from peftk.format.code4 import code4
from peftk.native import NATIVE_DTYPE

DOORS = {"cuda-host": HostDoor, "cuda-ptx": PtxDoor}
SCALE = 0.5
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(params=DOORS)
def door(request):
    return usable(DOORS[request.param]())


def usable(door):
    if why := door.why_not():
        pytest.skip(why)
    return door


@dataclass
class Case:
    """One weight of a list, and what goes with it."""

    n: int
    r: int | None = None
    bias: bool = False
    split: int = 1
    double_quant: bool = True
    quant_type: str = "nf4"
    block_size: int = 64

    def make(self, k: int, m: int, dtype: torch.dtype) -> Made:
        w4 = peftk.quantize_nf4(
            row_scaled(self.n, k), self.block_size, double_quant=self.double_quant, quant_type=self.quant_type
        )
        s, b = (None, None) if self.r is None else (torch.randn(m, self.r).to(dtype), torch.randn(self.n, self.r).to(dtype))
        bias = torch.randn(self.n).to(dtype) if self.bias else None
        return Made(self, w4, s, b, bias, torch.full((m, self.n), float("nan"), dtype=dtype))


@dataclass
class Made:
    case: Case
    w4: peftk.NF4Weight
    s: torch.Tensor | None
    b: torch.Tensor | None
    bias: torch.Tensor | None
    y: torch.Tensor

    def argument(self) -> tuple:
        r = 0 if self.s is None else self.s.shape[1]
        w4 = self.w4
        constants = (w4.packed, w4.absmax, w4.absmax_scale, w4.absmax_offset)
        weight = (*constants, self.case.n, w4.block_size, code4(w4.quant_type).number)
        return (weight, self.bias, self.y, self.s, self.b, r, SCALE, self.case.split)

    def product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Plainly, in ``dtype``; W is rounded to it."""
        y = x.to(dtype) @ self.w4.dequantize(torch.float32).to(dtype).T
        if self.s is not None:
            y = y + SCALE * (self.s.to(dtype) @ self.b.to(dtype).T)
        return y if self.bias is None else y + self.bias.to(dtype)

    def check(self, x: torch.Tensor) -> None:
        assert_no_worse_than_twice_plain(self.y, self.product(x, x.dtype), self.product(x, torch.float64))


def run(door, x: torch.Tensor, made: list[Made], tokens: int, with_partial: bool = True) -> None:
    m, k = x.shape
    size = sum(one.case.split * m * one.case.n for one in made if one.case.split > 1)
    partial = torch.full((size,), float("nan")) if size and with_partial else None
    door.call("nf4_linear_tile", [one.argument() for one in made], k, x, x.stride(0), m, NATIVE_DTYPE[x.dtype], tokens, partial)


def rows(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Not contiguous, rows on 16 bytes."""
    return torch.randn(m, k + 8).to(dtype)[:, :k]


# tokens, m, k, dtype, weight. Every tile, and over them every value of every other axis.
CASES = [
    (16, 9, 128, BF16, Case(128)),
    (16, 16, 64, FP16, Case(130, r=16, bias=True, double_quant=False)),
    (16, 33, 576, BF16, Case(7, r=1, bias=True, split=2, quant_type="fp4")),
    (32, 17, 320, FP16, Case(136, r=8, split=3, block_size=4096)),
    (32, 65, 192, BF16, Case(49, bias=True, double_quant=False, block_size=128)),
    (64, 130, 128, FP16, Case(64, r=5, bias=True, quant_type="fp4", double_quant=False)),
    (64, 60, 640, BF16, Case(256, r=64, block_size=128)),
    (128, 130, 192, BF16, Case(131, r=5, bias=True)),
    (128, 128, 256, FP16, Case(72, r=64, split=4, bias=True, block_size=4096, double_quant=False)),
    (128, 1, 64, BF16, Case(1, r=8, split=2, bias=True)),
]


@pytest.mark.parametrize("tokens, m, k, dtype, case", CASES, ids=lambda value: str(value).replace("torch.", ""))
def test_is_as_near_to_fp64_as_a_plain_product(door, tokens, m, k, dtype, case):
    x, made = rows(m, k, dtype), case.make(k, m, dtype)
    run(door, x, [made], tokens)
    made.check(x)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_inputs_with_a_mean(dtype, quant_type):
    """A code rounded to 16 bits is off by the same in every weight that has it; x of one sign piles that up over k."""
    door, k, m = usable(PtxDoor()), 4096, 9
    x = torch.randn(m, k).abs().to(dtype)
    made = Case(32, quant_type=quant_type).make(k, m, dtype)
    run(door, x, [made], 16)
    plain, truth = x.float() @ made.w4.dequantize(torch.float32).to(dtype).float().T, made.product(x, torch.float64)
    assert_no_worse_than_twice_plain(made.y, plain.to(dtype), truth)


def test_a_list_is_as_its_weights_one_by_one(door):
    k, m, tokens = 256, 20, 16
    x = rows(m, k, BF16)
    cases = [
        Case(130, r=8, bias=True, split=2), Case(64, double_quant=False), Case(5, r=3, quant_type="fp4", split=4),
        Case(128, bias=True, block_size=256),
    ]  # fmt: skip
    made = [case.make(k, m, BF16) for case in cases]
    run(door, x, made, tokens)
    together = [one.y.clone() for one in made]
    for one, y in zip(made, together, strict=True):
        one.check(x)
        one.y.fill_(float("nan"))
        run(door, x, [one], tokens)
        assert torch.equal(one.y, y)


def test_sixteen_weights_in_one_launch():
    door, x = usable(PtxDoor()), rows(9, 64, FP16)
    made = [Case(1 + i).make(64, 9, FP16) for i in range(16)]
    run(door, x, made, 16)
    assert len(door.reports) == 1
    for one in made:
        one.check(x)


def test_many_tiles_of_tokens_take_turns_together(door):
    """More than kTogether of them, the last group partly full."""
    x, made = rows(16 * 10 - 3, 64, BF16), [Case(130), Case(8)]
    made = [case.make(64, x.shape[0], BF16) for case in made]
    run(door, x, made, 16)
    for one in made:
        one.check(x)


def test_more_runs_than_steps(door):
    x = rows(9, 128, BF16)
    made = Case(16, r=4, bias=True, split=5).make(128, 9, BF16)
    run(door, x, [made], 16)
    made.check(x)


def test_no_rows(door):
    """Nothing is launched: a grid of no blocks is an error."""
    made = Case(16, split=2).make(64, 0, BF16)
    run(door, rows(0, 64, BF16), [made], 16)
    assert made.y.shape == (0, 16) and not getattr(door, "reports", [])


def test_a_bad_constant_spoils_its_own_row_alone(door):
    k, m = 192, 9
    x, made = rows(m, k, BF16), Case(40, double_quant=False).make(k, m, BF16)
    run(door, x, [made], 16)
    expected = made.y.clone()
    made.w4.absmax[3 * (k // 64) + 1], made.w4.absmax[20 * (k // 64)] = float("nan"), float("inf")
    run(door, x, [made], 16)
    spoilt = torch.zeros(40, dtype=torch.bool)
    spoilt[[3, 20]] = True
    assert made.y[:, 3].isnan().all() and not made.y[:, 20].isfinite().any()
    assert torch.equal(made.y[:, ~spoilt], expected[:, ~spoilt])


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
def test_bytes_and_banks(tokens):
    """Packed bytes and x cross once, in 128-bit copies; W is not written; no two lanes meet in a bank of shared memory."""
    door, k, m = usable(PtxDoor(traffic=True)), 256, tokens
    x, made = rows(m, k, BF16), Case(128, bias=True, double_quant=False).make(k, m, BF16)
    packed, absmax = made.w4.packed.clone(), made.w4.absmax.clone()
    run(door, x, [made], tokens)
    ((_, report),) = door.reports
    wide = {key[:2]: count * 16 for key, count in report.accesses.items() if key[0] == "global" and key[2] == 16}
    assert wide == {("global", "load"): packed.numel() + 2 * x.numel(), ("global", "store"): 2 * made.y.numel()}
    assert report.bytes_stored["global"] == 2 * made.y.numel()
    assert torch.equal(made.w4.packed, packed) and torch.equal(made.w4.absmax, absmax)
    assert report.traffic.conflicts == 0


@pytest.mark.parametrize("change, message", [
    ({"tokens": 24}, "tokens: expected 16, 32, 64 or 128, got 24"),
    ({"dtype": torch.float32}, r"dtype: expected 1 \(bf16\) or 2 \(fp16\), got 0"),
    ({"k": 96, "block_size": 4096}, r"k: expected a multiple of 64 below 2\^29, got 96"),
    ({"block_size": 32}, "block_size: expected 64 or more, got 32"),
    ({"split": 2, "partial": False}, "split: expected 1 where there is no room for partial sums, got 2"),
    ({"split": 0}, "split: expected 1 or more, got 0"),
    ({"weights": 17}, "a list of weights: expected 1 to 16"),
])  # fmt: skip
def test_refuses(change, message):
    door = usable(HostDoor())
    given = {"tokens": 16, "dtype": BF16, "k": 64, "block_size": 64, "weights": 1, "split": 1, "partial": True}
    given |= change
    made = Case(8, split=given["split"], block_size=given["block_size"]).make(given["k"], 9, given["dtype"])
    with pytest.raises(ValueError, match=message):
        run(door, rows(9, given["k"], given["dtype"]), [made] * given["weights"], given["tokens"], given["partial"])
