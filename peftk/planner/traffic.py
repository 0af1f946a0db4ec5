"""What each device sends in a training step when several share the work, as torch's engines send it.

A collective's bytes are those of the whole: what an all-gather returns, what a reduce-scatter or an all-reduce takes. ``sent``
says what one device puts on the wire for it by ring algorithms, which send the least: (n-1)/n of the whole, an all-reduce twice
that. fully_shard's policy is taken to be the examples': what it gathers is cast to the dtype in which the model computes, and
gradients are summed in fp32; DDP and tensor parallelism sum them in their own dtype. bench/layers/bench_distributed.py counts the
collectives that really run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from peftk.nn.tensor_parallel import COLUMNS, ROWS, split_layers
from peftk.planner.step import Step

GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"
REDUCE_BYTES = 4  # fp32


def sent(bytes_of: Mapping[str, int], gpus: int) -> dict[str, int]:
    """By kind of collective, what one of so many devices sends for so many bytes."""
    return {kind: (2 if kind == REDUCE else 1) * n * (gpus - 1) // gpus for kind, n in bytes_of.items()}


def of_ddp(model: nn.Module, step: Step) -> Counter[str]:
    """Gradients, summed at each of ``step.grad_accum`` backward passes, as without ``no_sync``."""
    return Counter({REDUCE: step.grad_accum * sum(p.nbytes for p in model.parameters() if p.requires_grad)})


def of_fsdp(model: nn.Module, layers: Iterable[nn.Module], step: Step, gpus: int, dtype: torch.dtype) -> Counter[str]:
    """A layer's weights are gathered before its forward and its backward pass (which computes it again where activations are
    checkpointed), the rest once; gradients are summed and scattered."""
    found: Counter[str] = Counter()
    layers = list(layers)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    groups = [(2, list(layer.parameters())) for layer in layers]
    groups.append((1, [p for p in model.parameters() if id(p) not in inside]))
    for times, parameters in groups:
        found[GATHER] += times * sum(gpus * own_elements(p, gpus) * gathered_size(p, dtype) for p in parameters)
        found[SCATTER] += sum(gpus * own_elements(p, gpus) * REDUCE_BYTES for p in parameters if p.requires_grad)
    return Counter({kind: step.grad_accum * n for kind, n in found.items() if n})


def of_tensor_parallel(model: nn.Module, step: Step, dtype: torch.dtype) -> Counter[str]:
    """Outputs of the layers that are split by columns, gradients of the inputs that layers split by rows share, and gradients of
    the adapters' factors that stay whole; peftk.integrations.tensor_parallel.plan_of splits so. ``model`` is one device's own
    (peftk.planner.narrow)."""
    dims = dict(split_layers(model))
    forward = sum(dim == COLUMNS for dim in dims.values())
    # What a checkpointed layer makes last isn't computed again: nothing of it is kept for the backward pass.
    again = forward - model.config.num_hidden_layers if step.checkpointing else 0
    shared = len({path.rpartition(".")[0] for path, dim in dims.items() if dim == ROWS})
    if not (step.checkpointing or model.get_input_embeddings().weight.requires_grad):
        shared -= 1  # nothing below the first layer asks for a gradient; with checkpointing transformers makes its input ask
    factors = sum(p.nbytes for path, dim in dims.items() for p in _whole_factors(model.get_submodule(path), dim))
    activations = step.batch * step.length * model.config.hidden_size * dtype.itemsize
    return Counter({REDUCE: step.grad_accum * ((forward + again + shared) * activations + factors)})


def _whole_factors(layer: nn.Module, dim: int) -> list[nn.Parameter]:
    """Of an adapter all but the one of A and B that is split with W."""
    split = {ROWS: "lora_B", COLUMNS: "lora_A"}[dim]
    return [p for name, p in layer.named_parameters() if name.startswith("lora_") and not name.startswith(split)]


def own_elements(parameter: torch.Tensor, gpus: int) -> int:
    """The first device's, by rows; others are filled up to as many where they are sent."""
    rows = len(parameter) if parameter.dim() else 1
    return -(-rows // gpus) * (parameter.numel() // max(rows, 1))


def gathered_size(parameter: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes of an element as it is sent."""
    return (dtype if parameter.is_floating_point() else parameter.dtype).itemsize
