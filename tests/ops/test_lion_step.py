"""lion_step and lion_step8: bit for bit the reference, and the reference against the paper's algorithm and bitsandbytes' Lion."""

from __future__ import annotations

import pytest
import torch
from ops.test_adamw_step import COUNTS, DTYPES, State, assert_same, cloned, parameters, state8, state32

import peftk
from peftk.format.dynamic8 import STATE_BLOCK, values8
from peftk.ops import blockwise8_dequantize, blockwise8_quantize, lion_step, lion_step8
from peftk.ops.lion_step import coefficients

HYPER = dict(lr=3e-2, beta1=0.9, beta2=0.99, weight_decay=0.1)


def moment(bits: int, counts: tuple[int, ...], used: bool = True) -> State:
    """Of parameters as they may be after some steps, or fresh."""
    if bits == 32:
        return {"exp_avg": state32(counts)["exp_avg"] if used else [torch.zeros(n) for n in counts]}
    made = state8(counts, used)
    return {name: made[name] for name in ("state1", "absmax1")}


def step(bits: int, state: State, **hyper: float) -> None:
    (lion_step if bits == 32 else lion_step8)(**state, **HYPER | hyper)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_equals_the_reference(implementation, counts, dtype, bits):
    state = parameters(counts, dtype) | moment(bits, counts)
    expected = cloned(state)
    for _ in range(2):
        step(bits, state, grad_factor=-0.5)
        with peftk.use("reference"):
            step(bits, expected, grad_factor=-0.5)
    assert_same(state, expected)


@pytest.mark.parametrize("bits", [32, 8])
def test_zeros_do_not_move_and_nan_shows(implementation, bits):
    state = {"params": [torch.ones(600)], "grads": [torch.randn(600)]} | moment(bits, (600,), used=False)
    state["grads"][0][::3] = 0
    state["grads"][0][7] = float("nan")
    signs = state["grads"][0].sign()
    step(bits, state, weight_decay=0.0)
    p = state["params"][0]
    assert p.isnan().nonzero().tolist() == [[7]]
    p[7] = signs[7] = 0
    assert torch.equal(p, (1 - torch.tensor(HYPER["lr"]) * signs).index_fill(0, torch.tensor(7), 0))


def test_equals_the_paper():
    """Algorithm 2 in fp64: c = b1 m + (1 - b1) g, theta -= lr (sign(c) + decay theta), m = b2 m + (1 - b2) g."""
    state = parameters((1000,)) | moment(32, (1000,))
    p, g, m = (state[name][0].double() for name in ("params", "grads", "exp_avg"))
    for _ in range(3):
        step(32, state)
        c = 0.9 * m + 0.1 * g
        p = p - HYPER["lr"] * (c.sign() + HYPER["weight_decay"] * p)
        m = 0.99 * m + 0.01 * g
    torch.testing.assert_close(state["params"][0].double(), p, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state["exp_avg"][0].double(), m, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("bits", [32, 8])
def test_tracks_bitsandbytes(bits):
    """From equal states, its CPU update; signs agree since no average lies within a rounding of zero."""
    functional = pytest.importorskip("bitsandbytes").functional
    state = parameters((1024,)) | moment(bits, (1024,))
    theirs = cloned(state)
    p, g, (m, *absmax) = (
        theirs["params"][0],
        theirs["grads"][0],
        [t[0] for n, t in theirs.items() if n not in ("params", "grads")],
    )
    lr, decay = HYPER["lr"], HYPER["weight_decay"]
    if bits == 32:
        functional.optimizer_update_32bit("lion", g, p, m, 0.9, 0.0, 5, lr, None, 0.99, 0.0, 0.0, decay)
    else:
        functional.optimizer_update_8bit_blockwise(
            "lion", g, p, m, None, 0.9, 0.99, 0.0, 0.0, 0.0, 5, lr, values8(True), None, *absmax, None, decay
        )
    step(bits, state)
    torch.testing.assert_close(state["params"][0], p, rtol=1e-6, atol=1e-7)
    if bits == 32:
        torch.testing.assert_close(state["exp_avg"][0], m, rtol=1e-6, atol=1e-8)
    else:
        torch.testing.assert_close(state["absmax1"][0], absmax[0], rtol=1e-6, atol=0)


def test_8_bits_start_at_zero():
    state = parameters((1000,)) | moment(8, (1000,), used=False)
    wide = cloned({name: state[name] for name in ("params", "grads")}) | moment(32, (1000,), used=False)
    step(8, state), step(32, wide)
    assert torch.equal(state["params"][0], wide["params"][0])
    codes, absmax = blockwise8_quantize(wide["exp_avg"][0], STATE_BLOCK, True)
    assert torch.equal(state["state1"][0], codes) and torch.equal(state["absmax1"][0], absmax)
    assert blockwise8_dequantize(codes, absmax, STATE_BLOCK).any()


def test_bad_arguments_are_named():
    good = parameters((40, 300)) | moment(32, (40, 300))
    for change, error, message in [
        ({"grads": good["grads"][:1]}, ValueError, r"grads: expected 2 tensors, one for each of params, got 1"),
        ({"exp_avg": [t.bfloat16() for t in good["exp_avg"]]}, TypeError, r"exp_avg\[0\]: expected torch.float32, got"),
        ({"beta2": 1.0}, ValueError, r"beta2: expected a number in \[0, 1\), got 1.0"),
        ({"lr": float("nan")}, ValueError, "lr: expected a finite number, 0 or more, got nan"),
        ({"grad_factor": float("inf")}, ValueError, "grad_factor: expected a finite number, got inf"),
    ]:
        with pytest.raises(error, match=message):
            lion_step(**good | HYPER | change)
    with pytest.raises(ValueError, match=r"absmax1\[0\]: expected a contiguous tensor of shape \(2,\) on cpu, got \(1,\)"):
        lion_step8(**parameters((300,)) | moment(8, (300,)) | {"absmax1": [torch.zeros(1)]}, **HYPER)


def test_there_is_no_gpu_kernel_and_dispatch_says_so():
    with (
        peftk.use("cuda"),
        pytest.raises(RuntimeError, match=r"cuda: this op has no such implementation \(it has cpu, reference\)"),
    ):
        step(32, parameters((40,)) | moment(32, (40,)))


def test_opcheck():
    numbers = list(coefficients(1e-3, 0.9, 0.99, 0.1))
    torch.library.opcheck(torch.ops.peftk.lion_step.default, (*(parameters((40, 300)) | moment(32, (40, 300))).values(), numbers))
    torch.library.opcheck(torch.ops.peftk.lion_step8.default, (*(parameters((40, 300)) | moment(8, (40, 300))).values(), numbers))
