"""Tensors of which each process holds a part (torch's DTensor): the part, the whole, and a whole put in a part's place.

Plain tensors pass through all of it; torch.distributed.tensor, which takes a second to import, is never imported for them.
"""

from __future__ import annotations

import sys

import torch


def is_shard(tensor: torch.Tensor | None) -> bool:
    """Whether the tensor is a DTensor."""
    if tensor is None or type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_whole(module: torch.nn.Module, argument: str, instead: str, path: str = "") -> None:
    """ValueError where this process holds only parts of a module's parameters: names the first, and what to do instead."""
    for name, parameter in module.named_parameters(path):
        if is_shard(parameter):
            many = parameter.device_mesh.size()
            raise ValueError(f"{argument}: expected whole parameters, got {name}, split among {many} processes; {instead}")


def part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds, not a copy and without a gradient."""
    return tensor.detach().to_local() if is_shard(tensor) else tensor


def factor(tensor: torch.Tensor) -> torch.Tensor:
    """What this process multiplies with where each one computes a part of the product. The gradient of a replicated factor is
    then a sum over the processes."""
    if not is_shard(tensor) or not (tensor.requires_grad and torch.is_grad_enabled()):
        return part(tensor)
    from torch.distributed.tensor import Partial

    gradients = [Partial() if place.is_replicate() else place for place in tensor.placements]
    return tensor.redistribute(placements=tensor.placements).to_local(grad_placements=gradients)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, gathered: every process must call this."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def as_split(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A split tensor in another one's split, what is sent included."""
    return tensor.redistribute(placements=other.placements) if is_shard(other) else tensor


def placed_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same in every process, split as ``other`` is: nothing is sent."""
    if not is_shard(other) or is_shard(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def shard_like(part: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that is split as ``other`` is, as that tensor; ``part`` itself where other is plain."""
    if not is_shard(other):
        return part
    from torch.distributed.tensor import DTensor

    facts = {"shape": other.shape, "stride": other.stride()}
    return DTensor.from_local(part, other.device_mesh, other.placements, run_check=False, **facts)


def smallest(number: int, device: torch.device) -> int:
    """The smallest of what the processes say: every one must call this."""
    said = torch.tensor(number, device=device)
    torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MIN)
    return int(said)
