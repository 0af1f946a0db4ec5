"""transformers' side of loading: the hooks of version 5 and of the last version 4 around the same layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.utils.quantization_config import QuantizationMethod

from peftk.format.dynamic8 import NESTED_BLOCK
from peftk.integrations.transformers.adapters_only import has_adapters, save_adapters_only
from peftk.integrations.transformers.bound import Bound
from peftk.integrations.transformers.config import METHOD, NF4Config
from peftk.integrations.transformers.layers import PendingLinear, finish_layers, make_dense, replace_layers

IS_4 = transformers.__version__.startswith("4.")
PARTS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)


class Loading(HfQuantizer):
    """What both versions share. Layers are replaced before the files are read, each weight is quantised alone, between the read
    that brings it and the one that brings the next, and layers are finished once all are read."""

    quantization_config: NF4Config
    requires_calibration = False
    is_trainable = True

    def __init__(self, quantization_config: NF4Config, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.has_adapters: Callable[[], bool] = lambda: False

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer takes a quantised model that isn't HF peft's only where this is true: where there are adapters to train."""
        return self.has_adapters()

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """``save_pretrained`` writes state_dict(), whose keys are bitsandbytes'. Only version 4 has the argument."""
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map: expected devices, got 'disk' for a part of the model: 4-bit weights stay in memory")

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return pending(model, param_name) is not None

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        """Bytes an element, for device_map="auto"."""
        return self.bytes_per_element() if self.param_needs_quantization(model, param_name) else param.element_size()

    def bytes_per_element(self) -> float:
        config = self.quantization_config
        return 0.5 + (1 + 4 / NESTED_BLOCK if config.double_quant else 4) / config.block_size

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        in_fp32 = getattr(model, "_keep_in_fp32_modules", None)
        names = self.get_modules_to_not_convert(model, self.quantization_config.modules_to_not_convert, in_fp32)
        replace_layers(model, self.quantization_config, sorted(names), lambda path: is_kept(path, names))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        finish_layers(model, keep_dense=self.pre_quantized)
        self.has_adapters = Bound(has_adapters, model)
        save_adapters_only(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        make_dense(model, dtype)
        return model


class Loading5(Loading):
    """Version 5: conversions of tensors, one target at a time."""

    serialized_names = {"weight": ["weight", *(f"weight.{part}" for part in PARTS)]}

    def get_quantize_ops(self) -> Any:
        from peftk.integrations.transformers.load_ops import Quantise

        return Quantise(self)

    def get_load_operations(self) -> dict[str, type]:
        from peftk.integrations.transformers.load_ops import Deserialise

        return {"deserialize": Deserialise}

    def taken(self, model: nn.Module, name: str, tensor: torch.Tensor | dict[str, torch.Tensor]) -> nn.Parameter:
        """The Parameter for the layer. An error waits on it until all files are read: where it is raised here, transformers logs
        it in a report and raises one that doesn't tell it. ``self`` may be a copy."""
        layer = pending(model, name)
        try:
            if layer is None:
                raise ValueError(
                    f"{name}: in 4 bits in the file, but among the modules that stay dense: take it out of modules_to_not_convert"
                )
            return layer.take(tensor, name)
        except (ValueError, TypeError) as error:
            parameter = nn.Parameter(torch.empty_like(model.get_parameter(name), device="meta"), requires_grad=False)
            parameter.error = error
            return parameter

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from peftk.integrations.transformers.load_ops import Deserialise

        used = getattr(
            model, "_weight_conversions", None
        )  # undone when the model is saved; but its state_dict has the file's form
        if used is not None:
            ours = [c for c in used if any(isinstance(op, Deserialise) for op in getattr(c, "operations", ()))]
            model._weight_conversions = [conversion for conversion in used if conversion not in ours]
        return super()._process_model_after_weight_loading(model, **kwargs)


class Loading4(Loading):
    """Version 4.57: one tensor after another, each part of a 4-bit weight under its own name."""

    def __init__(self, quantization_config: NF4Config, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self._parts: dict[str, dict[str, torch.Tensor]] = {}
        self._missing: set[str] = set()

    def preprocess_model(self, model: nn.Module, **kwargs: Any) -> None:
        super().preprocess_model(model, **kwargs)
        if (
            self.pre_quantized
        ):  # version 4 reads parts of a weight, uncast, for the methods only that it knows; the form is this one's
            self.quantization_config = _AsBitsandbytes(self.quantization_config)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        self._missing = set(missing_keys)
        return missing_keys

    def update_unexpected_keys(self, model: nn.Module, unexpected_keys: list[str]) -> list[str]:
        return [key for key in unexpected_keys if _weight_of(key) is None]

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return super().param_needs_quantization(model, _weight_of(param_name) or param_name)

    def get_param_name(self, param_name: str) -> str:
        return _weight_of(param_name) or param_name

    def adjust_target_dtype(self, target_dtype: torch.dtype) -> Any:
        from accelerate.utils import CustomDtype

        return CustomDtype.INT4

    def create_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, target_device: Any, **kwargs: Any
    ) -> None:
        """Put the tensor into its layer, or aside until its other parts have come."""
        name, tensor = _weight_of(param_name) or param_name, param_value.to(target_device)
        layer = pending(model, name)
        if name in self._missing:
            layer.weight = nn.Parameter(tensor, requires_grad=False)  # is drawn after this
        elif not self.pre_quantized:
            layer.weight = layer.take(tensor, name)
        else:
            self._parts.setdefault(name, {})[f"weight{param_name.removeprefix(name)}"] = tensor

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(self.quantization_config, _AsBitsandbytes):
            self.quantization_config = self.quantization_config.config
        for name, parts in self._parts.items():
            layer = pending(model, name)
            is_dense = set(parts) == {"weight"}
            layer.weight = nn.Parameter(parts["weight"], requires_grad=False) if is_dense else layer.take(parts, name)
        self._parts = {}
        return super()._process_model_after_weight_loading(model, **kwargs)

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        make_dense(model, dtype or model.dtype)
        self.remove_quantization_config(model)
        return model


class _AsBitsandbytes:
    """A config under bitsandbytes' name."""

    quant_method = QuantizationMethod.BITS_AND_BYTES

    def __init__(self, config: NF4Config):
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def pending(model: nn.Module, name: str) -> PendingLinear | None:
    """The layer that ``name`` is the weight of, where it still waits for it."""
    path, _, parameter = name.rpartition(".")
    layer = model.get_submodule(path) if parameter == "weight" else None
    return layer if isinstance(layer, PendingLinear) else None


def is_kept(path: str, names: Sequence[str]) -> bool:
    """Whether the layer stays dense by transformers' reading of ``modules_to_not_convert``."""
    if IS_4:
        return any(f".{name}." in f".{path}." for name in names)
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(path, names)


def _weight_of(name: str) -> str | None:
    """The weight that ``name`` is a part of; None for other names."""
    ends = [f".{part}" for part in PARTS if name.endswith(f".weight.{part}")]
    return name.removesuffix(ends[0]) if ends else None


@register_quantizer(METHOD)
class NF4Quantizer(Loading4 if IS_4 else Loading5):
    """What transformers makes of an NF4Config."""
