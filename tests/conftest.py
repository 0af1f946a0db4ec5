"""Fixtures that every test shares: implementations by themselves, and memory that isn't zero by luck."""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PEFTK_BITSANDBYTES"] = "0"  # a peer is what it is without us; tests/integrations takes over by itself

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils._device import _device_constructors  # noqa: E402

import peftk  # noqa: E402
from peftk.native import native, why_not_native  # noqa: E402
from peftk.ops import gpu  # noqa: E402

TIERS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16")
EVERYWHERE = ("reference", *(f"cpu-{tier}" for tier in TIERS))
# By the file in peftk/ops/<op>/ that an op needs for them: on a GPU, as source on the host, as compiled PTX in the emulator.
ON_GPU = {"cuda.py": ("cuda", "cuda-host", "cuda-ptx"), "triton_kernel.py": ("triton", "triton-ptx")}


def pytest_generate_tests(metafunc: pytest.Metafunc):
    """A test with ``implementation`` runs once for each that its op (tests/ops/test_<op>.py, test_<op>_many.py) has."""
    if "implementation" in metafunc.fixturenames:
        room = (
            Path(peftk.__file__).parent / "ops" / Path(metafunc.module.__file__).stem.removeprefix("test_").removesuffix("_many")
        )
        names = [name for file, names in ON_GPU.items() if (room / file).exists() for name in names]
        marked = [pytest.param(name, marks=marks) if (marks := _marks(name, metafunc)) else name for name in names]
        metafunc.parametrize("implementation", [*EVERYWHERE, *marked], indirect=True)


def _marks(name: str, metafunc: pytest.Metafunc) -> list[pytest.MarkDecorator]:
    """What needs a GPU; and what emulators leave to a full run, since tests/ops/test_gpu_product.py has a sample of it."""
    if name in ("cuda", "triton"):
        return [pytest.mark.gpu]
    module = Path(metafunc.module.__file__).stem
    is_long = module.endswith("_many") or (module == "test_nf4_lora_linear" and name != "cuda-ptx")
    return [pytest.mark.full] if is_long else []


def reason_to_skip(name: str) -> str:
    """Why this implementation can't run here; empty where it can."""
    base, _, tier = name.partition("-")
    if name == "reference":
        return ""
    if base in ("cuda", "triton"):
        return importlib.import_module("emulation.doors").why_not(name)
    if native() is None:
        return why_not_native()
    if tier not in native().compiled_tiers():
        return f"this build has no {tier} tier"
    return "" if tier in native().available_tiers() else f"{tier}: {dict(native().why_not_tiers())[tier]}"


@pytest.fixture
def implementation(request: pytest.FixtureRequest):
    """The test body runs once for each implementation, which is forced while it runs."""
    name = request.param
    if reason := reason_to_skip(name):
        pytest.skip(reason)
    base = name.partition("-")[0]
    with contextlib.ExitStack() as inside:
        if base in ("cuda", "triton"):
            inside.enter_context(gpu.through(base, importlib.import_module("emulation.doors").door(name)))
            inside.enter_context(peftk.use(base))
        else:
            inside.enter_context(peftk.use(name))
        yield name


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
                tensor.detach().fill_(float("nan"))
            elif tensor.dtype == torch.uint8:
                tensor.fill_(0xA5)
            return tensor

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
