"""ademamix_step and ademamix_step8: bit for bit the reference, which is held against the paper's algorithm and bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from ops.test_adamw_step import COUNTS, DTYPES, State, assert_same, cloned, parameters, state8, state32

import peftk
from peftk.format.dynamic8 import STATE_BLOCK, values8
from peftk.ops import adamw_step, ademamix_step, ademamix_step8, blockwise8_quantize
from peftk.ops.ademamix_step import coefficients

HYPER = dict(lr=3e-2, beta1=0.9, beta2=0.99, beta3=0.999, alpha=5.0, eps=1e-8, weight_decay=0.1)
SIGNED = {"1": True, "2": False, "3": True}
NAMES = {"exp_avg": "1", "exp_avg_sq": "2", "exp_avg_slow": "3"}


def moments(bits: int, counts: tuple[int, ...], used: bool = True) -> State:
    """Of parameters as they may be after some steps, or fresh."""
    if bits == 32:
        made = state32(counts) | {"exp_avg_slow": state32(counts)["exp_avg"]}
        return made if used else {name: [torch.zeros_like(t) for t in tensors] for name, tensors in made.items()}
    made, slow = state8(counts, used), state8(counts, used)
    made |= {"state3": slow["state1"], "absmax3": slow["absmax1"]}
    return {f"{kind}{number}": made[f"{kind}{number}"] for kind in ("state", "absmax") for number in SIGNED}


def step(bits: int, state: State, **hyper: float) -> None:
    (ademamix_step if bits == 32 else ademamix_step8)(**state, **HYPER | hyper)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_equals_the_reference(implementation, counts, dtype, bits):
    state = parameters(counts, dtype) | moments(bits, counts)
    expected = cloned(state)
    for number in (1, 7):
        step(bits, state, step=number, grad_factor=-0.5)
        with peftk.use("reference"):
            step(bits, expected, step=number, grad_factor=-0.5)
    assert_same(state, expected)


@pytest.mark.parametrize("bits", [32, 8])
def test_zeros_do_not_move(implementation, bits):
    state = {"params": [torch.ones(600)], "grads": [torch.randn(600)]} | moments(bits, (600,), used=False)
    state["grads"][0][::3] = 0
    for number in (1, 2):
        step(bits, state, step=number, weight_decay=0.0)
    assert torch.equal(state["params"][0] == 1, state["grads"][0] == 0)


def test_equals_the_paper():
    """Algorithm 1 in fp64."""
    state = parameters((1000,)) | moments(32, (1000,), used=False)
    p, g = (state[name][0].double() for name in ("params", "grads"))
    m1, m2, nu = (torch.zeros_like(p) for _ in range(3))
    for number in (1, 2, 3):
        step(32, state, step=number)
        m1, m2, nu = 0.9 * m1 + 0.1 * g, 0.999 * m2 + 0.001 * g, 0.99 * nu + 0.01 * g**2
        corrected, root = m1 / (1 - 0.9**number), (nu / (1 - 0.99**number)).sqrt()
        p = p - HYPER["lr"] * ((corrected + HYPER["alpha"] * m2) / (root + HYPER["eps"]) + HYPER["weight_decay"] * p)
    torch.testing.assert_close(state["params"][0].double(), p, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["exp_avg_slow"][0].double(), m2, rtol=1e-5, atol=1e-9)


def test_without_alpha_it_is_adamw():
    state = parameters((1000,)) | moments(32, (1000,))
    plain = cloned({name: tensors for name, tensors in state.items() if name != "exp_avg_slow"})
    step(32, state, step=4, alpha=0.0)
    adamw_step(**plain, step=4, **{name: HYPER[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay")})
    assert_same(state, plain)


@pytest.mark.parametrize("bits", [32, 8])
def test_tracks_bitsandbytes(bits):
    """From equal states, its CPU update to a few roundings."""
    functional = pytest.importorskip("bitsandbytes").functional
    count = 1024
    state = parameters((count,)) | moments(bits, (count,))
    theirs = cloned(state)
    p, g = theirs["params"][0], theirs["grads"][0]
    beta1, beta2, beta3, alpha, eps, lr, decay = (
        HYPER[name] for name in ("beta1", "beta2", "beta3", "alpha", "eps", "lr", "weight_decay")
    )
    if bits == 32:
        both = torch.stack([theirs["exp_avg"][0], theirs["exp_avg_slow"][0]])
        nu = theirs["exp_avg_sq"][0]
        functional.optimizer_update_32bit("ademamix", g, p, both, beta1, eps, 5, lr, nu, beta2, beta3, alpha, decay)
    else:
        codes = torch.stack([theirs["state1"][0], theirs["state3"][0]])
        absmax = torch.stack([theirs["absmax1"][0], theirs["absmax3"][0]])
        functional.optimizer_update_8bit_blockwise(
            "ademamix", g, p, codes, theirs["state2"][0], beta1, beta2, beta3, alpha, eps, 5, lr, values8(True), values8(False),
            absmax, theirs["absmax2"][0], decay,
        )  # fmt: skip
    step(bits, state, step=5)
    torch.testing.assert_close(state["params"][0], p, rtol=1e-5, atol=1e-6)
    if bits == 32:
        for name, other in (("exp_avg", both[0]), ("exp_avg_slow", both[1]), ("exp_avg_sq", nu)):
            torch.testing.assert_close(state[name][0], other, rtol=1e-5, atol=1e-8)
    else:
        for name, other in (("absmax1", absmax[0]), ("absmax3", absmax[1]), ("absmax2", theirs["absmax2"][0])):
            torch.testing.assert_close(state[name][0], other, rtol=1e-6, atol=0)


def test_8_bits_start_at_zero():
    state = parameters((1000,)) | moments(8, (1000,), used=False)
    wide = cloned({name: state[name] for name in ("params", "grads")}) | moments(32, (1000,), used=False)
    step(8, state, step=1), step(32, wide, step=1)
    assert torch.equal(state["params"][0], wide["params"][0])
    for name, number in NAMES.items():
        codes, absmax = blockwise8_quantize(wide[name][0], STATE_BLOCK, SIGNED[number])
        assert torch.equal(state[f"state{number}"][0], codes) and torch.equal(state[f"absmax{number}"][0], absmax), name


def test_bad_arguments_are_named():
    good = parameters((40, 300)) | moments(32, (40, 300))
    for change, error, message in [
        ({"exp_avg_slow": good["exp_avg"][:1]}, ValueError, r"exp_avg_slow: expected 2 tensors, one for each of params, got 1"),
        ({"exp_avg_sq": good["exp_avg"][::-1]}, ValueError, r"exp_avg_sq\[0\]: expected a contiguous tensor of shape \(40,\)"),
        ({"step": 0}, ValueError, "step: expected the number of this step, 1 or more, got 0"),
        ({"beta3": 1.0}, ValueError, r"beta3: expected a number in \[0, 1\), got 1.0"),
        ({"alpha": -1.0}, ValueError, "alpha: expected a finite number, 0 or more, got -1.0"),
        ({"grad_factor": float("inf")}, ValueError, "grad_factor: expected a finite number, got inf"),
    ]:
        with pytest.raises(error, match=message):
            ademamix_step(**good | {"step": 1} | HYPER | change)
    with pytest.raises(TypeError, match=r"state3\[0\]: expected torch.uint8, got torch.int8"):
        eight = parameters((300,)) | moments(8, (300,))
        ademamix_step8(**eight | {"state3": [torch.zeros(300, dtype=torch.int8)]}, step=1, **HYPER)


def test_opcheck():
    numbers = list(coefficients(2, 1e-3, 0.9, 0.99, 0.999, 5.0, 1e-8, 0.1))
    for bits, op in ((32, torch.ops.peftk.ademamix_step.default), (8, torch.ops.peftk.ademamix_step8.default)):
        torch.library.opcheck(op, (*(parameters((40, 300)) | moments(bits, (40, 300))).values(), numbers))
