"""A training step on the meta device, entered in a ledger: forward, loss, backward, and what the optimizer keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from peftk.methods.adalora_layer import AdaLoraLayer
from peftk.nn import NF4Linear
from peftk.ops import dispatch
from peftk.optim import moments
from peftk.planner.ledger import FusedAttention, Ledger, Moment

WEIGHTS, WEIGHTS4, CONSTANTS, ADAPTERS = "weights, dense", "weights, 4 bits", "quantisation constants", "adapters"
GRADIENTS, OPTIMIZER, IMPORTANCES = "gradients", "optimizer states", "AdaLoRA's importances"
ACTIVATIONS, LOGITS, INPUT_GRADIENTS = "activations", "logits", "input gradients"
KINDS = (WEIGHTS4, CONSTANTS, WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER, IMPORTANCES, ACTIVATIONS, INPUT_GRADIENTS, LOGITS)

ADAMW = moments.AVERAGE, moments.SQUARE
MIN_8BIT_SIZE = 4096  # elements; peftk.optim.AdamW's own default
Loss = Callable[[nn.Module], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]  # model -> (input_ids, labels) -> scalar


@dataclass(frozen=True)
class Step:
    """What a step computes, on one device."""

    batch: int = 1  # sequences at a time
    length: int = 512  # tokens of each
    checkpointing: bool = False
    grad_accum: int = 1  # from 2 on gradients lie there while activations do
    optimizer_bits: int = 32  # of the moments: 32 or 8
    device_type: str = "cuda"  # cpu or cuda: the two run some layers in different ways


def run(model: nn.Module, loss: Loss, step: Step) -> list[Moment]:
    """The fullest moment of each phase of the second step and all later ones. The model lies on the meta device, in training
    mode, what is trained requires a gradient; it is changed no further. ValueError for a model with memory."""
    if any(not p.is_meta for p in model.parameters()):
        raise ValueError("model: expected one on the meta device, got parameters with memory")
    head = model.get_output_embeddings()
    ledger = Ledger(head.weight.shape[0] if head is not None else -1)
    states = enter_model(ledger, model, step.optimizer_bits)
    importances = importances_of(model)
    ledger.own(importances, IMPORTANCES)
    ids = torch.empty(step.batch, step.length, dtype=torch.int64, device="meta")
    with dispatch.meta_stands_for(step.device_type), _checkpointing(model, ledger, step), _attention(step):
        with ledger:
            objective = loss(model)
        ledger.entries = [entry for entry in ledger.entries if entry.end is None]  # what choosing the loss took doesn't count
        for _ in range(min(step.grad_accum, 2)):
            _forward_backward(ledger, model, objective, ids)
    ledger.phase = "optimizer step"
    ledger.own(importances_of(model)[::2], IMPORTANCES)  # those of this step, beside their two averages
    del states, importances
    for parameter in model.parameters():
        parameter.grad = None
    return ledger.moments()


def enter_model(ledger: Ledger, model: nn.Module, optimizer_bits: int) -> list[torch.Tensor]:
    """Parameters, constants, other buffers and the optimizer's moments, which are returned: they live while the list does."""
    for kind, tensors in kinds_of_tensors(model).items():
        ledger.own((tensor for tensor in tensors if ledger.is_new(tensor)), kind)
    states = optimizer_states([p for p in model.parameters() if p.requires_grad], optimizer_bits)
    ledger.own(states, OPTIMIZER)
    return states


def kinds_of_tensors(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """Parameters and buffers by kind, each once."""
    parameters = list(model.parameters())
    quantised = [module for module in model.modules() if isinstance(module, NF4Linear)]
    found = {
        WEIGHTS4: [module.weight for module in quantised],
        CONSTANTS: [t for module in quantised for t in module.constants()],
        ADAPTERS: [p for p in parameters if p.requires_grad],
    }
    entered = {id(tensor) for tensors in found.values() for tensor in tensors}
    found[WEIGHTS] = [tensor for tensor in (*parameters, *model.buffers()) if id(tensor) not in entered]
    if all(p.requires_grad for p in parameters):  # no base: the whole model is trained
        found[WEIGHTS] += found.pop(ADAPTERS)
    return found


def optimizer_states(trained: list[nn.Parameter], bits: int) -> list[torch.Tensor]:
    """The moments that peftk.optim.AdamW makes, on the meta device; the tables of 8-bit values, shared by all, left out."""
    found: list[torch.Tensor] = []
    for parameter in trained:
        own = 32 if parameter.numel() < MIN_8BIT_SIZE else bits
        state = moments.fresh(parameter.detach(), ADAMW, own, torch.full)
        found += [state[name] for name in moments.names(ADAMW, own)]
    return found


def importances_of(model: nn.Module) -> list[torch.Tensor]:
    """The two averages that peftk.methods.rank_allocator keeps of every number in AdaLoRA's triplets, fp32."""
    parameters = [
        p for layer in model.modules() if isinstance(layer, AdaLoraLayer) for p in layer.parameters() if p.requires_grad
    ]
    return [torch.empty_like(p, dtype=torch.float32) for p in parameters for _ in range(2)]


def _forward_backward(ledger: Ledger, model: nn.Module, objective: Callable, ids: torch.Tensor) -> None:
    ledger.phase = "forward"
    with ledger, ledger.during(ACTIVATIONS):
        total = objective(ids, ids)
    ledger.phase = "backward"
    first = len(ledger.entries)
    with ledger, ledger.during(INPUT_GRADIENTS):
        total.backward()
    ledger.own([p.grad for p in model.parameters() if p.grad is not None], GRADIENTS)
    # Two halves, since the backward pass is fullest at its start (activations) or at its end (gradients of parameters): each of
    # these is affine in the number of layers, their maximum is not.
    for entry in ledger.entries[(first + len(ledger.entries)) // 2 :]:
        entry.phase = "backward, first layers"


@contextlib.contextmanager
def _attention(step: Step) -> Iterator[None]:
    with FusedAttention(dropout=step.device_type != "cpu"):
        yield


@contextlib.contextmanager
def _checkpointing(model: nn.Module, ledger: Ledger, step: Step) -> Iterator[None]:
    """What is computed again is activations, and on the backward pass's own thread attention has to be told anew. ValueError for
    a model that has no checkpointing."""
    if not step.checkpointing:
        yield
        return

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with ledger.during(ACTIVATIONS), _attention(step):
            yield

    if not hasattr(model, "gradient_checkpointing_enable"):
        raise ValueError(f"checkpointing: expected False for a {type(model).__name__}, which has none, got True")
    kwargs = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), again())}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
