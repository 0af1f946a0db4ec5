"""Next-token cross-entropy without the logits of all tokens in memory at once.

Head and loss go through in chunks of rows: logits of a chunk, its loss, its gradient for the hidden states, gone. The head is
frozen, so the gradient of the hidden states (t, d) is all that stays; with a vocabulary of 49152 the logits of 8192 tokens
would take 1.6 GB in fp32, a chunk takes CHUNK_BYTES.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from peftk.methods.attach import wrappers
from peftk.methods.input_prompts import InputPrompts

logger = logging.getLogger("peftk.cli")

IGNORED = -100  # label of a token that no loss is taken on
CHUNK_BYTES = 32 << 20  # fp32 logits in memory at a time
PROBE_TOKENS = 8
PROBE_TOLERANCE = 1e-2  # relative; bf16 logits differ by their rounding, another head formula by far more


class _HeadCrossEntropy(torch.autograd.Function):
    """sum over t of -log softmax(hidden W^T + bias)[target]; gradient for hidden only."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows):
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            target = targets[chunk, None]
            logits = functional.linear(hidden[chunk], weight, bias).float()
            log_sum = logits.logsumexp(1, keepdim=True)
            total += (log_sum - logits.gather(1, target)).sum()
            if gradient is not None:
                softmax = logits.sub_(log_sum).exp_()
                softmax.scatter_add_(1, target, torch.full_like(log_sum, -1.0))
                gradient[chunk] = softmax.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, d_total):
        (gradient,) = ctx.saved_tensors
        return gradient * d_total.to(gradient.dtype), None, None, None, None


def head_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, rows: int | None = None
) -> torch.Tensor:
    """Sum (fp32 scalar) of the cross-entropy of hidden @ weight.T + bias.

    hidden (t, d), weight (v, d), bias (v,) frozen, targets (t,) int64 with IGNORED where no loss is taken; ``rows`` at a time,
    None for as many as CHUNK_BYTES holds. Differentiable once, in hidden. ValueError where weight or bias wants a gradient.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight, bias: expected a frozen head, got one that requires grad")
    counted = targets != IGNORED
    rows = rows or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return _HeadCrossEntropy.apply(hidden[counted], weight, bias, targets[counted], rows)


class LanguageModelLoss:
    """Summed next-token loss of a causal language model: (b, l) input_ids and labels -> fp32 scalar.

    Chunked where the logits are what a plain frozen linear head makes of what it is given, which a probe confirms; otherwise
    ``why_whole`` says why the model's own loss, over whole logits, is taken. The first real token of a row has no
    loss, even where virtual tokens stand before it.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.why_whole = _why_not_chunked(model)
        if self.why_whole:
            logger.warning("whole logits are kept in memory for the loss: %s", self.why_whole)

    def __call__(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.why_whole:
            labels = torch.cat([torch.full_like(labels[:, :1], IGNORED), labels[:, 1:]], dim=1)
            mean = self.model(input_ids=input_ids, labels=labels, use_cache=False).loss
            return mean.float() * count_targets(labels)
        head = self.model.get_output_embeddings()
        hidden = _given_to(head, self.model, input_ids)[:, -labels.shape[1] : -1]
        return head_cross_entropy(hidden.flatten(0, 1), head.weight, head.bias, labels[:, 1:].flatten())


def count_targets(labels: torch.Tensor) -> int:
    """How many tokens of labels (b, l) the loss is taken on; the first of a row has no predecessor."""
    return int((labels[:, 1:] != IGNORED).sum())


def _given_to(head: nn.Module, model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """What a call of the model gives to its head, (b, l, d); the head itself gets no row of it, so that no logits are made."""
    given: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        given.append(args[0])
        return (args[0][:, :0],)

    handle = head.register_forward_pre_hook(keep)
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        handle.remove()
    return given[0]


def _why_not_chunked(model: nn.Module) -> str:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return f"{type(model).__name__} does not tell its head from its body"
    if type(head) is not nn.Linear:
        return f"its head is {type(head).__name__}, not a plain nn.Linear"
    if any(p.requires_grad for p in head.parameters()):
        return "its head is trained"
    if any(prompts.arrange for _, prompts in wrappers(model, InputPrompts)):
        return "a template moves tokens"
    return _probe(model, head)


@torch.no_grad()
def _probe(model: nn.Module, head: nn.Linear) -> str:
    """Compare head(body(x)) with the model's own logits: some models scale or cap them. On the meta device, where nothing can be
    compared, the logits have to be the head's output itself."""
    vocabulary = head.weight.shape[0]
    tokens = torch.arange(PROBE_TOKENS, device=head.weight.device)[None] % vocabulary
    training = model.training
    model.eval()
    try:
        if head.weight.is_meta:
            return "" if _is_untouched(model, head, tokens) else f"{type(model).__name__} changes its logits after the head"
        own = model(input_ids=tokens, use_cache=False).logits.float()
        ours = head(_given_to(head, model, tokens)).float()
    finally:
        model.train(training)
    if own.shape != ours.shape or (own - ours).norm() > PROBE_TOLERANCE * own.norm():
        return f"{type(model).__name__} changes its logits after the head"
    return ""


def _is_untouched(model: nn.Module, head: nn.Linear, tokens: torch.Tensor) -> bool:
    """Whether the model's logits lie in the memory that its head has filled."""
    made: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: made.append(output))
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        handle.remove()
    return logits.untyped_storage()._cdata == made[0].untyped_storage()._cdata
