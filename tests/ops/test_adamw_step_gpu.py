"""What the GPU's steps of AdamW have of their own: tables of codes, lists longer than a launch takes, chunks beyond the grid,
addresses that no wide access takes."""

from __future__ import annotations

import pytest
import torch
from emulation import doors
from ops.test_adamw_step import HYPER, State, assert_same, cloned, parameters, state8, state32

import peftk
from bench.static.launches import launched
from peftk.format.dynamic8 import thresholds8, values8
from peftk.ops import adamw_step, adamw_step8, gpu
from peftk.ops.adamw_step.code_tables import REST, SIGNED, UNSIGNED, Buckets

STEPS = {32: (adamw_step, state32), 8: (adamw_step8, state8)}
BITS = pytest.mark.parametrize("bits", list(STEPS))


def looked_up(buckets: Buckets, x: torch.Tensor) -> torch.Tensor:
    """Ranks of |x| among the positive values, as a kernel gets them from a table's words."""
    spare, bits = REST - buckets.shift, x.abs().clamp(min=2.0**buckets.lowest).view(torch.int32).long()
    low = (bits << spare) + (((x.view(torch.int32).long() & 0xFFFFFFFF) >> (32 - spare)) if buckets.signed else 0)
    return ((torch.tensor(buckets.words())[(bits >> buckets.shift) - buckets.first] + low) & 0xFFFFFFFF) >> REST


@pytest.mark.parametrize("buckets", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_every_threshold_is_in_its_bucket(buckets):
    """Each, the numbers next to it on either side, each value, what is smaller than the lowest bucket, and any numbers."""
    t = thresholds8(buckets.signed)
    beside = [torch.nextafter(t, torch.full_like(t, side)) for side in (-2.0, 2.0)]
    x = torch.cat(
        [t, *beside, values8(buckets.signed), torch.tensor([0.0, 1e-30, 1.0]), torch.rand(10_000), torch.rand(10_000) * 1e-4]
    )
    x = torch.cat([x, -x]).clamp(min=values8(True)[0].item()) if buckets.signed else x.abs()
    ranks, codes = looked_up(buckets, x), torch.bucketize(x, t)
    assert torch.equal(torch.where(x.signbit(), 127 - ranks, 127 + ranks) if buckets.signed else ranks, codes)


def test_too_few_mantissa_bits_are_told():
    with pytest.raises(AssertionError, match="two thresholds in bucket"):
        Buckets(True, -22, 18, 1024).words()


def step_through(door: str, bits: int, state: State, **hyper: float) -> State:
    """A step by that door, held against the reference."""
    base = door.partition("-")[0]
    if reason := doors.why_not(door):
        pytest.skip(reason)
    expected = cloned(state)
    step, _ = STEPS[bits]
    with gpu.through(base, doors.door(door)), peftk.use(base):
        step(**state, step=3, **HYPER | hyper)
    with peftk.use("reference"):
        step(**expected, step=3, **HYPER | hyper)
    assert_same(state, expected)
    return state


def made(bits: int, counts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> State:
    return parameters(counts, dtype) | STEPS[bits][1](counts)


@pytest.mark.parametrize("door", ["cuda-host", "cuda-ptx", "triton-ptx"])
def test_ties_go_to_the_lower_code(door):
    """Without momentum m is the gradient: the thresholds of the signed code, and the numbers next to them, below and above 0."""
    t = thresholds8(True)
    grads = torch.stack([torch.nextafter(t, to) for to in (t, torch.full_like(t, 2.0), torch.full_like(t, -2.0))])
    grads = torch.cat([torch.ones(3, 1), grads], dim=1)
    state = {"params": [torch.ones(3, 256)], "grads": [grads]} | state8((768,), used=False)
    state |= {name: [state[name][0].view(3, 256)] for name in ("state1", "state2")}
    step_through(door, 8, state, beta1=0.0)
    assert state["state1"][0][:2, 1:].tolist() == [list(range(255)), list(range(1, 256))]


@BITS
def test_more_tensors_than_a_launch_takes(bits):
    """Every one is stepped once, whatever the place of a list's end; some are empty."""
    step_through("cuda-host", bits, made(bits, tuple(0 if i % 17 == 5 else 1 + i % 40 for i in range(220))))


@BITS
def test_more_chunks_than_blocks(bits):
    """Blocks go on to other chunks and other tensors: the emulated device has two multiprocessors."""
    step_through("cuda-host", bits, made(bits, (20_001, 3, 9_000, 1, 5_000), torch.bfloat16))


def moved(state: State) -> State:
    """The same, each tensor an element away from where torch would have it; absmax, of which one is read at a time, too."""
    return {name: [torch.cat([t[:1], t])[1:] for t in tensors] for name, tensors in state.items()}


@BITS
@pytest.mark.parametrize("door", ["cuda-host", "cuda-ptx", pytest.param("triton-ptx", marks=pytest.mark.full)])
def test_addresses_that_no_wide_access_takes(door, bits):
    step_through(door, bits, moved(made(bits, (700, 5), torch.bfloat16)))


@BITS
def test_groups_of_triton_launches(bits):
    """Small tensors together, a large one and one at an odd address by themselves, an empty one nowhere."""
    if reason := doors.why_not("triton-ptx"):
        pytest.skip(reason)
    state = made(bits, (5, 300, 0, 1 << 20, 7, 9))
    odd = moved(made(bits, (11,)))
    state = {name: [*tensors, *odd[name]] for name, tensors in state.items()}
    kernels = launched(lambda: STEPS[bits][0](**state, step=1, **HYPER))
    own = [[t.numel() for t in launch.arguments[0]] for launch in kernels]
    assert own == [[1 << 20], [11], [5, 300, 7, 9] + [9] * (4 if bits == 32 else 0)]
    assert kernels[2].grid == (4,)
