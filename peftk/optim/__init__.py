"""Optimizers whose state fits: AdamW with moments in 32 or 8 bits."""

from peftk.optim.adamw import AdamW, AdamW8bit
from peftk.optim.layouts import to_bitsandbytes, to_torch
from peftk.optim.loraplus import loraplus_groups

__all__ = ["AdamW", "AdamW8bit", "loraplus_groups", "to_bitsandbytes", "to_torch"]
