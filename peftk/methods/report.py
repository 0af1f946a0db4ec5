"""What a model's bytes are: trainable and frozen, in 4 bits and dense."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from peftk.nn import NF4Linear


@dataclass(frozen=True)
class Report:
    """Counts of elements and bytes; ``print(peftk.report(model))`` shows a table."""

    trainable: int  # elements
    trainable_bytes: int
    quantized: int  # elements of 4-bit weights, before quantisation
    quantized_bytes: int  # codes and constants
    dense: dict[str, int] = field(default_factory=dict)  # bytes of what stayed dense, by module kind and dtype
    dense_count: int = 0  # elements

    @property
    def frozen(self) -> int:
        return self.quantized + self.dense_count

    @property
    def frozen_bytes(self) -> int:
        return self.quantized_bytes + sum(self.dense.values())

    @property
    def trainable_share(self) -> float:
        """Of all elements, 0 to 1."""
        return self.trainable / max(self.trainable + self.frozen, 1)

    def __str__(self) -> str:
        rows = [
            ("trainable", f"{self.trainable:,}", self.trainable_bytes),
            ("frozen, 4-bit", f"{self.quantized:,}", self.quantized_bytes),
            ("frozen, dense", f"{self.dense_count:,}", sum(self.dense.values())),
            *((f"  {kind}", "", size) for kind, size in sorted(self.dense.items(), key=lambda item: -item[1])),
        ]
        lines = [f"{'':<40}{'parameters':>16}{'MB':>10}"]
        lines += [f"{name:<40}{count:>16}{size / 1e6:>10.2f}" for name, count, size in rows]
        return "\n".join([*lines, f"trainable share {100 * self.trainable_share:.3f} %"])


def report(model: nn.Module) -> Report:
    """Count each tensor once, shared ones too."""
    seen: set[int] = set()
    totals = dict.fromkeys(("trainable", "trainable_bytes", "quantized", "quantized_bytes", "dense_count"), 0)
    dense: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, NF4Linear):
            totals["quantized"] += module.w4.shape.numel()
            totals["quantized_bytes"] += module.w4.nbytes
            seen.add(id(module.weight))
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            size = parameter.numel() * parameter.element_size()
            if parameter.requires_grad:
                totals["trainable"] += parameter.numel()
                totals["trainable_bytes"] += size
            else:
                kind = f"{type(module).__name__}, {str(parameter.dtype).removeprefix('torch.')}"
                dense[kind] = dense.get(kind, 0) + size
                totals["dense_count"] += parameter.numel()
    return Report(**totals, dense=dense)
