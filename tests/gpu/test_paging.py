"""Unified memory and its fallback on a real device: the driver's own calls, values, the budget."""

from __future__ import annotations

import gc

import pytest
import torch

from peftk.paging import Pager
from peftk.paging.driver import installed_driver
from peftk.paging.staged import StagedStore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
BUDGET = 32 << 20


def staged() -> Pager:
    device = torch.device("cuda", torch.cuda.current_device())
    stream = lambda: torch.cuda.current_stream(device).cuda_stream  # noqa: E731
    return Pager(device, BUDGET, store=StagedStore(installed_driver(device.index), BUDGET, stream, device))


@pytest.mark.parametrize("make", [lambda: Pager("cuda", BUDGET), staged], ids=["as the device is", "pinned buffers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
def test_steps_through_twice_the_budget(make, dtype: torch.dtype):
    pager = make()
    states = [pager.empty(BUDGET // 2 // dtype.itemsize, dtype) for _ in range(4)]
    assert all(state.is_cuda and not state.any() for state in states)
    groups = [[piece] for state in states for piece in state.split(BUDGET // 4 // dtype.itemsize)]
    for _ in range(4):
        for group, following in zip(groups, [*groups[1:], groups[0]], strict=True):
            with pager.resident(group, upcoming=following) as here:
                here[0].add_(1)
    assert all((state == 4).all() for state in states)
    found = pager.stats()
    assert found.resident <= BUDGET and found.bytes_in > 0 and found.bytes_out > 0 and found.hit_rate > 0.9
    pager.close()
    del states, groups, group, following, here
    gc.collect()
    assert pager.stats().resident == 0
