"""Optimizers whose state fits: AdamW, Lion and AdEMAMix with moments in 32 or 8 bits, paged where they don't fit."""

from peftk.optim.adamw import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit
from peftk.optim.ademamix import AdEMAMix, AdEMAMix8bit, PagedAdEMAMix, PagedAdEMAMix8bit
from peftk.optim.layouts import to_bitsandbytes, to_torch
from peftk.optim.lion import Lion, Lion8bit, PagedLion, PagedLion8bit

__all__ = [
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdamW",
    "AdamW8bit",
    "Lion",
    "Lion8bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLion",
    "PagedLion8bit",
    "to_bitsandbytes",
    "to_torch",
]
