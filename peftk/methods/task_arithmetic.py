"""Sums of tensors that differ in what they stand for: pruning, electing a sign, weighting.

Task arithmetic (Ilharco et al. 2023), TIES (Yadav et al. 2023, section 3), DARE (Yu et al. 2024, section 3); the order of the
steps and the weights' place are HF peft's, so that one name means one thing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MAJORITY = ("total", "frequency")


def weighted_sum(
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    method: str,
    density: float | None,
    majority: str,
    generator: torch.Generator,
) -> torch.Tensor:
    """Tensors of one shape -> one of that shape, by one of METHODS. ``density``: the share of elements that pruning keeps, in
    (0, 1]; "linear" prunes nothing. ``generator``: on the CPU, of DARE's masks."""
    if method == "linear":
        kept = torch.stack(list(tensors))
    elif method.startswith("dare"):
        kept = torch.stack([_at_random(t, density, generator) for t in tensors])
    else:
        kept = torch.stack([_largest(t, density) for t in tensors])
    factors = torch.tensor(weights, dtype=kept.dtype, device=kept.device).view(-1, *[1] * (kept.dim() - 1))
    if not method.endswith("ties"):
        return (kept * factors).sum(0)
    agrees = _with_the_majority(kept, majority)
    return (kept * factors * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """The int(density * numel) elements of the largest magnitude; zeros elsewhere."""
    flat = tensor.flatten()
    places = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, places, flat[places]).view_as(tensor)


def _at_random(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Each element with probability density, divided by it: the mean stays."""
    mask = torch.empty(tensor.shape).fill_(density).bernoulli(generator=generator)
    return tensor * mask.to(tensor.device, tensor.dtype) / density


def _with_the_majority(tensors: torch.Tensor, majority: str) -> torch.Tensor:
    """(tensors, ...) -> bool: whose sign is the elected one, that of the sum ("total") or of most ("frequency"); a tie is +."""
    signs = tensors.sign()
    votes = tensors.sum(0) if majority == "total" else signs.sum(0)
    return signs == torch.where(votes >= 0, 1.0, -1.0).to(signs.dtype)
