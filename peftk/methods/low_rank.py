"""The two factors of a low-rank branch as matrices, whatever layer they stand in; and the best factors of a lower rank."""

from __future__ import annotations

import torch

# By what the path of a weight has beyond the layer's: A (matrices, r, k) and B (matrices, n, r), one matrix for most layers.
Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]


class LowRank:
    """For layers whose ``adapter_parameters`` start with A and B; a kernel's extents count as k."""

    scaling: dict[str, float]

    def matrices(self, name: str) -> Matrices:
        """The factors of what the adapter adds to the weight, without the scale; fp32 also where they are stored in 16 bits."""
        A, B = (factor.detach().flatten(1)[None].to(self.factor_dtype()) for factor in self._matrix_factors(name))
        return {"": (A, B)}

    def product_matrix(self, name: str) -> torch.Tensor:
        """s B A (n, k)."""
        A, B = (factor[0] for factor in self.matrices(name)[""])
        return (B @ A).mul_(self.scaling[name])

    def matrix_scale(self, name: str, label: str) -> float:
        """The scale of ``matrices(name)[label]``."""
        return self.scaling[name]

    @torch.no_grad()
    def set_matrices(self, name: str, matrices: Matrices) -> None:
        """Copy values of the adapter's shapes into it."""
        for parameter, values in zip(self.adapter_parameters(name), matrices[""], strict=True):
            parameter.copy_(values.view_as(parameter))

    def _matrix_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        A, B = self.adapter_parameters(name)[:2]
        return A, B


def truncate(A: torch.Tensor, B: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best A' (…, r', k) and B' (…, n, r') for B A, r' = min(rank, r, n, k), by the SVD of an r x r matrix: B = Qb Rb,
    A^T = Qa Ra, and B A = Qb (Rb Ra^T) Qa^T. The singular values go into B'."""
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.mT, full_matrices=False)
    return Vh[..., :rank, :] @ Qa.mT, Qb @ (U[..., :rank] * S[..., None, :rank])


def low_rank_of(w: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best A (r', k) and B (n, r') for w (n, k), r' = min(rank, n, k). The singular values go into B."""
    U, S, Vh = torch.linalg.svd(w, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]
