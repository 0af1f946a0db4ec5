"""Fixtures that every test shares: implementations by themselves, and memory that isn't zero by luck."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils._device import _device_constructors  # noqa: E402

import peftk  # noqa: E402
from peftk.native import native, why_not_native  # noqa: E402

TIERS = ("scalar", "avx2", "avx512", "avx512_bf16")
IMPLEMENTATIONS = ("reference", *(f"cpu-{tier}" for tier in TIERS))


def reason_to_skip(name: str) -> str:
    """Why this implementation can't run here; empty where it can."""
    tier = name.partition("-")[2]
    if name == "reference":
        return ""
    if native() is None:
        return why_not_native()
    if tier not in native().compiled_tiers():
        return f"this build has no {tier} tier"
    return "" if tier in native().available_tiers() else f"this processor does not run {tier}"


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest):
    """The test body runs once for each implementation, which is forced while it runs."""
    if reason := reason_to_skip(request.param):
        pytest.skip(reason)
    with peftk.use(request.param):
        yield request.param


_device_constructors()  # torch caches its factories at the first torch.device context: not the poisoned ones


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch):
    """torch.empty and its kin return NaN (or 0xA5 bytes), so that an element which nobody writes fails loudly."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta or type(tensor) is not torch.Tensor:
                return tensor
            if tensor.dtype.is_floating_point:
                return tensor.fill_(float("nan"))
            return tensor.fill_(0xA5) if tensor.dtype == torch.uint8 else tensor

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
