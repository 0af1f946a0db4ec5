"""Optimizers whose state fits: AdamW with moments in 32 or 8 bits, paged where they don't fit."""

from peftk.optim.adamw import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit
from peftk.optim.layouts import to_bitsandbytes, to_torch

__all__ = ["AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "to_bitsandbytes", "to_torch"]
