"""AdaLoRA's regulariser (Zhang et al. 2023, equation 4): P^T P and Q Q^T should be I.

As in the authors' code and in HF peft the mean over all matrices of the norm || . - I ||_F; the paper sums its squares.
"""

from __future__ import annotations

import torch
from torch import nn

from peftk.methods.adalora import config_of, names_in
from peftk.methods.adalora_layer import AdaLoraLayer
from peftk.methods.attach import attached, wrappers
from peftk.shards import placed_like, whole


def orthogonality_loss(model: nn.Module, adapter_name: str | None = None) -> torch.Tensor:
    """What to add to the loss: orth_reg_weight times the mean distance from orthogonality, a scalar with gradients.

    Of ``adapter_name``, or of all active AdaLoRA adapters together. ValueError where there is none. ``adalora_schedule`` adds
    the gradient by itself, unless it is told not to.
    """
    state = attached(model)
    names = [name for name in names_in(model) if name in state.active] if adapter_name is None else [adapter_name]
    if not names:
        raise ValueError(f"model: expected an active AdaLoRA adapter, got {', '.join(state.active)} as active")
    return sum(_weighted_mean(factors(model, name), config_of(model, name).orth_reg_weight) for name in names)


def factors(model: nn.Module, adapter_name: str) -> list[tuple[torch.Tensor, bool]]:
    """Each A (r, k) and B (n, r) of the adapter that has rows left, and whether its vectors are columns."""
    found = []
    for _, layer in wrappers(model, AdaLoraLayer):
        if adapter_name in layer.adapter_names() and layer.rank(adapter_name):
            A, _, B = layer.triplets(adapter_name)
            found += [(A, False), (B, True)]
    return found


def _distance(vectors: torch.Tensor) -> torch.Tensor:
    """Gram matrix of the rows - I."""
    return vectors @ vectors.T - torch.eye(len(vectors), device=vectors.device, dtype=vectors.dtype)


def _weighted_mean(factors: list[tuple[torch.Tensor, bool]], weight: float) -> torch.Tensor:
    wholes = [(whole(factor), is_columns) for factor, is_columns in factors]
    norms = [_distance(factor.T if is_columns else factor).norm() for factor, is_columns in wholes]
    return weight * sum(norm.to(norms[0].device) for norm in norms) / len(norms) if norms else torch.zeros(())


@torch.no_grad()
def add_gradient(factors: list[tuple[torch.Tensor, bool]], weight: float | torch.Tensor) -> None:
    """Add the gradient of weight * mean || V V^T - I ||_F, which is weight * 2 D V / || D ||_F / count with D = V V^T - I; 0
    where D is. A factor that is split among processes is gathered for it."""
    for factor, is_columns in factors:
        gathered = whole(factor)
        vectors = gathered.T if is_columns else gathered
        distance = _distance(vectors)
        gradient = (distance @ vectors) * (2 * weight / len(factors) / distance.norm().clamp(min=torch.finfo(factor.dtype).tiny))
        gradient = placed_like(gradient.T if is_columns else gradient, factor)
        factor.grad = gradient.contiguous() if factor.grad is None else factor.grad.add_(gradient)
