"""Where a model's bytes are: trainable and frozen, in 4 bits and dense."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from peftk.methods.adapter import Wrapper
from peftk.nn import NF4Linear
from peftk.nn.base import check_module


@dataclass(frozen=True)
class Size:
    """Of some parameters: how many, elements before quantisation, bytes with the quantisation's constants."""

    tensors: int = 0
    elements: int = 0
    bytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.tensors + other.tensors, self.elements + other.elements, self.bytes + other.bytes)


@dataclass(frozen=True)
class Report:
    """Counts and bytes of a model's parameters; ``print(peftk.report(model))`` shows them as a table."""

    trainable: Size = Size()
    adapters: Size = Size()  # not trained: inactive ones, those loaded for inference
    quantized: Size = Size()  # the base's 4-bit weights
    dense: dict[str, Size] = field(default_factory=dict)  # the base's others: by path, with * for numbers, and dtype

    @property
    def frozen(self) -> Size:
        """All that is not trained."""
        return sum(self.dense.values(), self.adapters + self.quantized)

    @property
    def total(self) -> Size:
        """Everything."""
        return self.trainable + self.frozen

    @property
    def trainable_share(self) -> float:
        """Of all elements, 0 to 1."""
        return self.trainable.elements / max(self.total.elements, 1)

    def __str__(self) -> str:
        dense = sorted(self.dense.items(), key=lambda item: -item[1].bytes)
        rows = [
            ("trainable", self.trainable),
            ("frozen", self.frozen),
            ("  in 4 bits", self.quantized),
            ("  adapters", self.adapters),
            ("  dense", sum(self.dense.values(), Size())),
            *((f"    {path}", size) for path, size in dense),
            ("total", self.total),
        ]
        rows = [(name, size) for name, size in rows if size.tensors or name == "trainable"]
        width = max(len(name) for name, _ in rows)
        lines = [f"{'':<{width}} {'tensors':>8} {'parameters':>15} {'bytes':>16}"]
        lines += [f"{name:<{width}} {size.tensors:>8,} {size.elements:>15,} {size.bytes:>16,}" for name, size in rows]
        return "\n".join([*lines, f"trainable: {self.trainable_share:.3%} of the parameters"])


def report(model: nn.Module) -> Report:
    """Count each parameter once, also where several modules share it; of buffers a quantisation's constants only."""
    check_module(model)
    parts = {"trainable": Size(), "adapters": Size(), "quantized": Size()}
    dense: dict[str, Size] = {}
    seen: set[int] = set()
    of_adapters = _adapter_ids(model)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            size = Size(1, parameter.numel(), parameter.numel() * parameter.element_size())
            if parameter.requires_grad:
                parts["trainable"] += size
            elif isinstance(module, NF4Linear) and name in ("weight", "absmax"):
                if name == "weight":
                    parts["quantized"] += Size(1, module.in_features * module.out_features, module.stored_bytes)
            elif id(parameter) in of_adapters:
                parts["adapters"] += size
            else:
                label = f"{_pattern(path, name)} {str(parameter.dtype).removeprefix('torch.')}"
                dense[label] = dense.get(label, Size()) + size
    return Report(**parts, dense=dense)


def _adapter_ids(model: nn.Module) -> set[int]:
    wrappers = [module for module in model.modules() if isinstance(module, Wrapper)]
    return {id(p) for wrapper in wrappers for name in wrapper.adapter_names() for p in wrapper.adapter_parameters(name)}


def _pattern(path: str, name: str) -> str:
    """The parameter's path, layers that differ in a number only taken together."""
    parts = [part for part in (*path.split("."), name) if part and part not in ("base_layer", "original_module")]
    return ".".join(re.sub(r"^\d+$", "*", part) for part in parts)
