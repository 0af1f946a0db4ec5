"""What holds of every op on any input: implementations agree, threads change nothing, and its own algebra."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given

import peftk
from peftk.native import native
from peftk.ops import (
    adamw_step,
    adamw_step8,
    ademamix_step,
    ademamix_step8,
    blockwise8_dequantize,
    blockwise8_quantize,
    lion_step,
    lion_step8,
    lora_linear,
    nf4_dequantize,
    nf4_linear,
    nf4_linear_int8,
    nf4_lora_linear,
    nf4_lora_linear_rows,
    nf4_quantize,
    philox_dropout,
    quantize_nf4,
)
from tests.reliability import strategies as s

TESTED: set[str] = set()
pytestmark = pytest.mark.skipif(native() is None, reason="one implementation agrees with itself")


def about(*ops: str) -> Callable:
    """Says which ops a property is about: the last test asks for all of them."""

    def note(test: Callable) -> Callable:
        TESTED.update(ops)
        return test

    return note


@contextlib.contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(found: Any) -> Any:
    if isinstance(found, torch.Tensor):
        return found.dtype, tuple(found.shape), found.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
    return [bits(one) for one in found]


def assert_same_everywhere(call: Callable[[], Any], threads: int) -> Any:
    """Bit for bit on every instruction set of this machine, the reference, and any number of threads; what it is."""
    found = call()
    expected = bits(found)
    for name in ("reference", *(f"cpu-{tier}" for tier in native().available_tiers())):
        with peftk.use(name):
            assert bits(call()) == expected, name
    with on_threads(threads):
        assert bits(call()) == expected, f"{threads} threads"
    return found


def assert_close_everywhere(call: Callable[[], torch.Tensor], truth: torch.Tensor, threads: int) -> None:
    """Products: every implementation is near the fp64 truth in x.dtype, and each is the same on any number of threads."""
    for name in ("reference", *(f"cpu-{tier}" for tier in native().available_tiers())):
        with peftk.use(name):
            y = call()
            with on_threads(threads):
                assert bits(call()) == bits(y), name
        allowed = 4 * torch.finfo(y.dtype).eps * truth.norm() + 1e-30
        assert (y.double() - truth).norm() <= allowed, name


@about("nf4_quantize", "nf4_dequantize")
@s.examples(12)
@given(s.rows, s.sizes, s.block_sizes, s.dtypes, s.kinds, s.quant_types, s.threads, s.seeds)
def test_codes_of_4_bits(n, k, block_size, dtype, kind, quant_type, threads, seed):
    w = s.values((n, k), kind, seed, dtype)
    packed, absmax = assert_same_everywhere(lambda: nf4_quantize(w, block_size, quant_type), threads)
    blocks = w.float().view(-1).split(block_size)
    assert absmax.tolist() == [block.abs().max().item() for block in blocks]
    w4 = quantize_nf4(w, block_size, False, quant_type=quant_type)
    back = assert_same_everywhere(
        lambda: nf4_dequantize(*w4.tensors(), w4.shape, w4.block_size, w4.quant_type, torch.float32), threads
    )
    for block, decoded in zip(blocks, back.view(-1).split(block_size), strict=True):
        assert ((block - decoded).abs() <= 0.3 * block.abs().max() + 1e-44).all()
    # scaling by a power of two scales the constants alone
    again, doubled = nf4_quantize(w.float() * 2, block_size, quant_type)
    if kind != "large" and kind != "subnormal":
        assert torch.equal(again, packed) and torch.equal(doubled, 2 * absmax)


@about("quantize_nf4")
@s.examples(10)
@given(s.rows, s.sizes, s.block_sizes, s.dtypes, s.kinds, s.quant_types, s.threads, s.seeds)
def test_a_weight_and_its_state_dict(n, k, block_size, dtype, kind, quant_type, threads, seed):
    w = s.values((n, k), kind, seed, dtype)
    for double_quant in (False, True) if kind != "large" else (False,):
        w4 = quantize_nf4(w, block_size, double_quant, quant_type=quant_type)
        parts = assert_same_everywhere(
            lambda d=double_quant: [t for t in quantize_nf4(w, block_size, d, quant_type=quant_type).tensors() if t is not None],
            threads,
        )
        assert bits(parts) == bits([t for t in w4.tensors() if t is not None])
        state = w4.state_dict("a.")
        again = peftk.NF4Weight.from_state_dict(state, "a.")
        assert bits(list(again.state_dict("a.").values())) == bits(list(state.values()))
        assert bits(again.dequantize()) == bits(w4.dequantize())


@about("blockwise8_quantize", "blockwise8_dequantize")
@s.examples(12)
@given(s.rows, s.sizes, s.dtypes, s.kinds, s.threads, s.seeds)
def test_codes_of_8_bits(n, k, dtype, kind, threads, seed):
    for signed in (True, False):
        x = s.values((n, k), kind, seed, dtype)
        x = x if signed else x.abs()
        codes, absmax = assert_same_everywhere(lambda x=x, t=signed: blockwise8_quantize(x, 64, t), threads)
        back = assert_same_everywhere(lambda c=codes, a=absmax, t=signed: blockwise8_dequantize(c, a, 64, signed=t), threads)
        assert (back[x == 0] == 0).all() and (back.abs() <= x.float().abs().max()).all()
        # what was decoded is coded as it was, but for a block whose largest element is negative: the code has 1 and no -1
        if not signed:
            assert torch.equal(blockwise8_dequantize(*blockwise8_quantize(back, 64, False), 64, signed=False), back)


@about("nf4_linear")
@s.examples(10)
@given(s.rows, s.rows, s.sizes, s.block_sizes, s.dtypes, s.threads, s.seeds)
def test_a_product_with_4_bits(m, n, k, block_size, dtype, threads, seed):
    x, bias = s.values((m, k), "gaussian", seed, dtype), s.values((n,), "gaussian", seed + 1, dtype)
    w4 = quantize_nf4(s.values((n, k), "scales", seed + 2, dtype), block_size)
    W = w4.dequantize(torch.float32).double()
    assert_close_everywhere(lambda: nf4_linear(x, w4, bias), x.double() @ W.T + bias.double(), threads)
    y = nf4_linear(x, w4, bias)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    assert bits(nf4_linear(x[order], w4, bias)) == bits(y[order])  # a row knows nothing of the others
    once, twice = nf4_linear(x, w4), nf4_linear(2 * x, w4)
    normal = once.abs() >= torch.finfo(dtype).smallest_normal
    assert bits(twice[normal]) == bits(2 * once[normal])  # linear, exactly for powers of two, but for what rounds below normal
    assert bits(nf4_linear(torch.zeros_like(x), w4, bias)) == bits(bias.expand(m, n))


@about("nf4_linear_int8")
@s.examples(8)
@given(s.rows, s.rows, s.sizes, s.dtypes, s.threads, s.seeds)
def test_a_product_with_8_bit_activations(m, n, k, dtype, threads, seed):
    x = s.values((m, k), "gaussian", seed, dtype)
    w4 = quantize_nf4(s.values((n, k), "scales", seed + 2, dtype), 64)
    y = nf4_linear_int8(x, w4)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    assert bits(nf4_linear_int8(x[order], w4)) == bits(y[order])
    assert bits(nf4_linear_int8(2 * x, w4)) == bits(2 * y)
    with on_threads(threads):
        assert bits(nf4_linear_int8(x, w4)) == bits(y)
    exact = x.double() @ w4.dequantize(torch.float32).double().T
    assert (y.double() - exact).norm() <= 0.05 * (x.double().norm() * w4.dequantize(torch.float32).double().norm())


@about("lora_linear", "nf4_lora_linear")
@s.examples(8)
@given(s.rows, s.rows, s.sizes, s.sizes, s.dtypes, s.threads, s.seeds)
def test_low_rank_branches(m, n, k, r, dtype, threads, seed):
    x, A, B = (s.values(shape, "gaussian", seed + i, dtype) for i, shape in enumerate([(m, k), (r, k), (n, r)]))
    A, B = A / k**0.5, B / r**0.5
    w4 = quantize_nf4(s.values((n, k), "gaussian", seed + 3, dtype) / k**0.5, 64)
    W = w4.dequantize()
    X, branch = x.double(), A.double().T @ B.double().T
    for weight, call in ((W, lora_linear), (w4, nf4_lora_linear)):
        dense = (W if weight is W else w4.dequantize(torch.float32)).double()
        truth = X @ dense.T + 0.5 * X @ branch
        assert_close_everywhere(lambda c=call, w=weight: c(x, w, A, B, 0.5), truth, threads)
        y = call(x, weight, A, B, 0.5)
        zero = call(x, weight, A, torch.zeros_like(B), 0.5)
        order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
        assert bits(call(x[order], weight, A, B, 0.5)) == bits(y[order])
        assert (zero.double() - X @ dense.T).norm() <= 4 * torch.finfo(dtype).eps * truth.norm() + 1e-30
        assert bits(call(x, weight, A, B, 0.5, dropout=0.4, seed=seed)) == bits(
            call(x, weight, A, B, 0.5, dropout=0.4, seed=seed)
        )


@about("nf4_lora_linear_rows")
@s.examples(8)
@given(s.rows, s.rows, s.sizes, s.dtypes, s.threads, s.seeds)
def test_an_adapter_a_row(m, n, k, dtype, threads, seed):
    """Near the truth, the same whoever else is in the batch, and without an adapter the base's product bit for bit."""
    ranks = (3, 8)
    x = s.values((m, k), "gaussian", seed, dtype)
    w4 = quantize_nf4(s.values((n, k), "gaussian", seed + 3, dtype) / k**0.5, 64)
    A = [s.values((r, k), "gaussian", seed + r, dtype) / k**0.5 for r in ranks]
    B = [s.values((n, r), "gaussian", seed + 10 + r, dtype) / r**0.5 for r in ranks]
    index = [i % 3 - 1 for i in range(m)]
    truth = x.double() @ w4.dequantize(torch.float32).double().T
    for i, g in enumerate(index):
        if g >= 0:
            truth[i] += 0.5 * B[g].double() @ (A[g].double() @ x[i].double())
    assert_close_everywhere(lambda: nf4_lora_linear_rows(x, w4, A, B, [0.5, 0.5], index), truth, threads)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    y = nf4_lora_linear_rows(x, w4, A, B, [0.5, 0.5], index)
    assert bits(nf4_lora_linear_rows(x[order], w4, A, B, [0.5, 0.5], [index[i] for i in order])) == bits(y[order])
    assert bits(nf4_lora_linear_rows(x, w4, A, B, [0.5, 0.5], [-1] * m)) == bits(nf4_linear(x, w4))


@about("philox_dropout")
@s.examples(10)
@given(s.rows, s.sizes, s.dtypes, s.kinds, s.threads, s.seeds)
def test_dropout(n, k, dtype, kind, threads, seed):
    x = s.values((n, k), kind, seed, dtype)
    y = assert_same_everywhere(lambda: philox_dropout(x, 0.25, seed), threads)
    kept = philox_dropout(torch.ones(n, k), 0.25, seed) != 0
    assert (y[~kept] == 0).all() and bits(philox_dropout(x, 0.0, seed)) == bits(x)
    # the mask is a function of seed and place
    assert torch.equal(philox_dropout(torch.ones(n * k), 0.25, seed).view(n, k) != 0, kept)


STEPS: dict[str, tuple[Callable, int, dict[str, Any]]] = {
    "adamw_step": (adamw_step, 2, {"step": 3}),
    "ademamix_step": (ademamix_step, 3, {"step": 3}),
    "lion_step": (lion_step, 1, {}),
    "adamw_step8": (adamw_step8, 2, {"step": 3}),
    "ademamix_step8": (ademamix_step8, 3, {"step": 3}),
    "lion_step8": (lion_step8, 1, {}),
}
UNSIGNED = {1}  # of the moments, the square


@about(*STEPS)
@pytest.mark.parametrize("name", STEPS)
@s.examples(6)
@given(s.rows, s.sizes, s.dtypes, s.kinds, s.threads, s.seeds)
def test_a_step_of_an_optimizer(name, n, k, dtype, kind, threads, seed):
    step, count, facts = STEPS[name]
    shapes = [(n, k), (k,), (1,)]
    params, grads = ([s.values(shape, "gaussian" if i else kind, seed + i, dtype) for shape in shapes] for i in range(2))
    wide = [[s.values(shape, "gaussian", seed + 9 + j).abs() for shape in shapes] for j in range(count)]
    coded = [[blockwise8_quantize(t, 256, j not in UNSIGNED) for t in tensors] for j, tensors in enumerate(wide)]

    def run(only: int | None = None) -> list[torch.Tensor]:
        lists = wide
        if name.endswith("8"):
            lists = [[codes for codes, _ in tensors] for tensors in coded] + [[a for _, a in tensors] for tensors in coded]
        chosen = [tensors if only is None else tensors[only : only + 1] for tensors in (params, grads, *lists)]
        new = [[tensor.clone() for tensor in tensors] for tensors in chosen]
        step(*new, lr=1e-3, **facts)
        return [tensor for tensors in (new[0], *new[2:]) for tensor in tensors]

    together = assert_same_everywhere(run, threads)
    for i in range(len(shapes)):  # a tensor knows nothing of the others
        assert bits(run(i)) == bits(together[i :: len(shapes)])


def test_every_op_has_a_property():
    assert TESTED == set(peftk.ops.__all__) - {"explain"}, "a new op needs a property above"
