"""A 4-bit model made ready for torch's own sharding of parameters (``fully_shard``)."""

from __future__ import annotations

from torch import nn

from peftk.nn.base import check_module
from peftk.nn.nf4_linear import NF4Linear


def constants_as_parameters(model: nn.Module) -> nn.Module:
    """Make the blocks' constants of every NF4Linear in ``model`` Parameters, so that ``fully_shard`` splits them as it does the
    codes: call it before. Returns the model.

    Without it the constants stay whole in every process: 1/32 of the codes' bytes double quantised, 1/8 otherwise, at block size
    64. They are uint8 and frozen: no mixed-precision policy casts them. What stays whole with it is absmax_scale, 1/2048. The
    layers' state dicts have an entry a tensor from then on (nn/sharded_state.py), which torch.distributed.checkpoint can reshard.
    """
    check_module(model)
    for module in model.modules():
        if isinstance(module, NF4Linear):
            module.hold_absmax_as_parameter()
    return model
