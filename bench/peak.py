"""The arithmetic peak: a C loop that multiplies and adds in registers, touching no memory; compiled when it is asked for.

torch.matmul falls short of it (on a Zen 4 with 2 cores, bf16: 420 of 469 GFLOP/s), so a share of torch.matmul's rate may pass
100 % without anything being at its limit.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

CHAINS = 12  # independent sums: more than latency x throughput of any processor so far, and few enough for 16 registers
STEPS = 1 << 21  # of the loop: some 10 ms; 130 of tiles
SOURCE = """
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define ALL(USE) USE(s0), USE(s1), USE(s2), USE(s3), USE(s4), USE(s5), USE(s6), USE(s7), USE(s8), USE(s9), USE(s10), USE(s11)
#define KEEP(s) "+x"(s) /* the sums are equal: without this the compiler would compute one */
#define LOOP(NAME, TARGET, SUM, FACTOR, STEP)                                   \\
  __attribute__((target(TARGET))) void NAME(long steps) {                      \\
    FACTOR;                                                                    \\
    SUM s0 = {0}, s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0;                 \\
    SUM s6 = s0, s7 = s0, s8 = s0, s9 = s0, s10 = s0, s11 = s0;                \\
    for (long i = 0; i < steps; i++) {                                         \\
      __asm__ volatile("" : ALL(KEEP));                                        \\
      (void)(ALL(STEP));                                                       \\
    }                                                                          \\
    __asm__ volatile("" : ALL(KEEP));                                          \\
  }
#define AVX2(s) s = _mm256_fmadd_ps(a, a, s)
#define AVX512(s) s = _mm512_fmadd_ps(a, a, s)
#define BF16(s) s = _mm512_dpbf16_ps(s, a, a)
LOOP(avx2, "avx2,fma", __m256, __m256 a = _mm256_set1_ps(1e-3f), AVX2)
LOOP(avx512, "avx512f", __m512, __m512 a = _mm512_set1_ps(1e-3f), AVX512)
LOOP(avx512_bf16, "avx512f,avx512bf16", __m512, __m512bh a = (__m512bh)_mm512_set1_epi32(0x3a833a83), BF16)
#if __has_include(<amxtileintrin.h>) || __has_include(<amxintrin.h>) /* GCC; Clang */
/* No type holds a tile: four sums in turn, two left and two right operands, as the kernels have them. */
#define TILES _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7)
__attribute__((target("amx-tile,amx-bf16"))) void amx_bf16(long steps) {
  struct { unsigned char palette, start, reserved[14]; unsigned short bytes[16]; unsigned char rows[16]; } shape = {1};
  for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
  syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
  _tile_loadconfig(&shape);
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
  for (long i = 0; i < steps; i++) { TILES; TILES; TILES; }
  _tile_release();
}
#endif
"""
FLOP = {"avx2": 16, "avx512": 32, "avx512_bf16": 64, "amx_bf16": 16384}  # of one instruction
LOOPS = {  # what a tier's kernels multiply with
    "avx2": {torch.bfloat16: "avx2", torch.float32: "avx2"},
    "avx512": {torch.bfloat16: "avx512", torch.float32: "avx512"},
    "avx512_bf16": {torch.bfloat16: "avx512_bf16", torch.float32: "avx512"},
    "amx_bf16": {torch.bfloat16: "amx_bf16", torch.float32: "avx512"},
}


def register_peak(tier: str, threads: int, rounds: int = 7, steps: int = STEPS) -> tuple[dict[torch.dtype, float], str]:
    """(operations a second by dtype, "") with ``threads`` threads, or ({}, why not)."""
    loops = LOOPS.get(tier)
    if loops is None:
        return {}, f"none for {tier}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = ctypes.CDLL(str(_build(Path(folder))))
        except (OSError, subprocess.CalledProcessError) as error:
            return {}, f"no C compiler that builds it: {error}"
        rates = {name: _rate(getattr(library, name), FLOP[name], threads, rounds, steps) for name in set(loops.values())}
    return {dtype: rates[name] for dtype, name in loops.items()}, ""


def _build(folder: Path) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("no gcc and no cc")
    source, library = folder / "peak.c", folder / "peak.so"
    source.write_text(SOURCE)
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True, capture_output=True)
    return library


def _rate(loop: ctypes._CFuncPtr, flop: int, threads: int, rounds: int, steps: int) -> float:
    """Best of ``rounds``, each thread by itself: ctypes lets go of the interpreter's lock meanwhile."""
    with ThreadPoolExecutor(threads) as pool:
        best = 0.0
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(loop, [ctypes.c_long(steps)] * threads))
            best = max(best, threads * steps * CHAINS * flop / (time.perf_counter() - start))
    return best
