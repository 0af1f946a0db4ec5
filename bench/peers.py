"""The peers, each imported where it is used: bitsandbytes, HF peft, torch's own int4. A missing one becomes a row that says so.

All get the weight that ours has, byte for byte, through bitsandbytes' checkpoint keys; so one fp64 truth serves a whole case.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from bench import isa
from bench.measure import Candidate, Work
from peftk import NF4Weight

os.environ["PEFTK_BITSANDBYTES"] = "0"  # as a peer it is what it is without us
LEFT_OUT = ""  # why no peer is wanted, in a process that times ours alone
BITSANDBYTES, HF_PEFT = "bitsandbytes", "peft"
Run = Callable[[], Any]


class Unavailable(Exception):
    """A peer that is installed and can't do this here; the message says why."""


def candidate(
    who: str,
    packages: Sequence[str],
    make: Callable[[], Run],
    error: Callable[[Any], float] | None = None,
    work: Work | None = None,
    note: str = "",
) -> Candidate:
    """``make`` builds the call to time, once its ``packages`` are there."""
    if isa.forced() and BITSANDBYTES in packages:
        note = "; ".join(filter(None, (note, isa.BITSANDBYTES_NOTE)))
    if LEFT_OUT:
        return Candidate(who, note=LEFT_OUT)
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as missing:
            if (missing.name or "").partition(".")[0] == package:
                return Candidate(who, note="not installed")
            return Candidate(who, note=f"{package} can't be imported: {missing}")
    try:
        return Candidate(who, make(), error, work, note)
    except Unavailable as reason:
        return Candidate(who, note=str(reason))


# ---- bitsandbytes: quantise and dequantise ----------------------------------------------------------------------------------


def bnb_quantize_4bit(w: torch.Tensor, double_quant: bool = True) -> Run:
    """-> (packed, QuantState), blocks of 64."""
    from bitsandbytes import functional

    return lambda: functional.quantize_4bit(w, blocksize=64, compress_statistics=double_quant, quant_type="nf4")


def bnb_as_nf4_weight(packed: torch.Tensor, state: Any) -> NF4Weight:
    """What bitsandbytes quantised, as ours, so that one decoder judges both."""
    nested = (state.state2.absmax, state.offset) if state.nested else (None, None)
    parts = (packed.reshape(-1), state.absmax, *nested)
    return NF4Weight(*parts, state.shape, state.dtype, state.blocksize, state.quant_type)


def bnb_weight(w4: NF4Weight) -> Any:
    """w4 as bitsandbytes' Params4bit: a copy of the same bytes, with their QuantState."""
    import bitsandbytes

    parts = {key: value.clone() for key, value in w4.state_dict().items()}
    return bitsandbytes.nn.Params4bit.from_prequantized(parts.pop("weight"), parts, requires_grad=False, device=w4.device)


def bnb_dequantize_4bit(w4: NF4Weight, out: torch.Tensor | None = None) -> Run:
    """W in w4.dtype, fresh, or copied to ``out``: its public functions can't write there on a CPU (LOG.md)."""
    from bitsandbytes import functional

    weight = bnb_weight(w4)
    if out is None:
        return lambda: functional.dequantize_4bit(weight.data, weight.quant_state)
    return lambda: out.copy_(functional.dequantize_4bit(weight.data, weight.quant_state))


def bnb_dequantize_4bit_kernel(w4: NF4Weight, out: torch.Tensor) -> Run:
    """Its C kernel straight into ``out`` (bf16), past its Python: the fastest that it can be."""
    import bitsandbytes
    from bitsandbytes.cextension import lib

    try:
        kernel = lib.cdequantize_blockwise_cpu_nf4_bf16
    except AttributeError as missing:
        raise Unavailable(f"bitsandbytes {bitsandbytes.__version__} has no such CPU kernel") from missing
    weight, (rows, columns) = bnb_weight(w4), w4.shape
    state, absmax = weight.quant_state, torch.ones(w4.absmax.numel())
    tensors = (weight.data, absmax, out)  # alive as long as run is
    sizes = [ctypes.c_longlong(n) for n in (w4.block_size, rows, columns)]

    def run() -> torch.Tensor:
        nested = torch.ops.bitsandbytes.dequantize_blockwise(
            state.absmax, state.state2.absmax, state.state2.code, state.state2.blocksize, torch.float32
        )
        torch.add(nested, state.offset, out=absmax)
        kernel(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), *sizes)
        return out

    return run


def bnb_quantize_blockwise(x: torch.Tensor, block_size: int) -> Run:
    """-> (codes, QuantState)."""
    from bitsandbytes import functional

    return lambda: functional.quantize_blockwise(x, blocksize=block_size)


def bnb_dequantize_blockwise(codes: torch.Tensor, absmax: torch.Tensor, block_size: int) -> Run:
    """-> fp32, fresh."""
    from bitsandbytes import functional

    return lambda: functional.dequantize_blockwise(codes, absmax=absmax, blocksize=block_size)


# ---- linear layers ----------------------------------------------------------------------------------------------------------


def bnb_linear(w4: NF4Weight, compute_dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' Linear4bit on w4's bytes, in training mode, without bias."""
    import bitsandbytes

    n, k = w4.shape
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
    layer.weight = bnb_weight(w4)
    layer.quant_state = layer.weight.quant_state
    return layer.train()


def bnb_linear_packed(w4: NF4Weight, x: torch.Tensor) -> Run:
    """Linear4bit in eval mode, whose first call repacks the weight for its AVX512-BF16 kernel and rounds absmax to bf16."""
    from bitsandbytes.functional import has_avx512bf16

    n, k = w4.shape
    if isa.forced():
        raise Unavailable(f"needs AVX512-BF16, and {isa.forced()} is forced")
    if not has_avx512bf16():
        raise Unavailable("needs AVX512-BF16")
    if n % 32 or k % w4.block_size:
        raise Unavailable(f"crashes unless n % 32 == 0 and k % {w4.block_size} == 0")
    layer = bnb_linear(w4, x.dtype).eval()
    return no_grad(lambda: layer(x))


def dense_linear(w4: NF4Weight, dtype: torch.dtype) -> nn.Linear:
    """torch's linear with W written out in ``dtype``."""
    n, k = w4.shape
    layer = nn.Linear(k, n, bias=False, device="meta")
    layer.weight = nn.Parameter(w4.dequantize(dtype), requires_grad=False)
    return layer


def torch_int4(w: torch.Tensor, x: torch.Tensor, group: int = 64) -> tuple[Run, torch.Tensor]:
    """torch's weight-only int4 product on the same W (n, k), rounded to its own evenly spaced 16 values a group; and that W."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise Unavailable(f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu")
    n, k = w.shape
    groups = w.float().view(n, k // group, group)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-6).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    wide_scale, wide_zero = scale.float()[..., None], zero.float()[..., None]
    codes = ((groups - wide_zero) / wide_scale + 8).round_().clamp_(0, 15)
    used = ((codes - 8) * wide_scale + wide_zero).view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(n, k).int(), 1)
    constants = torch.stack((scale, zero), -1).transpose(0, 1).contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, constants), used


def hf_lora(base: nn.Module, A: torch.Tensor, B: torch.Tensor, scale: float, dropout: float = 0.0) -> tuple[nn.Module, Any, Any]:
    """HF peft's LoRA around ``base`` with our A (r, k) and B (n, r): the layer and its two parameters, fp32 as it makes them."""
    import peft

    model = nn.Sequential()
    model.base = base
    model.is_loaded_in_4bit = type(base).__name__ == "Linear4bit"
    rank = A.shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=dropout, target_modules=["base"])
    layer = peft.inject_adapter_in_model(config, model).base.train()
    parameters = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for parameter, ours in zip(parameters, (A, B), strict=True):
        parameter.data.copy_(ours)
    return layer, *parameters


def no_grad(run: Run) -> Run:
    """The call without autograd."""
    return torch.no_grad()(run)


def forward_backward(
    layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, dy: torch.Tensor
) -> Run:
    """-> y, dx, dA, dB of one training step through a layer inside a model."""
    x = x.detach().requires_grad_()

    def run() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        return (y.detach(), *torch.autograd.grad(y, (x, A, B), dy))

    return run
