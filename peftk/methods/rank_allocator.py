"""Which triplets AdaLoRA keeps (Zhang et al. 2023, section 3.2 and 3.3).

I = |w dL/dw| a scalar; its moving average (sensitivity) and that of |I - average| (uncertainty), multiplied, are the scalar's
importance; a triplet's is that of its value plus the means over its two vectors. The b0 - b(t) least important triplets of all
matrices get the value 0: their vectors stay and are trained on, so that a value can grow again until the last pruning.

Where HF peft's RankAllocator is right the decisions are the same. b(t) is the authors' code's cubic curve; the paper's formula
does not start at b0. Among equals the last rows go first, of each matrix in turn, so that untrained triplets are pruned evenly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from peftk.methods.adalora_layer import Triplets
from peftk.shards import is_shard, placed_like, whole

if TYPE_CHECKING:
    from peftk.methods.adalora import AdaLoraConfig


class RankAllocator:
    """Keeps the statistics of one adapter's triplets, by the paths of their layers, and prunes them to the budget.

    ``history`` has (step, {path: rank}) for the start and each change; ``kept`` a mask of rows for each path.
    """

    def __init__(self, config: AdaLoraConfig, matrices: dict[str, Triplets]):
        self.config = config
        self.step = 0  # the last one seen
        self.is_final = config.rank_pattern is not None  # ranks stay as they are
        self.kept = {path: torch.ones(len(m.E), dtype=torch.bool) for path, m in matrices.items()}
        self.history: list[tuple[int, dict[str, int]]] = [(0, self.ranks())]
        self._widths = {path: (m.A.shape[1], m.B.shape[0]) for path, m in matrices.items()}  # k and n
        self._sensitivity: list[torch.Tensor] = []  # A, E, B of the first matrix, of the second, ...
        self._uncertainty: list[torch.Tensor] = []

    def ranks(self) -> dict[str, int]:
        """Triplets of each matrix that the last pruning left."""
        return {path: int(rows.sum()) for path, rows in self.kept.items()}

    @property
    def final_step(self) -> int:
        """The step of the last pruning."""
        return self.config.total_step - self.config.tfinal

    def budget(self, step: int) -> int:
        """b(t): triplets of all matrices after ``step``."""
        tinit, first = self.config.tinit, sum(len(rows) for rows in self.kept.values())
        last = self.config.target_r * len(self.kept)
        if step <= tinit:
            return first
        if step >= self.final_step:
            return last
        left = 1 - (step - tinit) / (self.final_step - tinit)
        return int((first - last) * left**3 + last)

    def advance(self, matrices: dict[str, Triplets], step: int) -> None:
        """One optimizer step: note the gradients, and prune where it is time.

        ValueError where no parameter has a gradient, or importances are not finite; nothing is pruned then.
        """
        is_last, is_due = step >= self.final_step, step > self.config.tinit and step % self.config.deltaT == 0
        if not self.is_final:
            if not is_last or not self._sensitivity:
                self._observe(matrices)
            if is_last or is_due:
                self._choose(self.budget(step), step)
        if self.is_final or is_last or is_due:
            self._mask(matrices)
        self.step = step
        if is_last and not self.is_final:
            self.is_final, self._sensitivity, self._uncertainty = True, [], []

    def rows_are_gone(self) -> None:
        """The pruned triplets were removed: what is left is all there is."""
        self.kept = {path: torch.ones(rank, dtype=torch.bool) for path, rank in self.ranks().items()}

    @torch.no_grad()
    def _observe(self, matrices: dict[str, Triplets]) -> None:
        """A parameter without a gradient had no part in the loss: its I is 0."""
        parameters = [p for path in self.kept for p in matrices[path]]
        if all(p.grad is None for p in parameters):
            raise ValueError(
                "model: expected gradients of the adapter's parameters, got none; call between backward and zero_grad"
            )
        if not self._sensitivity:
            self._sensitivity = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
            self._uncertainty = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
        self._sensitivity = [t.to(p.device) for t, p in zip(self._sensitivity, parameters, strict=True)]
        self._uncertainty = [t.to(p.device) for t, p in zip(self._uncertainty, parameters, strict=True)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        beta1, beta2 = self.config.beta1, self.config.beta2
        now = torch._foreach_mul([p.float() for p in parameters], [g.float() for g in gradients])
        torch._foreach_abs_(now)
        torch._foreach_mul_(self._sensitivity, beta1)
        torch._foreach_add_(self._sensitivity, now, alpha=1 - beta1)
        torch._foreach_sub_(now, self._sensitivity)
        torch._foreach_abs_(now)
        torch._foreach_mul_(self._uncertainty, beta2)
        torch._foreach_add_(self._uncertainty, now, alpha=1 - beta2)

    def scores(self) -> dict[str, torch.Tensor]:
        """Importance of each triplet, (r,) fp32 a matrix. ValueError before the first step and after the last pruning, where
        there are none, and with the name of a matrix where they aren't finite."""
        if not self._sensitivity:
            raise ValueError(f"scores: expected a step before the last pruning, got step {self.step}, which has no statistics")
        products = torch._foreach_mul(self._sensitivity, self._uncertainty)
        scores = {}
        for path, A, E, B in zip(self.kept, products[::3], products[1::3], products[2::3], strict=True):
            scores[path] = (whole(E)[:, 0] + _mean(A, 1) + _mean(B, 0)).cpu()
        if bad := [path for path, score in scores.items() if not torch.isfinite(score).all()]:
            raise ValueError(f"{bad[0]}: expected finite gradients, got NaN or Inf in the importances of its triplets")
        return scores

    def _choose(self, budget: int, step: int) -> None:
        """Keep the ``budget`` most important triplets."""
        scores = self.scores()
        places = [(value, -row, path) for path, score in scores.items() for row, value in enumerate(score.tolist())]
        places.sort(key=lambda place: place[:2])
        kept = {path: torch.ones_like(rows) for path, rows in self.kept.items()}
        for _, minus_row, path in places[: len(places) - budget]:
            kept[path][-minus_row] = False
        self.kept = kept
        if self.ranks() != self.history[-1][1]:
            self.history.append((step, self.ranks()))

    @torch.no_grad()
    def _mask(self, matrices: dict[str, Triplets]) -> None:
        for path, rows in self.kept.items():
            if not rows.all():
                E = matrices[path].E
                E.masked_fill_(placed_like(~rows[:, None].to(E.device), E), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs beside the adapter and the optimizer; torch.save's, also with weights_only=True."""
        state = {"step": self.step, "is_final": self.is_final, "kept": dict(self.kept), "history": list(self.history)}
        return {**state, "sensitivity": list(self._sensitivity), "uncertainty": list(self._uncertainty)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken. ValueError, before anything changes, where it belongs to other matrices or is none."""
        self._check_state(state)
        self.step, self.is_final = state["step"], state["is_final"]
        self.kept = {path: state["kept"][path].clone() for path in self.kept}
        self.history = [(step, dict(ranks)) for step, ranks in state["history"]]
        self._sensitivity = [t.clone() for t in state["sensitivity"]]
        self._uncertainty = [t.clone() for t in state["uncertainty"]]

    def _check_state(self, state: Any) -> None:
        expected = {"step", "is_final", "kept", "history", "sensitivity", "uncertainty"}
        if not isinstance(state, dict) or set(state) != expected:
            got = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state: expected {', '.join(sorted(expected))}, got {got}")
        kept, shapes = state["kept"], [shape for path in self.kept for shape in self._shapes(path)]
        checks = {
            "step": (_is_count(state["step"]), "a number of steps"),
            "is_final": (isinstance(state["is_final"], bool), "True or False"),
            "kept": (isinstance(kept, dict) and all(map(_is_mask, kept.values())), "a mask of rows for each path"),
            "history": (_is_history(state["history"]), "pairs of a step and the ranks by path"),
            **{
                name: (_are_shaped(state[name], shapes), "nothing or a finite fp32 tensor of the shape of each A, E and B")
                for name in ("sensitivity", "uncertainty")
            },
        }
        for name, (fits, wanted) in checks.items():
            if not fits and name in ("sensitivity", "uncertainty"):
                self._check_kept(kept)  # of other matrices: that says more
            if not fits:
                raise ValueError(f"state: {name}: expected {wanted}, got {state[name]!r:.200}")
        self._check_kept(kept)
        if len(state["sensitivity"]) != len(state["uncertainty"]):
            raise ValueError("state: uncertainty: expected as many tensors as sensitivity has, got another number")

    def _shapes(self, path: str) -> tuple[tuple[int, int], ...]:
        """Of A, E and B."""
        r, (k, n) = len(self.kept[path]), self._widths[path]
        return (r, k), (r, 1), (n, r)

    def _check_kept(self, kept: dict[str, torch.Tensor]) -> None:
        ours = {path: len(rows) for path, rows in self.kept.items()}
        theirs = {path: len(rows) for path, rows in kept.items()}
        if ours != theirs:
            differing = sorted((path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)), key=str)
            told = ", ".join(f"{path} (expected {ours.get(path, 0)} triplets, got {theirs.get(path, 0)})" for path in differing)
            raise ValueError(f"state: expected that of the adapter's own matrices, got another for {told}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.dim() == 1 and not value.is_meta


def _is_history(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(entry, list | tuple)
        and len(entry) == 2
        and _is_count(entry[0])
        and isinstance(entry[1], dict)
        and all(isinstance(path, str) and _is_count(rank) for path, rank in entry[1].items())
        for entry in value
    )


def _are_shaped(tensors: Any, shapes: list[tuple[int, int]]) -> bool:
    if not isinstance(tensors, list | tuple) or len(tensors) not in (0, len(shapes)):
        return False
    return all(
        isinstance(t, torch.Tensor)
        and (t.dtype, t.layout, tuple(t.shape)) == (torch.float32, torch.strided, shape)
        and not t.is_meta
        and bool(whole(torch.isfinite(t).all()))
        for t, shape in zip(tensors, shapes, strict=False)
    )


def _mean(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """matrix.mean(dim); of one that is split among processes the same in each, summed first: parts may differ in size."""
    return whole(matrix.sum(dim)) / matrix.shape[dim] if is_shard(matrix) else matrix.mean(dim)
