"""Linear layers and everyone who computes them: what the benches of forward and of LoRA training share.

"bitsandbytes" is Linear4bit as it trains (W written out, then torch's linear), "bitsandbytes packed" its inference path on a
repacked copy (bf16 inside, whatever x is). torch's int4 rounds W to other values and is held against those.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import peftk
from bench import peers
from bench.measure import Candidate, Work, relative_error
from peftk import NF4Weight

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
RANK, SCALE, SEED = 16, 2.0, 7
SEPARATE = "peftk, a call for each"


@dataclass(frozen=True)
class Layer:
    """One frozen W (n, k): in 4 bits, and written out in ``dense``'s dtype."""

    w4: NF4Weight
    dense: nn.Linear

    @classmethod
    def random(cls, n: int, k: int, dtype: torch.dtype) -> Layer:
        w4 = peftk.quantize_nf4(torch.randn(n, k).mul_(k**-0.5).bfloat16())
        return cls(w4, peers.dense_linear(w4, dtype))

    def to(self, device: torch.device | str) -> Layer:
        """The same bytes there."""
        return Layer(self.w4.to(device), copy.deepcopy(self.dense).to(device))

    def in_dtype(self, dtype: torch.dtype) -> Layer:
        return Layer(self.w4, peers.dense_linear(self.w4, dtype))

    def stored(self) -> torch.Tensor:
        """W in fp32, exact."""
        return self.w4.dequantize(torch.float32)


# ---- forward ----------------------------------------------------------------------------------------------------------------


def forward_work(x: torch.Tensor, n: int, weight_bytes: int) -> Work:
    """x and W are read, y is written, once each."""
    m, k = x.shape
    return Work(x.nbytes + weight_bytes, m * n * x.element_size(), 2 * m * n * k, x.dtype)


def forward_candidates(
    layers: Sequence[Layer], x: torch.Tensor, int4: bool = True, packed: bool = True, check: bool = True
) -> list[Candidate]:
    """y = x W^T of every layer, in turn, by everyone; without ``check`` nobody is held against fp64, which takes its time."""
    n = layers[0].w4.shape[0]
    truths = [x.double() @ layer.stored().double().T for layer in layers] if check else []
    used: list[torch.Tensor] = []  # the products with torch int4's own weights

    def error(result: Any, truths: Sequence[torch.Tensor] = truths) -> float:
        results = [result] if isinstance(result, torch.Tensor) else result
        return max(relative_error(y, truth) for y, truth in zip(results, truths, strict=True))

    def everyone(make: Callable[[Layer], peers.Run]) -> Callable[[], peers.Run]:
        return lambda: in_turn([make(layer) for layer in layers])

    def torch_int4(layer: Layer) -> peers.Run:
        run, w = peers.torch_int4(layer.stored(), x)
        used.append(x.double() @ w.double().T)
        return run

    def bitsandbytes(layer: Layer) -> peers.Run:
        module = peers.bnb_linear(layer.w4, x.dtype)
        return peers.no_grad(lambda: module(x))

    def dense(layer: Layer) -> peers.Run:
        return peers.no_grad(lambda: layer.dense(x))

    def ours(layer: Layer) -> peers.Run:
        return peers.no_grad(lambda: peftk.ops.nf4_linear(x, layer.w4))

    dense_work = forward_work(x, n, layers[0].dense.weight.nbytes)
    checked = error if check else None
    chosen = [
        Candidate("peftk", everyone(ours)(), checked),
        peers.candidate("bitsandbytes", [peers.BITSANDBYTES], everyone(bitsandbytes), checked),
    ]
    if packed:
        make = everyone(lambda layer: peers.bnb_linear_packed(layer.w4, x))
        chosen.append(peers.candidate("bitsandbytes packed", [peers.BITSANDBYTES], make, checked))
    chosen.append(Candidate("torch dense", everyone(dense)(), checked, dense_work))
    if int4:
        chosen.append(peers.candidate("torch int4", [], everyone(torch_int4), lambda y: error(y, used)))
    return chosen


def in_turn(runs: Sequence[peers.Run]) -> peers.Run:
    """The one run, or all of them one after the other, with a list of their results."""
    return runs[0] if len(runs) == 1 else lambda: [run() for run in runs]


# ---- forward and backward of a layer with LoRA ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What a layer with LoRA gets in one training step."""

    x: torch.Tensor
    dy: torch.Tensor
    A: torch.Tensor  # (r, k) fp32
    B: torch.Tensor  # (n, r) fp32
    dropout: float = 0.0

    @classmethod
    def random(cls, m: int, n: int, k: int, dtype: torch.dtype, dropout: float = 0.0) -> Step:
        A = torch.randn(RANK, k).mul_(k**-0.5).requires_grad_()
        B = torch.randn(n, RANK).mul_(RANK**-0.5).requires_grad_()
        return cls(torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), A, B, dropout)

    def to(self, device: torch.device | str) -> Step:
        """The same values there; A and B are leaves."""
        A, B = (t.detach().to(device).requires_grad_() for t in (self.A, self.B))
        return Step(self.x.to(device), self.dy.to(device), A, B, self.dropout)

    def work(self, weight_bytes: int) -> Work:
        """x, dy, A, B and W are read in both passes, y, dx, dA, dB written."""
        (m, k), n = self.x.shape, self.dy.shape[1]
        adapter = self.A.nbytes + self.B.nbytes
        flop = 4 * m * n * k + 6 * m * RANK * (n + k)
        activations = self.x.nbytes + self.dy.nbytes
        return Work(activations + 2 * adapter + 2 * weight_bytes, activations + adapter, flop, self.x.dtype)

    def truth(self, w4: NF4Weight) -> tuple[torch.Tensor, ...]:
        """y, dx, dA, dB in fp64 with W as it is stored."""
        x, A, B = (t.detach().double().requires_grad_() for t in (self.x, self.A, self.B))
        with peftk.use("reference"):  # the implementation that takes fp64
            branch = peftk.ops.philox_dropout(x, self.dropout, SEED) if self.dropout else x
            y = x @ w4.dequantize(torch.float32).double().T + SCALE * (branch @ A.T @ B.T)
            return (y.detach(), *torch.autograd.grad(y, (x, A, B), self.dy.double()))


def training_runs(layer: Layer, step: Step) -> dict[str, Callable[[], peers.Run]]:
    """Everyone's forward and backward, by name, each made when it is called."""

    def ours() -> peers.Run:
        x, A, B = step.x, step.A, step.B

        def run(x: torch.Tensor) -> torch.Tensor:
            return peftk.ops.nf4_lora_linear(x, layer.w4, A, B, SCALE, dropout=step.dropout, seed=SEED)

        return peers.forward_backward(run, x, A, B, step.dy)

    def hf(base: nn.Module) -> peers.Run:
        module, *parameters = peers.hf_lora(base, step.A, step.B, SCALE, step.dropout)
        return peers.forward_backward(module, step.x, *parameters, step.dy)

    return {
        "peftk": ours,
        "HF peft on bitsandbytes": lambda: hf(peers.bnb_linear(layer.w4, step.x.dtype)),
        f"HF peft on dense {NAMES[step.x.dtype]}": lambda: hf(layer.dense),
    }


def training_candidates(layer: Layer, step: Step, check: bool = True) -> list[Candidate]:
    """y, dx, dA, dB by everyone. With dropout every peer draws a mask of its own, so only ours, whose mask is known, is held
    against fp64."""
    truth = step.truth(layer.w4) if check else ()

    def error(results: tuple[torch.Tensor, ...]) -> float:
        return max(relative_error(result, t) for result, t in zip(results, truth, strict=True))

    (us, ours), (on_bnb, bnb), (on_dense, dense) = training_runs(layer, step).items()
    known = error if check and not step.dropout else None
    dense_work = step.work(layer.dense.weight.nbytes)
    return [
        Candidate(us, ours(), error if check else None),
        peers.candidate(on_bnb, [peers.HF_PEFT, peers.BITSANDBYTES], bnb, known),
        peers.candidate(on_dense, [peers.HF_PEFT], dense, known, dense_work),
    ]


# ---- several layers that share x --------------------------------------------------------------------------------------------


def shared_candidates(layers: Sequence[Layer], steps: Sequence[Step], backward: bool, check: bool = True) -> list[Candidate]:
    """One call with a list of layers against a call for each; every y, and where ``backward`` dx, every dA, every dB. The steps
    share the first one's x."""
    x, weights = steps[0].x.detach().requires_grad_(backward), [layer.w4 for layer in layers]
    A, B, dys = [s.A for s in steps], [s.B for s in steps], [s.dy for s in steps]
    leaves, op = (x, *A, *B), peftk.ops.nf4_lora_linear

    def finished(forward: Callable[[], list[torch.Tensor]]) -> peers.Run:
        def run() -> list[torch.Tensor]:
            ys = forward()
            return [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, dys)]

        return run if backward else peers.no_grad(forward)

    def truth() -> list[torch.Tensor]:
        each = [Step(x, s.dy, s.A, s.B).truth(layer.w4) for s, layer in zip(steps, layers, strict=True)]
        ys, dxs, dAs, dBs = zip(*each, strict=True)
        return [*ys, sum(dxs), *dAs, *dBs] if backward else list(ys)

    truths = truth() if check else []

    def error(results: Sequence[torch.Tensor]) -> float:
        return max(relative_error(result, t) for result, t in zip(results, truths, strict=True))

    runs = {
        "peftk": lambda: op(x, weights, A, B, SCALE),
        SEPARATE: lambda: [op(x, *parts, SCALE) for parts in zip(weights, A, B, strict=True)],
    }
    return [Candidate(who, finished(run), error if check else None) for who, run in runs.items()]
