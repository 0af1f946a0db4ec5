"""Where torch's dense product outruns ours: 16-bit x of many rows, on a processor whose tile registers torch multiplies with and
our kernels don't. There a weight is decoded first, as bitsandbytes does it: taking over must make nothing slower."""

from __future__ import annotations

import os

import torch

from peftk.native import native

# Rows of x from which on decoding all of W (2048x2048) and a dense product take less time: between 24 and 32 in bf16, some 32 in
# fp16, forward and dx, on a Xeon with AMX, one thread. At 512 rows ours takes 44 ms and that 6 ms in bf16, 30 and 6 in fp16.
MANY_ROWS = 32


def dense_dtypes() -> frozenset[torch.dtype]:
    """Of x, for which that is so on this machine."""
    tiles_of_torch = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if not tiles_of_torch or not ("AMX" in limit or limit in ("DEFAULT", "ALL")):
        return frozenset()
    return frozenset({torch.float16} if native().tier().startswith("amx") else {torch.bfloat16, torch.float16})


def is_dense(x: torch.Tensor, dtypes: frozenset[torch.dtype]) -> bool:
    """Whether a product with x (..., k) is one of those; ``dtypes`` as ``dense_dtypes`` gives them."""
    return x.dtype in dtypes and x.numel() >= MANY_ROWS * x.shape[-1]
