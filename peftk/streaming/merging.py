"""A checkpoint's weights with an adapter added, a range at a time, in fp32 and rounded nowhere on the way.

The adapter is attached to a model without weights; each layer in turn gets the rows of its weight and of its factors that are
wanted, and adds them by its own ``merged_weight``. So what every variant adds is said once, by the methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from peftk.checkpoint import CONFIG, OLD_TENSORS, TENSORS, attach_empty, file_key, matched, read_config
from peftk.methods.adalora_linear import AdaLoraLinear
from peftk.methods.adapter import AdapterLayer, ModuleToSave
from peftk.methods.attach import attached, wrappers
from peftk.methods.lora import LoraConfig
from peftk.methods.lora_embedding import LoraEmbedding
from peftk.methods.lora_experts import LoraExperts
from peftk.methods.lora_linear import LoraLinear
from peftk.nn import DenseConv1D
from peftk.streaming.safetensors_file import DTYPES
from peftk.streaming.source import Tensor, file_group
from peftk.streaming.values import FileValues, Transposed, Values

_NAME = "default"


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one tensor of the model. ``of(values)``: the new values, for the old ones as matrices (n, k) of
    linear layers, else in the stored shape. ``is_sum``: the old ones count; else they are replaced."""

    of: Callable[[Values], Values]
    is_sum: bool


def changes(model: nn.Module, folder: Path) -> tuple[dict[str, Change], tuple[str, ...], tuple[Path, ...]]:
    """(by name of the model's tensors what the adapter in ``folder`` does to them, paths of modules that it brings whole, its
    files). ``model``, on the meta device, is of no other use then. FileNotFoundError, or ValueError that names the file, for a
    folder without an adapter, one that doesn't fit the model, and one that no weight can hold."""
    config = read_config(folder)
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"{folder / CONFIG}: expected LORA or ADALORA, got {config.peft_type}, which adds to the inputs or "
            "the keys and values: no weight can hold it"
        )
    path = next((p for name in (TENSORS, OLD_TENSORS) if (p := folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder / TENSORS}: no such file")
    attach_empty(model, config, folder, _NAME)
    _, tensors = matched(model, _NAME, file_group(path), path)
    found: dict[str, Change] = {}
    for place, wrapper in wrappers(model):
        if isinstance(wrapper, AdapterLayer):
            found |= _of_layer(model, place, wrapper, tensors)
        elif isinstance(wrapper, ModuleToSave):
            found |= {
                f"{place}.{key}": _replaced(tensors[file_key(model, _NAME, f"{place}.{key}")])
                for key in wrapper.adapter_tensors(_NAME)
            }
    state = attached(model)
    for key in state.biases.tensors(model) if state.biases is not None else ():
        found[key.replace(".base_layer.bias", ".bias")] = _replaced(tensors[file_key(model, _NAME, key)])
    whole = tuple(place for place, wrapper in wrappers(model, ModuleToSave))
    return found, whole, (folder / CONFIG, path)


def _replaced(tensor: Tensor) -> Change:
    return Change(lambda _: FileValues(tensor), is_sum=False)


def _of_layer(model: nn.Module, place: str, layer: AdapterLayer, tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    if reason := layer.why_no_merge(_NAME):
        raise ValueError(f"{place}: the adapter can't be merged, {reason}")
    own = {key: tensors[file_key(model, _NAME, f"{place}.{key}")] for key in layer.adapter_tensors(_NAME)}
    if isinstance(layer, LoraExperts):
        filler = _Filler(layer, own, {})
        return {
            f"{place}.{name}": Change(lambda values, name=name: _MergedStack(values, layer, name, filler), is_sum=True)
            for name in layer.targets(_NAME)
        }
    saved = tensors.get(file_key(model, _NAME, f"{place}.base_layer.weight"))

    def merged(values: Values) -> Values:
        values = values if saved is None else FileValues(saved)
        return _Merged(values, layer, _Filler(layer, own, _sliced(layer)))

    return {f"{place}.weight": Change(merged, is_sum=True)}


def _sliced(layer: AdapterLayer) -> dict[str, int] | None:
    """By key of a factor the dimension that runs over the weight's rows; None where the weight is merged whole."""
    if isinstance(layer, LoraEmbedding):
        return None if layer.have_dora([_NAME]) else {"lora_embedding_A": 1}
    if isinstance(layer, LoraLinear):
        return {"lora_B.weight": 0, "lora_magnitude_vector": 0}
    return {"lora_B": 0} if isinstance(layer, AdaLoraLinear) else None


class _Filler:
    """Puts an adapter's tensors into its layer, those of some rows or all; read once, and kept until ``release``."""

    def __init__(self, layer: AdapterLayer, tensors: dict[str, Tensor], sliced: dict[str, int] | None):
        self.sliced, self._layer, self._tensors = sliced, layer, tensors
        places = {id(p): (module, name) for module in layer.modules() for name, p in module._parameters.items()}
        self._places = {key: places[id(parameter)] for key, parameter in layer.adapter_tensors(_NAME).items()}
        self._read: dict[str, torch.Tensor] = {}

    def fill(self, rows: slice = slice(None)) -> None:
        for key, tensor in self._tensors.items():
            if key not in self._read:
                value = tensor.read(0, tensor.nbytes).view(DTYPES[tensor.dtype]).view(tensor.shape)
                self._read[key] = value.to(self._layer.factor_dtype())
            value = self._read[key]
            if self.sliced and key in self.sliced:
                value = value[(slice(None),) * self.sliced[key] + (rows,)]
            module, name = self._places[key]
            module._parameters[name] = nn.Parameter(value, requires_grad=False)

    def release(self) -> None:
        self._read = {}
        for module, name in self._places.values():
            module._parameters[name] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)


class _Merged:
    """W with the adapter's difference, fp32: of a linear layer or an embedding by rows, of others whole."""

    dtype = torch.float32

    def __init__(self, values: Values, layer: AdapterLayer, filler: _Filler):
        self._values, self._layer, self._filler = values, layer, filler
        self.shape = values.shape
        self._row = math.prod(values.shape[1:])
        self.unit = math.prod(values.shape) if filler.sliced is None else math.lcm(self._row, values.unit)

    @torch.no_grad()
    def flat(self, start: int, stop: int) -> torch.Tensor:
        self._filler.fill(slice(start // self._row, stop // self._row))
        w = self._values.flat(start, stop).view(-1, *self.shape[1:])
        base = self._layer.base_layer
        base._parameters["weight"] = nn.Parameter(w.T if isinstance(base, DenseConv1D) else w, requires_grad=False)
        return self._layer.merged_weight([_NAME]).to(self.dtype).reshape(-1)

    def base(self, start: int, stop: int) -> torch.Tensor:
        """W's own elements."""
        return self._values.flat(start, stop).to(self.dtype)

    def release(self) -> None:
        self._filler.release()
        self._values.release()
        self._layer.base_layer._parameters["weight"] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)


class _MergedStack:
    """Experts' matrices with the adapter's differences, fp32, an expert at a time: (experts, n, k), or as the module has them
    (experts, k, n); a matrix for the weights of other modules."""

    dtype = torch.float32

    def __init__(self, values: Values, layer: LoraExperts, parameter: str, filler: _Filler):
        self._values, self._layer, self._parameter, self._filler = values, layer, parameter, filler
        self.shape = values.shape
        self._one = math.prod(values.shape[-2:])
        self.unit = math.lcm(self._one, values.unit)

    @torch.no_grad()
    def flat(self, start: int, stop: int) -> torch.Tensor:
        self._filler.fill()
        w = self.base(start, stop).view(-1, *self.shape[-2:])
        parts = [part for part in self._layer.parts([_NAME]) if part.parameter == self._parameter]
        for here, expert in enumerate(range(start // self._one, stop // self._one)):
            delta = parts[expert].delta_weight(_NAME)
            w[here] += delta.T if self._is_transposed() else delta
        return w.view(-1)

    def _is_transposed(self) -> bool:
        return len(self.shape) == 3 and bool(getattr(self._layer.base_layer, "is_transposed", False))

    def base(self, start: int, stop: int) -> torch.Tensor:
        """W's own elements."""
        return self._values.flat(start, stop).to(self.dtype)

    def release(self) -> None:
        self._filler.release()
        self._values.release()


def as_stored(change: Change, values: Values, is_transposed: bool) -> Values:
    """The new values in the stored orientation; of Conv1D that is (k, n)."""
    if not is_transposed or not change.is_sum:
        return change.of(values)
    made = Transposed(change.of(Transposed(values)))
    made.base = lambda start, stop: values.flat(start, stop).to(made.dtype)
    return made
