"""peftk.info(): what runs here, what doesn't, and why not."""

from __future__ import annotations

import importlib
import types

import pytest
import torch

import peftk
from peftk.native import native, why_not_native
from peftk.ops import gpu

module = importlib.import_module("peftk.info")  # `peftk.info` is the function


def other_machine(monkeypatch: pytest.MonkeyPatch, **functions) -> None:
    """As if the native module were this one; without functions there is none."""
    there = None
    if functions:
        there = types.SimpleNamespace(available_tiers=lambda: ["scalar", "avx2"], tier=lambda: "avx2", **functions)
        there.why_not_tiers = lambda: [("avx512", "this processor has no avx512f"), ("amx_bf16", "this build doesn't have it")]
        there.thread_runtime = "libgomp.so"
    for user in (module, gpu):
        monkeypatch.setattr(user, "native", lambda: there)
        monkeypatch.setattr(user, "why_not_native", lambda: "" if there else "no compiler: c++ was not found")


def test_this_machine():
    info, shown = peftk.info(), str(peftk.info())
    assert info.versions["torch"] == torch.__version__ and set(info.versions) == {"peftk", "torch", "python"}
    assert f"torch {torch.__version__}" in shown and f"peftk {info.versions['peftk']}" in shown
    assert info.native == (native() is not None) == (info.why_not_native == "") == (why_not_native() == "")
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["reference", "cpu", "cuda", "triton", "peft"]
    if info.native:
        assert info.cpu_tier in info.cpu_tiers and info.cpu_tiers[0] == "scalar"
        assert info.cpu_tier in shown and info.threads in shown and f"{torch.get_num_threads()} of them" in shown


def test_every_absence_has_a_reason():
    info = peftk.info()
    assert info.native or info.why_not_native
    assert info.cuda or info.why_not_cuda
    assert info.triton or info.why_not_triton
    for line in str(info).splitlines():
        if "does not run" in line:
            assert len(line.partition("does not run: ")[2]) > 5


def test_every_tier_runs_or_says_why_not():
    if native() is None:
        pytest.skip(why_not_native())
    info = peftk.info()
    assert set(info.cpu_tiers) | set(info.why_not_tiers) == {"scalar", "avx2", "avx512", "avx512_bf16", "amx_bf16"}
    assert not set(info.cpu_tiers) & set(info.why_not_tiers) and all(info.why_not_tiers.values())


def test_the_first_missing_tier_is_shown(monkeypatch):
    other_machine(monkeypatch, cuda_devices=list, cuda_status=str)
    assert "; avx512 does not run: this processor has no avx512f" in str(peftk.info())


def test_changes_nothing():
    before = torch.get_num_threads(), native() and native().tier()
    assert peftk.info() == peftk.info()
    assert before == (torch.get_num_threads(), native() and native().tier())


def test_the_tier_in_use():
    if native() is None:
        pytest.skip(why_not_native())
    with peftk.use("cpu-scalar"):
        assert peftk.info().cpu_tier == "scalar"
    assert peftk.info().cpu_tier == native().tier()


def test_without_the_native_module(monkeypatch):
    other_machine(monkeypatch)
    info = peftk.info()
    assert (info.native, info.cpu_tiers, info.cpu_tier, info.cuda, info.devices) == (False, [], None, False, [])
    assert info.why_not_tiers == {}
    assert info.threads == "torch's own"
    assert info.why_not_native == info.why_not_cuda == "no compiler: c++ was not found"
    assert "cpu        does not run: no compiler: c++ was not found" in str(info)
    assert "cuda       does not run: no compiler: c++ was not found" in str(info)
    assert "reference  runs everywhere" in str(info)


@pytest.mark.parametrize(
    ("functions", "reason"),
    [
        ({"version": 1}, "this build found no nvcc: install peftk again with nvcc on the PATH"),
        (
            {"cuda_devices": lambda: [], "cuda_status": lambda: "no CUDA-capable device is detected"},
            "no CUDA-capable device is detected",
        ),
        ({"cuda_devices": lambda: [], "cuda_status": lambda: ""}, "no device"),
    ],
)
def test_why_not_cuda(monkeypatch, functions, reason):
    other_machine(monkeypatch, **functions)
    info = peftk.info()
    assert info.native and not info.cuda and info.why_not_cuda == reason and f"cuda       does not run: {reason}" in str(info)
    assert "cpu        avx2 (also: scalar); threads: libgomp.so" in str(info)


def test_the_hook_into_hf_peft(monkeypatch):
    """Registered or not, why, and the way back; HF peft is not imported for it."""
    hook = importlib.import_module("peftk.integrations.peft")
    pytest.importorskip("peft")
    hook.register()
    assert "become peftk's" in peftk.info().hooks["peft"] and "off: PEFTK_PEFT=0 or peftk.integrations.peft.unregister()" in str(
        peftk.info()
    )
    try:
        hook.unregister()
        assert "left alone: peftk.integrations.peft.unregister() was called; register() takes" in str(peftk.info())
        monkeypatch.setenv("PEFTK_PEFT", "0")
        hook.register()
        assert peftk.info().hooks["peft"] == "left alone: the environment says PEFTK_PEFT=0"
    finally:
        monkeypatch.delenv("PEFTK_PEFT", raising=False)
        hook.register()
    monkeypatch.setattr("peft.__version__", "0.99.0")
    assert peftk.info().hooks["peft"].startswith("left alone: peft: expected 0.18 to 0.21, got 0.99.0")

    def missing(name):
        raise hook.PackageNotFoundError(name)

    monkeypatch.setattr(hook, "version", missing)
    assert peftk.info().hooks["peft"] == "not installed"
