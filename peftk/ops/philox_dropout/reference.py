"""The definition: 32-bit words in int64 arithmetic."""

import torch

from peftk.ops.dispatch import Implementation, no_reason

ROUNDS = 10
FACTORS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of the product, by halves: the whole product would overflow int64."""
    low, high = constant * (word & 0xFFFF), constant * (word >> 16)
    middle = high + (low >> 16)
    return middle >> 16, (middle << 16 & _MASK) | (low & 0xFFFF)


def philox(count: int, seed: int, device: torch.device) -> torch.Tensor:
    """(count,) int64 words in [0, 2^32)."""
    return philox_words(torch.arange((count + 3) // 4, device=device), seed).view(-1)[:count]


def philox_words(counter: torch.Tensor, seed: int) -> torch.Tensor:
    """(n,) int64 -> (n, 4) int64 words in [0, 2^32): those of elements 4 * counter … 4 * counter + 3."""
    c = [counter & _MASK, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(ROUNDS):
        (hi0, lo0), (hi1, lo1) = _multiply(FACTORS[0], c[0]), _multiply(FACTORS[1], c[2])
        c = [hi1 ^ c[1] ^ k0, lo1, hi0 ^ c[3] ^ k1, lo0]
        k0, k1 = (k0 + KEY_STEPS[0]) & _MASK, (k1 + KEY_STEPS[1]) & _MASK
    return torch.stack(c, 1)


def run(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    keep = philox(x.numel(), seed, x.device).view(x.shape) >= int(p * 2**32)
    scale = torch.where(keep, torch.tensor(1 / (1 - p), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device), 0.0)
    return (x.to(scale.dtype) * scale).to(x.dtype)


IMPLEMENTATION = Implementation("reference", run, no_reason)
