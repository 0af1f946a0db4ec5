"""python -m bench --regimes: where a GPU's kernels for a product with a 4-bit weight hand over (peftk/ops/regimes.py).

Without a GPU: calculated for those of bench/static/predict.py from data sheets and the instructions counted in
bench/results/static.csv. With --gpu: timed on the GPU at hand. --record rewrites these rows of peftk/ops/regimes.csv, and the
tables of csrc/cuda/README.md.

A regime takes as long as its scarcest resource: bytes from memory, issue slots, shared memory, tensor or fp32 units. Assumed,
until a GPU has been asked: the shares below.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path

import torch

import peftk
from bench import report
from bench.gpu.device import Device, Gpu, NoGpu
from bench.gpu.measure import Forced, GpuCase, interleave
from bench.measure import Work
from bench.static import predict
from peftk.atomic import write_file
from peftk.ops import nf4_linear, regimes
from peftk.ops.regimes import Row
from peftk.progress import track

SIZE = 4096  # n and k of the weight that the figures are of
ROWS = (8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)  # m: the upper ends of intervals
TOKENS = (16, 32, 64, 128)
PACKED = 0.516  # bytes a weight, double quantised
LAUNCH_US = 3.0  # a kernel's start and end, behind the one before it

# Assumed shares of what the data sheet says.
MMA_SHARE = {90: 0.62, 100: 0.25}  # of the tensor rate that mma.sync reaches: wgmma and tcgen05 have units of their own
KERNEL_SHARE = 0.75  # of its scarcest resource that a kernel of ours reaches
LIBRARY_SHARE = 0.85  # of the tensor rate that torch's product reaches
# Passes through shared memory, 128 bytes and a clock each, that a step of STEP_WEIGHTS weights takes, by tokens: forward counted
# by the emulator, backward from the accesses of its loop, few from its table's look-ups; Triton's are taken to be CUDA's.
STEP_WEIGHTS = 8192
SHARED_PASSES = {"forward": {16: 282, 32: 362, 64: 524, 128: 1009}, "backward": {16: 392, 32: 464, 64: 608, 128: 896}}
FEW_SHARED_PASSES = 128
SIMPLE_SLOTS = 1.5  # instructions of the simple kernel for a multiplication and addition
SIMPLE_FEW = 32  # rows of x up to which it makes tiles of 8: kFewUpTo in csrc/ops/nf4_linear/cuda_simple_step.cuh
SIMPLE_BLOCKS = 2  # of the simple kernel, that a multiprocessor should have
MEASURED_BLOCKS = 2  # that a multiprocessor should have, where times are taken
LEAST_ROUNDS = 10

# Names as drivers tell them.
GLOBS = {
    "T4": "*T4", "A100": "*A100*", "A10": "*A10", "RTX 3090": "*RTX 3090*", "L4": "*L4", "RTX 4090": "*RTX 4090*",
    "H100": "*H100*", "H200": "*H200*", "B200": "*B200*", "RTX 5090": "*RTX 5090*",
}  # fmt: skip

README = report.ROOT / "csrc" / "cuda" / "README.md"
BEGIN, END = "<!-- regimes: begin -->", "<!-- regimes: end -->"


@dataclass(frozen=True)
class Candidate:
    """A way to compute a product: columns of regimes.csv."""

    regime: str
    tokens: int
    kind: str

    def __str__(self) -> str:
        return f"{self.regime} {self.tokens}" if self.regime == "tile" else self.regime


def candidates(product: str, kind: str, m: int) -> Iterator[Candidate]:
    """Those that may be tried at m."""
    if kind == "tensor":
        if m <= 8 and product == "forward":
            yield Candidate("few", 8, kind)
        for tokens in TOKENS:
            if tokens == TOKENS[0] or tokens // 2 < m:
                yield Candidate("tile", tokens, kind)
    else:
        yield Candidate("simple", 8 if m <= SIMPLE_FEW else 64, kind)
    yield Candidate("chunks", 0, kind)


# ---- calculated -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    """Microseconds of a product, and what takes them."""

    us: float
    binds: str


def calculated_time(gpu: predict.Gpu, backend: str, product: str, candidate: Candidate, m: int) -> Time:
    """For a SIZE x SIZE weight."""
    weights, slots = SIZE * SIZE, gpu.sms * predict.SLOTS * gpu.ghz * 1e3  # slots: a microsecond
    activations = 2 * m * SIZE * (2 if candidate.kind == "tensor" else 4)
    fp32 = gpu.sms * (64 if gpu.capability in (75, 80) else 128) * gpu.ghz * 1e3  # multiplications and additions a microsecond
    tensor = gpu.tensor_tflop_s * 1e6
    if candidate.regime == "chunks":
        width = 2 if candidate.kind == "tensor" else 4
        decoding = figures(backend, f"decode {candidate.kind}", gpu).per_weight
        decode = max((PACKED + width) * weights / gpu.gb_s / 1e3, decoding * weights / slots)
        rate = tensor if candidate.kind == "tensor" else 2 * fp32
        product_us = max(2 * m * weights / rate / LIBRARY_SHARE, (activations + width * weights) / gpu.gb_s / 1e3)
        chunks = -(-width * weights // (chunk_mb(gpu) << 20))
        return Time(
            decode / KERNEL_SHARE + product_us + 2 * chunks * LAUNCH_US, "decoding" if decode > product_us else "the product"
        )
    passes = -(-m // candidate.tokens) if candidate.tokens else 1
    resources = {"bytes": (PACKED * weights + activations) / gpu.gb_s / 1e3}
    if candidate.kind == "tensor":
        share = MMA_SHARE.get(gpu.capability, 1.0)
        counted = figures(backend, f"{product} {candidate}", gpu)
        resources["issue slots"] = counted.per_weight * weights * passes / slots
        resources["tensor units"] = 2 * candidate.tokens * passes * weights / tensor / share
        step = SHARED_PASSES[product].get(candidate.tokens, FEW_SHARED_PASSES)
        resources["shared memory"] = step * passes * weights / STEP_WEIGHTS / (gpu.sms * gpu.ghz * 1e3)
    else:
        resources["fp32 units"] = m * weights / fp32
        resources["issue slots"] = SIMPLE_SLOTS * max(m, 2) * weights / slots
    binds = max(resources, key=resources.__getitem__)
    return Time(resources[binds] / KERNEL_SHARE + LAUNCH_US, binds)


@dataclass(frozen=True)
class Figures:
    """Of a kernel in bench/results/static.csv."""

    per_weight: float  # instructions of a thread
    blocks: int  # that fit a multiprocessor


# Globs on the names of the kernels, double quantised; bf16, but "plain" in fp32.
KERNELS = {
    ("cuda", "decode tensor"): "decode_tiles_kernel<Bf16, true>",
    ("cuda", "decode plain"): "decode_tiles_kernel<float, true>",
    ("cuda", "forward few"): "nf4_linear_few_kernel<Bf16>",
    ("triton", "decode tensor"): "nf4_linear_decode<u8, u8, fp32, fp32, fp32, fp32, bf16, * True, 32, 256>",
    ("triton", "decode plain"): "nf4_linear_decode<u8, u8, fp32, fp32, fp32, fp32, fp32, * True, 32, 256>",
    ("triton", "forward few"): "nf4_linear_forward<bf16*, 16, 128, 64, *",
    **{("cuda", f"forward tile {t}"): f"nf4_linear_tile_kernel<Bf16, {t}>" for t in TOKENS},
    **{("cuda", f"backward tile {t}"): f"nf4_linear_dx_tile_kernel<Bf16, {t}>" for t in TOKENS},
    **{("triton", f"forward tile {t}"): f"nf4_linear_forward<bf16*, {t}, 128, 64, *" for t in TOKENS},
    **{("triton", f"backward tile {t}"): f"nf4_linear_backward<*bf16*, {t}, 128, 64, *" for t in TOKENS},
}


@cache
def figures(backend: str, what: str, gpu: predict.Gpu) -> Figures:
    """What was counted in the code that this GPU runs. RuntimeError where nothing was."""
    pattern = KERNELS[backend, what]
    with (report.RESULTS / "static.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            ours = line["backend"] == backend and fnmatchcase(line["kernel"], pattern) and line["per_element"]
            if ours and line["target"].startswith("sm_") and predict.serves(line["target"], gpu):
                return Figures(float(line["per_element"]), int(line["blocks"]))
    raise RuntimeError(f"static.csv: no {pattern} of {backend} for {gpu.name}; run python -m bench --static --record")


def chunk_mb(gpu: predict.Gpu) -> int:
    """Half the L2 cache: the rest is for x and y."""
    return max(1, int(gpu.l2_mb / 2))


def calculated_rows(gpu: predict.Gpu, name: str) -> Iterator[Row]:
    """Every row of a GPU, under that name."""
    for backend, product, kind in itertools.product(("cuda", "triton"), ("forward", "backward"), ("tensor", "plain")):
        if kind == "tensor" and gpu.capability < 80:
            continue  # these kernels need sm_80
        time = partial(calculated_time, gpu, backend, product)
        for least, best in handovers(product, kind, lambda c, m: time(c, m).us):  # noqa: B023
            chunks = best.regime == "chunks"
            blocks = 0 if chunks else resident(backend, product, best, gpu)
            megabytes = chunk_mb(gpu) if chunks else 0
            yield Row(backend, name, product, kind, least, best.regime, best.tokens, blocks, megabytes, "calculated")


def handovers(product: str, kind: str, time: Callable[[Candidate, int], float]) -> Iterator[tuple[int, Candidate]]:
    """The fastest candidate at each of ROWS, with the least m of its interval; neighbours that agree as one."""
    least, before = 0, None
    for m in ROWS:
        best = fastest(candidates(product, kind, m), lambda c: time(c, m))  # noqa: B023
        if best != before:
            yield least, best
        least, before = m + 1, best


def fastest(tried: Iterable[Candidate], time: Callable[[Candidate], float]) -> Candidate:
    """Of equals the one for few rows, which is never more work, then the largest tile, which reads W and x least often."""
    return min(tried, key=lambda candidate: (round(time(candidate), 9), candidate.regime != "few", -candidate.tokens))


def resident(backend: str, product: str, candidate: Candidate, gpu: predict.Gpu) -> int:
    """Blocks of the kernel that a multiprocessor holds."""
    return SIMPLE_BLOCKS if candidate.regime == "simple" else figures(backend, f"{product} {candidate}", gpu).blocks


def calculated_table() -> list[Row]:
    """Of every GPU by its name, of every generation by its first one, of all others as of an A100."""
    first = {gpu.capability: gpu for gpu in reversed(predict.GPUS)}
    named = [*((gpu, GLOBS[gpu.name]) for gpu in predict.GPUS), *((gpu, f"sm_{number}") for number, gpu in sorted(first.items()))]
    return [row for gpu, name in (*named, (first[80], "*")) for row in calculated_rows(gpu, name)]


# ---- measured ---------------------------------------------------------------------------------------------------------------


def measured_rows(device: Device, name: str, backends: Sequence[str] = ("cuda", "triton"), size: int = SIZE) -> Iterator[Row]:
    """Every row of the GPU at hand, from times; "plain" in fp32, "tensor" in bf16."""
    w4 = peftk.quantize_nf4(torch.randn(size, size)).to(device.place)
    megabytes = max(1, device.l2 >> 21)
    for backend, product, kind in itertools.product(backends, ("forward", "backward"), ("tensor", "plain")):
        times: dict[tuple[Candidate, int], float] = {}
        for m in track(ROWS, f"{backend}, {product}, {kind}", enabled=True):
            tried = list(candidates(product, kind, m))
            cases = [timed(w4, backend, product, candidate, m, megabytes) for candidate in tried]
            case = GpuCase(f"m={m}", Work(0, 0), cases)
            for candidate, seconds in zip(tried, interleave(device, case, cases, LEAST_ROUNDS), strict=True):
                times[candidate, m] = statistics.median(seconds)
        for least, best in handovers(product, kind, lambda c, m: times[c, m]):  # noqa: B023
            chunks = best.regime == "chunks"
            blocks = 0 if chunks else MEASURED_BLOCKS
            yield Row(
                backend, name, product, kind, least, best.regime, best.tokens, blocks, megabytes if chunks else 0, "measured"
            )


def timed(w4: peftk.NF4Weight, backend: str, product: str, candidate: Candidate, m: int, megabytes: int) -> Forced:
    """One candidate's call."""
    n, k = w4.shape
    dtype = torch.bfloat16 if candidate.kind == "tensor" else torch.float32
    x = torch.randn(m, k if product == "forward" else n).to(w4.device, dtype)
    columns = {"regime": candidate.regime, "tokens": candidate.tokens, "blocks": MEASURED_BLOCKS, "chunk_mb": megabytes}

    def run() -> torch.Tensor:
        with regimes.forced(**columns):
            if product == "forward":
                return nf4_linear(x, w4)
            return torch.ops.peftk.nf4_linear_dx(x, *w4.tensors(), k, w4.block_size, w4.quant_type)

    return Forced(str(candidate), run, implementation=backend)


# ---- tables and files -------------------------------------------------------------------------------------------------------


def page() -> str:
    """Markdown: for each GPU and m the fastest regime of CUDA's, its least time and what takes it."""
    shown = (1, 8, 64, 256, 1024, 4096)
    lines = [f"{predict.MARK}: a {SIZE} x {SIZE} weight, bf16, us", ""]
    for product in ("forward", "backward"):
        lines += [f"| {product} | " + " | ".join(f"m = {m}" for m in shown) + " |", "|---" * (len(shown) + 1) + "|"]
        for gpu in predict.GPUS:
            kind = "tensor" if gpu.capability >= 80 else "plain"
            cells = []
            for m in shown:
                best = fastest(candidates(product, kind, m), lambda c: calculated_time(gpu, "cuda", product, c, m).us)  # noqa: B023
                time = calculated_time(gpu, "cuda", product, best, m)
                cells.append(f"{best}: {time.us:.3g}, {time.binds}")
            lines.append(f"| {gpu.name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def text_of(rows: Iterable[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(field.name for field in fields(Row))
    writer.writerows(astuple(row) for row in rows)
    return out.getvalue()


def merged(fresh: Sequence[Row], before: Sequence[Row]) -> list[Row]:
    """The file's rows with the fresh ones in the place of those of the same GPU, product and kind; what was measured stays where
    only a calculation is offered instead."""
    key = lambda row: (row.backend, row.gpu, row.product, row.kind)  # noqa: E731
    kept = {key(row) for row in before if row.source == "measured"} - {key(row) for row in fresh if row.source == "measured"}
    new = [row for row in fresh if key(row) not in kept]
    replaced = {key(row) for row in new}
    return new + [row for row in before if key(row) not in replaced]


def main(
    argv: Sequence[str] | None = None, find: Callable[[], Device] = Gpu, path: Path = regimes.PATH, readme: Path = README
) -> None:
    """SystemExit, one line that says why, where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench --regimes", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="time the GPU at hand instead of calculating")
    parser.add_argument("--record", action="store_true", help="rewrite these rows of peftk/ops/regimes.csv")
    chosen = parser.parse_args(argv)
    if chosen.gpu:
        try:
            device = find()
        except NoGpu as reason:
            raise SystemExit(f"python -m bench --regimes --gpu: no GPU: {reason}") from None
        rows = list(measured_rows(device, model_name(device)))
    else:
        rows = calculated_table()
        print(page())
    print(text_of(rows))
    if chosen.record:
        before = regimes.table(path) if path.exists() else ()
        write_file(path, text_of(merged(rows, before)).encode())
        if not chosen.gpu:
            report.rewrite_between(readme, BEGIN, END, page())


def model_name(device: Device) -> str:
    """As torch tells it: what rows are matched by."""
    return torch.cuda.get_device_name(device.place) if device.place.type == "cuda" else device.name
