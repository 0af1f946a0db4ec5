"""Base layers split among processes, so that each computes with its own rows or columns of W (Shoeybi et al. 2019, Megatron-LM).

By rows: y's columns are split and x is whole. By columns: x's columns are split and y is a sum over processes; a bias can't be
split so, and whoever splits the layer adds it to the sum. The parts are exact: codes and block constants are those of the whole
weight. Where blocks of double-quantised constants don't end with a part, the constants are kept in fp32: 4.5 bits an element
instead of 4.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from peftk.format.dynamic8 import NESTED_BLOCK
from peftk.nn.dense_linear import Dense, DenseConv1D
from peftk.nn.nf4_linear import NF4Linear
from peftk.ops.nf4_dequantize.reference import scales
from peftk.shards import is_shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ROWS, COLUMNS = 0, 1
STYLES = {"colwise": ROWS, "rowwise": COLUMNS}  # transformers' names, after the matrix of y = x W


def split_layers(model: nn.Module) -> Iterator[tuple[str, int]]:
    """(path, ROWS or COLUMNS) of every layer that a transformers model's own plan splits: its config's ``base_model_tp_plan``,
    which leaves out embeddings and head. ValueError for one without a plan, or with one that asks for more."""
    plan = getattr(model.config, "base_model_tp_plan", None) or {}
    if not plan or (others := set(plan.values()) - set(STYLES)):
        got = f"{', '.join(sorted(others))}" if plan else "no plan"
        raise ValueError(f"model: expected one whose base_model_tp_plan has {' and '.join(STYLES)}, got {got}")
    for path, _ in model.named_modules():
        words = path.removeprefix(f"{model.base_model_prefix}.").split(".")
        if (style := plan.get(".".join("*" if word.isdigit() else word for word in words))) is not None:
            yield path, STYLES[style]


def check_split(layer: nn.Module, ranks: int, dim: int) -> None:
    """ValueError unless the layer's W (n, k) can be split by ``dim``, ROWS or COLUMNS, into so many parts."""
    n, k = layer.out_features, layer.in_features
    if any(is_shard(p) for p in layer.parameters()):
        raise ValueError("module: expected a whole layer, got one that is split already")
    if (n, k)[dim] % ranks:
        what = ("rows", "columns")[dim]
        raise ValueError(f"module: expected {what} in multiples of {ranks} processes, got a weight of shape ({n}, {k})")
    if isinstance(layer, NF4Linear) and (k // ranks if dim == COLUMNS else k) % layer.block_size:
        where = f"{k} / {ranks} columns of a part" if dim == COLUMNS else f"{k} columns"
        raise ValueError(
            f"module: expected a 4-bit weight whose blocks of {layer.block_size} elements end with a row of a part, got {where}"
        )
    if dim == COLUMNS and layer.bias is not None:
        raise ValueError("module: expected a layer without a bias, which every process would add")


def split(layer: Dense | NF4Linear, mesh: DeviceMesh, dim: int) -> None:
    """Keep this process's part of the weight, the same in every process before, by ``dim``; nothing is sent. The parameters and
    constants become DTensors. ValueError as ``check_split``."""
    check_split(layer, mesh.size(), dim)
    if isinstance(layer, NF4Linear):
        _split_codes(layer, mesh, dim)
    else:
        place = 1 - dim if isinstance(layer, DenseConv1D) else dim
        layer.weight = nn.Parameter(part_of(layer.weight.detach(), mesh, place), requires_grad=layer.weight.requires_grad)
    if layer.bias is not None:
        layer.bias = nn.Parameter(part_of(layer.bias.detach(), mesh, 0), requires_grad=layer.bias.requires_grad)
    layer.is_tensor_parallel = True


def _split_codes(layer: NF4Linear, mesh: DeviceMesh, dim: int) -> None:
    n, k, w4 = layer.out_features, layer.in_features, layer.w4
    absmax, scale, offset = w4.absmax, w4.absmax_scale, w4.absmax_offset
    if scale is not None and has_fp32_constants(layer, absmax.numel() // mesh.size(), dim):
        absmax, scale, offset = scales(absmax, scale, offset), None, None
    layer._parameters.pop("absmax", None)
    layer.weight = nn.Parameter(part_of(w4.packed.view(n, k // 2), mesh, dim), requires_grad=False)
    layer.register_buffer("absmax", part_of(absmax.view(n, k // layer.block_size), mesh, dim), persistent=False)
    layer.register_buffer("absmax_scale", scale if scale is None else part_of(scale, mesh, 0), persistent=False)
    layer.register_buffer("absmax_offset", offset, persistent=False)
    layer.double_quant = scale is not None


def has_fp32_constants(layer: NF4Linear, blocks: int, dim: int) -> bool:
    """Whether a part of so many blocks keeps its constants in fp32: where blocks of double-quantised ones don't end with it."""
    return not layer.double_quant or dim == COLUMNS or blocks % NESTED_BLOCK != 0


def part_of(tensor: torch.Tensor, mesh: DeviceMesh, dim: int) -> torch.Tensor:
    """A DTensor of which this process holds a copy of its part by ``dim``."""
    from torch.distributed.tensor import DTensor, Shard

    own = tensor.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(own, mesh, [Shard(dim)], run_check=False)
