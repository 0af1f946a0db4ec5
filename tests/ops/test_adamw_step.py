"""adamw_step and adamw_step8: bit for bit the reference, and the reference against torch's and bitsandbytes' AdamW."""

from __future__ import annotations

import pytest
import torch
from numerics import row_scaled

import peftk
from peftk.format.dynamic8 import STATE_BLOCK, values8, zero_code8
from peftk.ops import adamw_step, adamw_step8, blockwise8_dequantize, blockwise8_quantize
from peftk.ops.adamw_step.coefficients import coefficients

HYPER = dict(lr=3e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A vector and its neighbours, nothing at all, blocks and their neighbours; more than one thread's share.
COUNTS = [(1, 15, 16, 17, 0, 33, 255, 256, 257, 5), (4099,)]

State = dict[str, list[torch.Tensor]]


def parameters(counts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> State:
    return {name: [row_scaled(1, n, dtype=dtype).view(-1) for n in counts] for name in ("params", "grads")}


def state32(counts: tuple[int, ...]) -> State:
    return {"exp_avg": [row_scaled(1, n)[0] for n in counts], "exp_avg_sq": [row_scaled(1, n)[0].square() for n in counts]}


def state8(counts: tuple[int, ...], used: bool = True) -> State:
    """Of moments as they may be after some steps, with a block of zeros; or fresh."""
    made: State = {"state1": [], "state2": [], "absmax1": [], "absmax2": []}
    for n in counts:
        for number, signed in (("1", True), ("2", False)):
            x = row_scaled(-(-n // STATE_BLOCK), STATE_BLOCK) * used
            x[1:2] = 0
            codes, absmax = blockwise8_quantize((x if signed else x.square()).view(-1)[:n], STATE_BLOCK, signed)
            made[f"state{number}"].append(codes)
            made[f"absmax{number}"].append(absmax)
    return made


def cloned(state: State) -> State:
    return {name: [t.clone() for t in tensors] for name, tensors in state.items()}


def assert_same(got: State, expected: State) -> None:
    for name, tensors in expected.items():
        for i, (ours, theirs) in enumerate(zip(got[name], tensors, strict=True)):
            assert torch.equal(ours, theirs), f"{name}[{i}]: {(ours != theirs).sum()} of {ours.numel()} differ"


def moments(state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """m and v of the only parameter, decoded."""
    return tuple(
        blockwise8_dequantize(state[f"state{n}"][0], state[f"absmax{n}"][0], STATE_BLOCK, signed=s)
        for n, s in ((1, True), (2, False))
    )


def skip_what_compiles_alike(implementation: str, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """A group of each dtype is another Triton kernel, which takes seconds to compile."""
    if implementation == "triton-ptx" and len(counts) > 1 and dtype != torch.bfloat16:
        pytest.skip("Triton's groups are emulated in bf16; other dtypes as single tensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_equals_the_reference(implementation, counts, dtype):
    skip_what_compiles_alike(implementation, counts, dtype)
    state = parameters(counts, dtype) | state32(counts)
    expected = cloned(state)
    for step in (1, 7):
        adamw_step(**state, step=step, grad_factor=-0.5, **HYPER)
        with peftk.use("reference"):
            adamw_step(**expected, step=step, grad_factor=-0.5, **HYPER)
    assert_same(state, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_8_bits_equal_the_reference(implementation, counts, dtype):
    skip_what_compiles_alike(implementation, counts, dtype)
    state = parameters(counts, dtype) | state8(counts)
    expected = cloned(state)
    for step in (1, 7):
        adamw_step8(**state, step=step, grad_factor=-0.5, **HYPER)
        with peftk.use("reference"):
            adamw_step8(**expected, step=step, grad_factor=-0.5, **HYPER)
    assert_same(state, expected)


def test_8_bits_start_at_zero(implementation):
    """The first step of a fresh state, against the moments that 32 bits have: they are the codes nearest to those."""
    state = parameters((1000,)) | state8((1000,), used=False)
    assert state["state1"][0].unique().tolist() == [zero_code8(True)] and state["state2"][0].unique().tolist() == [0]
    wide = parameters((1000,)) | {"exp_avg": [torch.zeros(1000)], "exp_avg_sq": [torch.zeros(1000)]}
    wide["params"], wide["grads"] = cloned(state)["params"], state["grads"]
    adamw_step8(**state, step=1, **HYPER)
    adamw_step(**wide, step=1, **HYPER)
    assert torch.equal(state["params"][0], wide["params"][0])
    for number, name, signed in ((1, "exp_avg", True), (2, "exp_avg_sq", False)):
        codes, absmax = blockwise8_quantize(wide[name][0], STATE_BLOCK, signed)
        assert torch.equal(state[f"state{number}"][0], codes) and torch.equal(state[f"absmax{number}"][0], absmax)


def test_zeros_do_not_move(implementation):
    """No gradient and no state: no step, in a block with others and in one by itself, for every gradient around them."""
    state = {"params": [torch.randn(700)], "grads": [torch.randn(700)]} | state8((700,), used=False)
    state["grads"][0][::3] = 0
    state["grads"][0][512:] = 0
    before = state["params"][0].clone()
    for step in range(1, 4):
        adamw_step8(**state, step=step, **HYPER | {"weight_decay": 0.0})
    still = state["grads"][0] == 0
    assert torch.equal(state["params"][0][still], before[still]) and bool((state["params"][0] != before)[~still].all())
    m, v = moments(state)
    assert not m[still].any() and not v[still].any() and not m[still].signbit().any()
    assert state["absmax1"][0][2] == 0


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-125, 2.0**-100, 2.0**100])
def test_blocks_of_any_magnitude(implementation, scale):
    """Below 2^-126 a block's moments are zeros: the reciprocal of a denormal absmax may be infinite."""
    state = {"params": [torch.zeros(256)], "grads": [torch.linspace(-1, 1, 256)]} | state8((256,), used=False)
    state["grads"][0][3] = 0
    expected = cloned(state)
    adamw_step8(**state, step=1, grad_factor=scale, **HYPER)
    with peftk.use("reference"):
        adamw_step8(**expected, step=1, grad_factor=scale, **HYPER)
    assert_same(state, expected)
    m, _ = moments(state)
    assert m.isfinite().all() and m[3] == 0 and (state["absmax1"][0] == 0) == (scale < 2.0**-122)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows(implementation, bad):
    state = {"params": [torch.ones(600)], "grads": [torch.ones(600)]} | state8((600,), used=False)
    state["grads"][0][300] = bad
    adamw_step8(**state, step=1, **HYPER)
    assert [bool(p) for p in (state["params"][0].isfinite().logical_not())] == [i == 300 for i in range(600)]
    assert [bool(a) for a in state["absmax1"][0].isfinite()] == [True, False, True]


def test_equals_torch():
    """Three steps of torch's AdamW: what is left is the rounding of 1 / sqrt(1 - beta2^t), of FMAs and of their order."""
    counts = (1000, 77)
    state = parameters(counts) | {name: [torch.zeros(n) for n in counts] for name in ("exp_avg", "exp_avg_sq")}
    theirs = [torch.nn.Parameter(p.clone()) for p in state["params"]]
    options = dict(lr=HYPER["lr"], betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    optimizers = [torch.optim.AdamW(theirs, foreach=False, fused=False, **options)]
    for step in (1, 2, 3):
        before = [p.detach().clone() for p in theirs]
        for ours, p in zip(state["params"], before, strict=True):
            ours.copy_(p)
        for p, g in zip(theirs, state["grads"], strict=True):
            p.grad = g.clone()
        optimizers[0].step()
        adamw_step(**state, step=step, **HYPER)
        for ours, p, old in zip(state["params"], theirs, before, strict=True):
            ulp = torch.maximum(p.detach().abs(), old.abs()).clamp(min=HYPER["lr"]) * 2**-23
            assert ((ours - p).abs() <= 2 * ulp).all()


def test_tracks_bitsandbytes_in_8_bits():
    """From equal states, its CPU update to a few roundings; its codes are looked up by an approximation, ours are nearest."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    count = 1024
    state = parameters((count,)) | state8((count,))
    theirs = cloned(state)
    maps = values8(True), values8(False)
    bitsandbytes.functional.optimizer_update_8bit_blockwise(
        "adam", theirs["grads"][0], theirs["params"][0], theirs["state1"][0], theirs["state2"][0], 0.9, 0.99, 0.0, 0.0, 1e-8, 5,
        HYPER["lr"], *maps, theirs["absmax1"][0], theirs["absmax2"][0], 0.1, 1.0, False,
    )  # fmt: skip
    adamw_step8(**state, step=5, **HYPER)
    torch.testing.assert_close(state["params"][0], theirs["params"][0], rtol=1e-5, atol=1e-6)
    for name in ("absmax1", "absmax2"):
        torch.testing.assert_close(state[name][0], theirs[name][0], rtol=1e-6, atol=0)


def test_any_number_of_threads():
    state = parameters((100_003, 5, 2_000)) | state8((100_003, 5, 2_000))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(cloned(state))
            adamw_step8(**results[-1], step=2, **HYPER)
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_bad_arguments_are_named():
    good = parameters((40, 300)) | state32((40, 300))
    for change, error, message in [
        ({"grads": good["grads"][:1]}, ValueError, r"grads: expected 2 tensors, one for each of params, got 1"),
        ({"grads": [good["grads"][0], good["grads"][1].half()]}, TypeError, r"grads\[1\]: expected torch.float32, got"),
        ({"exp_avg": [t.bfloat16() for t in good["exp_avg"]]}, TypeError, r"exp_avg\[0\]: expected torch.float32, got"),
        ({"exp_avg_sq": good["exp_avg_sq"][::-1]}, ValueError, r"exp_avg_sq\[0\]: expected a contiguous tensor of shape \(40,\)"),
        ({"step": 0}, ValueError, "step: expected the number of this step, 1 or more, got 0"),
        ({"beta1": 1.0}, ValueError, r"beta1: expected a number in \[0, 1\), got 1.0"),
        ({"lr": float("nan")}, ValueError, "lr: expected a finite number, 0 or more, got nan"),
        ({"grad_factor": float("inf")}, ValueError, "grad_factor: expected a finite number, got inf"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            adamw_step(**good | {"step": 1} | HYPER | change)
    eight = parameters((300,)) | state8((300,))
    with pytest.raises(ValueError, match=r"absmax2\[0\]: expected a contiguous tensor of shape \(2,\) on cpu, got \(1,\)"):
        adamw_step8(**eight | {"absmax2": [torch.zeros(1)]}, step=1, **HYPER)
    with pytest.raises(TypeError, match=r"state1\[0\]: expected torch.uint8, got torch.int8"):
        adamw_step8(**eight | {"state1": [torch.zeros(300, dtype=torch.int8)]}, step=1, **HYPER)


def test_opcheck():
    numbers = list(coefficients(2, 1e-3, 0.9, 0.99, 1e-8, 0.1))
    torch.library.opcheck(torch.ops.peftk.adamw_step.default, (*(parameters((40, 300)) | state32((40, 300))).values(), numbers))
    torch.library.opcheck(torch.ops.peftk.adamw_step8.default, (*(parameters((40, 300)) | state8((40, 300))).values(), numbers))
