"""The native module: tiers, threads, and an import that never fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

import peftk
from peftk.native import native, why_not_native

needs_native = pytest.mark.skipif(native() is None, reason=why_not_native() or "no native module")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_an_unforced_op_without_the_module_runs_on_the_reference_and_says_so_once():
    code = """
import sys, logging
sys.modules["peftk._C"] = None  # what an import of a module that isn't there does
logging.basicConfig()
import peftk, torch
w4 = peftk.quantize_nf4(torch.randn(4, 64)); w4.dequantize(); w4.dequantize()
print(peftk.info())
try:
    with peftk.use("cpu"):
        w4.dequantize()
except RuntimeError as error:
    print("error:", error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "cpu        does not run: peftk._C can't be imported" in done.stdout
    assert "error: peftk.ops.nf4_dequantize can't run: cpu: peftk._C can't be imported" in done.stdout
    assert done.stderr.count("nf4_dequantize runs on the reference implementation, which is slow") == 1


@needs_native
def test_isa_is_chosen_by_the_environment():
    for tier in native().available_tiers():
        done = python("import peftk; print(peftk.info().cpu_tier)", PEFTK_CPU_ISA=tier)
        assert done.stdout.strip() == tier
    done = python("import peftk; peftk.info()", PEFTK_CPU_ISA="sse9")
    assert "PEFTK_CPU_ISA: expected one of scalar" in done.stderr and "got sse9" in done.stderr


def test_use_names_what_can_be_forced():
    with pytest.raises(ValueError, match="name: expected one of reference, cpu, cuda, triton .*got 'gpu'"):
        with peftk.use("gpu"):
            raise AssertionError("must not run")
    with pytest.raises(RuntimeError, match="lora_linear can't run: triton: this op has no such implementation"):
        with peftk.use("triton"):
            peftk.ops.lora_linear(torch.ones(1, 64), torch.ones(8, 64), torch.ones(2, 64), torch.ones(8, 2), 1.0)
    with pytest.raises(RuntimeError, match="nf4_quantize can't run: cuda: "):
        with peftk.use("cuda"):
            peftk.quantize_nf4(torch.ones(64))


@needs_native
def test_use_restores_the_tier():
    before = native().tier()
    with pytest.raises(KeyError):
        with peftk.use("cpu-scalar"):
            assert native().tier() == "scalar"
            raise KeyError
    assert native().tier() == before


@needs_native
def test_no_second_thread_pool_beside_torchs():
    """A peftk op followed by a torch matmul, many times, takes about the sum of both alone: two pools would spin against each
    other, which costs a factor of ten and more."""
    assert "OpenMP" in native().thread_runtime
    w4, out = peftk.quantize_nf4(torch.randn(512, 512)), torch.empty(512, 512)
    a = torch.randn(256, 256)

    def seconds(*calls) -> float:
        start = time.perf_counter()
        for _ in range(50):
            for call in calls:
                call()
        return time.perf_counter() - start

    ours, theirs = (lambda: w4.dequantize(out=out)), (lambda: a @ a)
    ratios = []
    while len(ratios) < 20 and not (ratios and min(ratios) < 2):  # a loaded machine makes any single measurement worthless
        seconds(ours, theirs)
        ratios.append(seconds(ours, theirs) / (seconds(ours) + seconds(theirs)))
    assert min(ratios) < 2, ratios


@needs_native
def test_threads_without_openmp():
    """The parked pool gives the same results; it is what sanitizer builds and processes without OpenMP use."""
    code = """
import importlib, torch
c = importlib.import_module("peftk._C")
w = torch.randn(64, 640); packed = torch.zeros(64 * 320, dtype=torch.uint8); absmax = torch.zeros(640)
results = []
for threads in (1, 2, 3, 4, 2):  # find_thread_runtime was not called: own pool
    c.nf4_quantize(w.data_ptr(), 0, w.numel(), 64, 0, packed.data_ptr(), absmax.data_ptr(), threads)
    results.append((packed.clone(), absmax.clone()))
assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(results, results[1:]))
print("same")
"""
    done = python(code)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@needs_native
def test_only_kernels_of_a_tier_use_its_instructions():
    """An inline function that two tiers define is merged by the linker, and the copy that stays may need AVX-512: an old
    processor would stop with an illegal instruction. So no vector-extension instruction stands outside the tiers' namespaces."""
    listing = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", native().__file__], capture_output=True, text=True).stdout
    function, offenders, in_tiers = "", set(), 0
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
        elif "%ymm" in line or "%zmm" in line or "%k1" in line:
            if re.search(r"peftk::(avx2|avx512|avx512_bf16|amx_bf16)::", function):
                in_tiers += 1
            elif "peftk::" in function or "std::" in function:
                offenders.add(function)
    assert in_tiers > 100 and offenders == set()
