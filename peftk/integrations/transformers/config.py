"""What ``from_pretrained`` is told, and what ``config.json`` keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftk.format.code4 import BLOCK_SIZES, CODES4

METHOD = "peftk_nf4"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """Linear layers (transformers' Conv1D too) as ``peftk.nn.NF4Linear``, each quantised as it is read.

    ``modules_to_not_convert``: names, paths or patterns as in transformers' other configs; None leaves the output head dense, and
    what is tied to it. Modules that the model keeps in fp32 and weights that are shared stay dense in any case.
    ``compute_dtype``: None computes in x.dtype. ``block_size`` and ``quant_type`` as in ``peftk.quantize_nf4``. ValueError or
    TypeError names the argument.
    """

    def __init__(
        self,
        block_size: int = 64,
        double_quant: bool = True,
        modules_to_not_convert: Sequence[str] | None = None,
        compute_dtype: torch.dtype | str | None = None,
        quant_type: str = "nf4",
        quant_method: str = METHOD,
    ):
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size: expected one of {BLOCK_SIZES}, got {block_size!r}")
        if quant_type not in CODES4:
            raise ValueError(f"quant_type: expected one of {sorted(CODES4)}, got {quant_type!r}")
        if not isinstance(double_quant, bool):
            raise TypeError(f"double_quant: expected a bool, got {double_quant!r}")
        if quant_method != METHOD:
            raise ValueError(f"quant_method: expected {METHOD!r}, got {quant_method!r}")
        names = modules_to_not_convert
        if names is not None and not _are_names(names):
            raise TypeError(f"modules_to_not_convert: expected a list of names or None, got {names!r}")
        self.quant_method = METHOD
        self.block_size, self.double_quant, self.quant_type = block_size, double_quant, quant_type
        self.modules_to_not_convert = None if names is None else list(names)
        self.compute_dtype = _dtype(compute_dtype)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        dtype = self.compute_dtype
        return vars(self) | {"compute_dtype": None if dtype is None else str(dtype).removeprefix("torch.")}


def _are_names(names: object) -> bool:
    return isinstance(names, Iterable) and not isinstance(names, str) and all(isinstance(name, str) for name in names)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES:
        raise ValueError(f"compute_dtype: expected one of {', '.join(map(str, _DTYPES))} or None, got {dtype!r}")
    return found
