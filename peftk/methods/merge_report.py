"""What a merge would do to each weight: the distance between what is stored and the fp32 sum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from peftk.methods.adapter import AdapterLayer


@dataclass(frozen=True)
class MergeError:
    """Of one weight, in Frobenius norms: S = W + the adapters in fp32, Q = S as it would be stored."""

    path: str
    adapters: tuple[str, ...]
    relative: float  # |Q - S| / |S|
    of_adapters: float  # |Q - S| / |S - W|: from 1 on the rounding is as large as what the adapters add


@dataclass(frozen=True)
class MergeReport:
    """``peftk.merge(model, dry_run=True)``; ``print`` shows it as a table."""

    weights: tuple[MergeError, ...]

    @property
    def worst(self) -> float:
        """The largest ``relative``; 0 without weights."""
        return max((error.relative for error in self.weights), default=0.0)

    def __getitem__(self, path: str) -> MergeError:
        """By path. KeyError lists what there is."""
        for error in self.weights:
            if error.path == path:
                return error
        raise KeyError(f"{path}: no such weight; there are {', '.join(error.path for error in self.weights)}")

    def __str__(self) -> str:
        width = max((len(error.path) for error in self.weights), default=0)
        lines = [f"{'':<{width}} {'of the sum':>11} {'of the adapters':>16}  adapters"]
        lines += [
            f"{error.path:<{width}} {error.relative:>11.2e} {error.of_adapters:>16.2e}  {', '.join(error.adapters)}"
            for error in self.weights
        ]
        return "\n".join(lines)


@torch.no_grad()
def report_of(layers: Iterable[tuple[str, AdapterLayer, list[str]]]) -> MergeReport:
    """One weight at a time is in memory; none is changed."""
    found = []
    for path, layer, names in layers:
        for part in layer.parts(names):
            exact = part.merged_weight(names)
            off = torch.linalg.norm(part.rounded(exact).sub_(exact)).item()
            added = torch.linalg.norm(exact - part.read_weight()).item()
            size = torch.linalg.norm(exact).item()
            found.append(MergeError(f"{path}{part.label}", tuple(names), _ratio(off, size), _ratio(off, added)))
    return MergeReport(tuple(found))


def _ratio(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if part == 0 else float("inf")
    return part / whole
