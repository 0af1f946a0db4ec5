"""torch's tensor parallelism for layers of peftk, plain or with LoRA or AdaLoRA: styles for its ``parallelize_module``.

    parallelize_module(model, mesh, plan_of(model))            # a transformers model, as its config says
    parallelize_module(model, mesh, {"layers.*.mlp": SharedInput(), "layers.*.mlp.up": ColwiseParallel(), … RowwiseParallel()})

Attach adapters and load weights before, make the optimizer after. Other modules go to torch's own styles. Of an adapter's A
(r, k) and B (n, r), one is split with W and the other is whole in every process, the first one's; its gradient is summed.
Dropout's mask is the same in every process only where their generators are; else each draws its own, which is still dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as styles

from peftk.methods.adalora_linear import AdaLoraLinear
from peftk.methods.lora_linear import LoraLinear
from peftk.nn import DenseConv1D, DenseLinear, NF4Linear
from peftk.nn.tensor_parallel import COLUMNS, ROWS, check_split, split, split_layers

BASES = (DenseConv1D, DenseLinear, NF4Linear)


class ColwiseParallel(styles.ColwiseParallel):
    """y's columns are split: W and B by rows, A whole. Input replicated, output split by the last dimension, as torch's."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, (LoraLinear, AdaLoraLinear, *BASES)):
            return super()._apply(module, device_mesh)
        split_layer(module, device_mesh, ROWS)

        def whole_input(_: nn.Module, inputs: tuple) -> tuple:
            x = self._prepare_input_fn(self.input_layouts, self.desired_input_layouts, None, inputs, device_mesh)
            return x.to_local(grad_placements=[Partial()]), *inputs[1:]  # dx of this process's columns of y only

        def split_output(_: nn.Module, inputs: tuple, y: DTensor) -> DTensor:
            y = DTensor.from_local(y, device_mesh, [Shard(-1)], run_check=False)
            return self._prepare_output_fn(self.output_layouts, self.use_local_output, None, y, device_mesh)

        module.register_forward_pre_hook(whole_input)
        module.register_forward_hook(split_output)
        return module


class RowwiseParallel(styles.RowwiseParallel):
    """x's columns are split: W and A by columns, B whole. Input split by the last dimension, output summed, as torch's. A bias is
    added to the sum; it is the module's Parameter ``sum_bias`` from then on."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, (LoraLinear, AdaLoraLinear, *BASES)):
            return super()._apply(module, device_mesh)
        base = getattr(module, "base_layer", module)
        bias, base.bias = base.bias, None
        try:
            split_layer(module, device_mesh, COLUMNS)
        except ValueError:
            base.bias = bias
            raise
        module.register_parameter("sum_bias", bias)

        def split_input(_: nn.Module, inputs: tuple) -> tuple:
            x = self._prepare_input_fn(self.input_layouts, (Shard(-1),), None, inputs, device_mesh)
            return x.to_local(), *inputs[1:]

        def summed_output(layer: nn.Module, inputs: tuple, y: DTensor) -> DTensor:
            y = DTensor.from_local(y, device_mesh, [Partial()], run_check=False).redistribute(placements=self.output_layouts)
            if layer.sum_bias is not None:
                y = y + DTensor.from_local(layer.sum_bias.to(y.dtype), device_mesh, [Replicate()], run_check=False)
            return y.to_local() if self.use_local_output else y

        module.register_forward_pre_hook(split_input)
        module.register_forward_hook(summed_output)
        return module


class SharedInput(styles.ParallelStyle):
    """For a module whose layers split by rows take its first argument (``hidden_states`` where it is given by name): the gradient
    of that is summed once for all of them, not for each."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def shared(_: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            if inputs:
                return (_replicated(inputs[0], device_mesh), *inputs[1:]), named
            return inputs, named | {"hidden_states": _replicated(named["hidden_states"], device_mesh)}

        module.register_forward_pre_hook(shared, with_kwargs=True)
        return module


def _replicated(x: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()], run_check=False)


def plan_of(model: nn.Module) -> dict[str, styles.ParallelStyle]:
    """Splits a transformers model as its own plan has it; embeddings, norms and head stay whole. ValueError for one without a
    plan. Heads, those of keys and values too, and inner width must be multiples of the processes."""
    dims = dict(split_layers(model))
    shared = {path.rpartition(".")[0]: SharedInput() for path, dim in dims.items() if dim == ROWS}
    return shared | {path: ColwiseParallel() if dim == ROWS else RowwiseParallel() for path, dim in dims.items()}


def split_layer(module: nn.Module, mesh: DeviceMesh, dim: int) -> None:
    """Split a base layer and its adapters, all or, on a ValueError, nothing."""
    base = getattr(module, "base_layer", module)
    if mesh.ndim != 1:
        raise ValueError(f"device_mesh: expected one dimension, got {mesh.ndim}; mesh['tp'] names one")
    check_split(base, mesh.size(), dim)
    if module is not base:
        _check_adapters(module)
    split(base, mesh, dim)
    if module is not base:
        _split_adapters(module, mesh, dim)


def _check_adapters(layer: LoraLinear | AdaLoraLinear) -> None:
    if getattr(layer, "with_dora", None):
        raise ValueError(f"module: expected LoRA without DoRA, whose norms run over whole rows, got {', '.join(layer.with_dora)}")
    if getattr(layer, "taken", None) is not None:
        raise ValueError("module: expected an adapter that starts beside W, got one whose start was taken out of it")
    if layer.merged:
        raise ValueError(f"module: expected one without merged adapters, got {', '.join(layer.merged)}")
    if layer.base_layer.bias is not None and layer.base_layer.bias.requires_grad:
        raise ValueError("module: expected a frozen bias, got one that is trained with an adapter")


def _split_adapters(layer: LoraLinear | AdaLoraLinear, mesh: DeviceMesh, dim: int) -> None:
    """A by columns with W's, or B by rows."""
    places = {"lora_A": Shard(1) if dim == COLUMNS else Replicate(), "lora_B": Shard(0) if dim == ROWS else Replicate()}
    for table, place in (places | {"lora_E": Replicate()}).items():
        for name, tensor in getattr(layer, table, {}).items():
            made = distribute_tensor(tensor.detach(), mesh, [place])
            getattr(layer, table)[name] = nn.Parameter(made, requires_grad=tensor.requires_grad)
