"""Layers that wait for their weight, and how they become NF4Linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftk.format.nf4 import NF4Weight
from peftk.integrations.transformers.config import NF4Config
from peftk.nn import NF4Linear, is_experts, quantizable
from peftk.nn.dense_linear import is_conv1d


class PendingLinear(NF4Linear):
    """Stands in a model on the meta device while its files are read. To transformers it is a dense layer: its state_dict has
    ``weight`` (n, k) and ``bias``. ``take`` leaves the 4-bit weight on a Parameter, since a loader may still put that into the
    layer itself; constants as buffers would be emptied with all others that no file holds."""

    _save_to_state_dict = nn.Module._save_to_state_dict
    _load_from_state_dict = nn.Module._load_from_state_dict
    _apply = nn.Module._apply

    def __init__(self, dense: nn.Module, config: NF4Config):
        nn.Module.__init__(self)
        self.is_conv1d, weight = is_conv1d(dense), dense.weight
        self.out_features, self.in_features = weight.T.shape if self.is_conv1d else weight.shape
        self.quant_type, self.int8_activations = config.quant_type, False
        self.block_size, self.double_quant, self.compute_dtype = config.block_size, config.double_quant, config.compute_dtype
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), dense.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def take(self, tensor: torch.Tensor | dict[str, torch.Tensor], name: str) -> nn.Parameter:
        """A dense weight as the file has it, or the parts of a 4-bit one; returns the Parameter to put into the layer. ValueError
        names what doesn't fit and what isn't finite."""
        w4 = self._read(tensor, name) if isinstance(tensor, dict) else self._quantised_rows(tensor, name)
        parameter = nn.Parameter(w4.packed.reshape(-1, 1), requires_grad=False)
        parameter.w4 = w4
        return parameter

    def _read(self, parts: dict[str, torch.Tensor], name: str) -> NF4Weight:
        path = name.removesuffix("weight")
        w4 = NF4Weight.from_state_dict({f"{path}{part}": tensor for part, tensor in parts.items()}, path)
        if tuple(w4.shape) != (self.out_features, self.in_features):
            raise ValueError(f"{name}: expected shape {(self.out_features, self.in_features)}, got {tuple(w4.shape)}")
        return w4

    def _quantised_rows(self, weight: torch.Tensor, name: str) -> NF4Weight:
        if weight.shape != self.weight.shape:
            raise ValueError(f"{name}: expected shape {tuple(self.weight.shape)}, got {tuple(weight.shape)}")
        return self._quantised(weight.T.contiguous() if self.is_conv1d else weight, name)

    def finish(self, model: nn.Module, path: str, keep_dense: bool) -> None:
        """Become an NF4Linear; with ``keep_dense``, a dense layer again where the weight came as floats. The object stays, since
        accelerate may have put hooks on it."""
        w4 = getattr(self.weight, "w4", None)
        if w4 is None and keep_dense:
            dense = dense_twin(model, path)
            dense.weight, dense.bias = self.weight, self.bias
            put(model, path, dense)
            return
        if w4 is None and not self.weight.is_meta:  # no file had it: it was drawn
            w4 = self._quantised_rows(self.weight.detach(), f"{path}.weight")
        if w4 is None:
            raise ValueError(f"{path}.weight: expected in one of the files, none has it")
        del self.is_conv1d
        self.__class__ = NF4Linear
        self._store(w4)


def replace_layers(model: nn.Module, config: NF4Config, kept: list[str], is_kept: Any) -> None:
    """PendingLinear in the place of each layer that ``peftk.quantize_model`` would quantise but for those ``is_kept(path)``.
    ValueError where there is none, and for fused experts that aren't among the kept."""
    for path, module in model.named_modules():
        if is_experts(module) and not is_kept(path):
            raise ValueError(
                f"modules_to_not_convert: expected it to name {path}, whose fused experts can't be quantised as they are read; "
                "peftk.quantize_model(model) does so afterwards"
            )
    tied = {name.removesuffix(".weight") for pair in _tied(model).items() for name in pair}
    layers = {path for path in quantizable(model, tuple(kept)) if not is_kept(path) and path not in tied}
    if not layers:
        raise ValueError(f"model: expected one with linear layers to quantise, got {type(model).__name__} with none left")
    pending: dict[int, PendingLinear] = {}
    for path in sorted(layers):
        dense = model.get_submodule(path)
        put(model, path, pending.setdefault(id(dense), PendingLinear(dense, config)))


def finish_layers(model: nn.Module, keep_dense: bool) -> None:
    """No layer is pending any more. Raises the first error that a Parameter brought."""
    for error in (getattr(p, "error", None) for p in model.parameters()):
        if error is not None:
            raise error
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, PendingLinear):
            module.finish(model, path, keep_dense)


def make_dense(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Dense layers of the model's own classes in the place of NF4Linear; ``dtype``: as recorded with each weight if None."""
    made: dict[int, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, NF4Linear):
            if id(module) not in made:
                dense = made[id(module)] = dense_twin(model, path)
                w = module.w4.dequantize(dtype)
                dense.weight = nn.Parameter(w.T.contiguous() if is_conv1d(dense) else w, requires_grad=False)
                dense.bias = module.bias
            put(model, path, made[id(module)])


def dense_twin(model: nn.Module, path: str) -> nn.Module:
    """The layer that the model's class has at ``path``, on the meta device."""
    with torch.device("meta"):
        return type(model)(model.config).get_submodule(path)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _tied(model: nn.Module) -> dict[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}
