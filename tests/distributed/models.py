"""A small decoder without transformers, whose import would cost every process seconds; its batch and its training."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import peftk

HEADS, TOKENS = 4, 64  # divisible by 4 processes
ROWS = 8


class Block(nn.Module):
    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width, bias=bias), nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, x.shape[-1] // HEADS)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.silu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self, blocks: int = 1, bias: bool = False, width: int = 64):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, width)
        self.blocks = nn.ModuleList([Block(width, bias) for _ in range(blocks)])
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, TOKENS, bias=False)
        self.checkpointing = False

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(self.norm(x))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.logits(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def decoder(
    config=None, base: str = "nf4", dtype=torch.float32, block_size: int = 64, double_quant: bool = True, **facts
) -> Decoder:
    """The same in every process: with adapters in which nothing is zero."""
    torch.manual_seed(0)
    model = Decoder(**facts)
    with torch.no_grad():
        for parameter in model.parameters():
            # every row its own scale: with equal ones a wrong block constant would hide
            parameter.mul_(torch.exp(torch.randn(len(parameter), *[1] * (parameter.dim() - 1)))) if parameter.dim() > 1 else None
    model.to(dtype)
    if base == "nf4":
        peftk.quantize_model(model, ("head",), block_size, double_quant, progress=False)
    peftk.attach(model, config or peftk.LoraConfig(r=8, target_modules="all-linear", exclude_modules="head"))
    with torch.no_grad():
        for parameter in peftk.trainable_parameters(model):
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model.train()


def batch() -> torch.Tensor:
    return torch.randint(0, TOKENS, (ROWS, 9), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, ids: torch.Tensor, optimizer: torch.optim.Optimizer, steps: int = 2) -> torch.Tensor:
    """The losses, (steps,)."""
    losses = []
    for _ in range(steps):
        loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def adamw(model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options) -> torch.optim.Optimizer:
    return kind(peftk.trainable_parameters(model), lr=1e-2, **options)


def adalora() -> peftk.AdaLoraConfig:
    """Prunes at steps 2, 3 and 4 of 4."""
    return peftk.AdaLoraConfig(init_r=6, target_r=3, tinit=1, total_step=4, exclude_modules="head")
