"""The first principal components of rows that come batch by batch (Ross et al. 2008, section 3), in memory of their own size."""

from __future__ import annotations

import torch

_EXACT = 512  # up to this many rows or columns a whole SVD is cheap
_SEED = 0  # of the randomised one


class IncrementalSVD:
    """``count`` components of rows (m, k): ``components`` (q, k) and ``values`` (q,), fp32, largest first, q <= count.

    After a batch they are those of [diag(values) components; X - its mean; a row for the shift of the mean].
    """

    def __init__(self, count: int):
        self.count, self.seen = count, 0
        self.components = self.values = self.mean = torch.empty(0)
        self.total = 0.0  # the sum of all squared distances from the mean
        self.settled = torch.zeros(0, dtype=torch.bool)  # components that the last batch left where they were

    @torch.no_grad()
    def update(self, x: torch.Tensor, tau: float) -> None:
        """Take in a batch (m, k). ``settled``: those whose cosine with the one before is at least ``tau``."""
        x = x.float()
        m, mean = x.shape[0], x.mean(0)
        new = x - mean
        if self.seen:
            shift = (self.seen * m / (self.seen + m)) ** 0.5 * (self.mean - mean)
            new = torch.cat([new, shift[None]])
            self.mean = self.mean + (mean - self.mean) * (m / (self.seen + m))
        else:
            self.components, self.values, self.mean = x.new_zeros(0, x.shape[1]), x.new_zeros(0), mean
        self.seen += m
        self.total += new.double().square().sum().item()
        before = self.components
        self.values, self.components = _svd(torch.cat([self.values[:, None] * before, new]), self.count)
        both = min(len(before), len(self.components))
        cosines = (before[:both] * self.components[:both]).sum(1).abs()
        self.settled = torch.zeros(len(self.components), dtype=torch.bool)
        self.settled[:both] = cosines.cpu() >= tau

    def shares(self) -> torch.Tensor:
        """Of the rows' whole variance, what each component explains: (q,)."""
        return self.values.square() / max(self.total, torch.finfo(torch.float32).tiny)


def _svd(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest ``count`` singular values, and their right vectors (count, k)."""
    if min(rows.shape) <= max(_EXACT, 2 * count):
        _, values, vt = torch.linalg.svd(rows, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
            torch.manual_seed(_SEED)
            _, values, v = torch.svd_lowrank(rows, 2 * count, niter=4)
            vt = v.T
    return values[:count], vt[:count]
