"""What methods that wrap modules share: named adapters on a base layer, switching, merging, and copies of whole modules."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from peftk.shards import factor

BASE = "__base__"  # instead of a name: no adapter

# nn.Module's tables of forward and backward hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def check_adapter_name(name: str) -> None:
    """ValueError unless ``name`` can stand in a parameter's path."""
    if not isinstance(name, str) or not name or not {".", "/", "\\", "\0"}.isdisjoint(name) or name.startswith("__"):
        raise ValueError(f"adapter_name: expected a name without dots and slashes, got {name!r}")
    if hasattr(nn.ParameterDict(), name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"adapter_name: expected a name that torch's containers don't use themselves, got {name!r}")


class Wrapper(nn.Module):
    """Stands in a model where another module stood, or beside the others, and knows several adapters by name."""

    can_merge = True  # whether an adapter can become part of the weights

    def __init__(self, original: nn.Module):
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is no submodule
        self.active: list[str] = []
        self.merged: list[str] = []
        self.disabled = False
        self.rows: list[str] | None = None  # a name a row of the batch, BASE for none; None: the active ones for all rows
        self.training = original.training

    def adapter_names(self) -> list[str]:
        """Names of the adapters that this module has."""
        raise NotImplementedError

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters that training ``name`` changes."""
        raise NotImplementedError

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What a file of ``name`` holds: the module's own tensors under HF peft's keys, below the module's path."""
        raise NotImplementedError

    def file_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """``adapter_tensors`` as a change of the original weights, where the module's own aren't these any more. ValueError where
        no such tensors exist."""
        return self.adapter_tensors(name)

    def delete_adapter(self, name: str) -> None:
        """Drop an adapter's parameters."""
        raise NotImplementedError

    def original(self) -> nn.Module | None:
        """The module that stood here, with the weights as they are now: those of a merged adapter stay in. None: nothing did."""
        raise NotImplementedError

    def leave(self) -> None:
        """Undo what the wrapper did beside standing here."""

    def check_active(self, names: list[str]) -> None:
        """ValueError where ``names`` can't be used together."""

    def set_active(self, names: Iterable[str]) -> None:
        """Those of ``names`` that this module has, in their order, are used from now on."""
        have = self.adapter_names()
        self.active = [name for name in names if name in have]

    def by_row(self) -> list[tuple[str, ...]]:
        """The adapters that this module uses now: one entry for all rows of a batch, or one a row."""
        if self.disabled:
            return [()]
        if self.rows is None:
            return [tuple(self.active)]
        have = self.adapter_names()
        return [(name,) if name in have else () for name in self.rows]

    def spread(self, values: list, batch: int) -> list:
        """Of what ``by_row`` has one a row of the batch, which beams and samples make some times longer. ValueError for a batch
        that isn't."""
        if batch % len(values):
            raise ValueError(f"names: expected a batch of {len(values)} rows or a multiple of it, got {batch}")
        return [value for value in values for _ in range(batch // len(values))]

    def rows_of(self, batch: int, device: torch.device) -> dict[tuple[str, ...], torch.Tensor]:
        """By adapters, indices of the rows that use them."""
        by_row = self.spread(self.by_row(), batch)
        return {
            names: torch.tensor([r for r, n in enumerate(by_row) if n == names], device=device) for names in dict.fromkeys(by_row)
        }


class AdapterLayer(Wrapper):
    """A base layer with adapters that add to its output, and that can be merged into its weight.

    Hooks of the module that stood here are shared with this one: they see the adapted output, and outlast it.
    """

    def __init__(self, base_layer: nn.Module, original: nn.Module):
        super().__init__(original)
        self.base_layer = base_layer
        self._snapshot: Any = None  # the weight before a merge
        self._tied: nn.Parameter | None = None  # the shared weight that a merge left for one of its own
        for name in _HOOKS:
            setattr(self, name, getattr(original, name))

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's own, which models read for its dtype and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's own."""
        return getattr(self.base_layer, "bias", None)

    def original(self) -> nn.Module:
        module = self._original[0]
        if module is not self.base_layer:
            module.weight = self.base_layer.weight
            if getattr(module, "bias", None) is not None:
                module.bias = self.base_layer.bias
        return module.train(self.training)

    def running(self) -> list[str]:
        """The adapters that a forward pass adds now: active, not disabled, not merged."""
        return [] if self.disabled else [name for name in self.active if name not in self.merged]

    def own(self, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What this process computes with where the base layer is split among processes; else the factors themselves."""
        return tuple(map(factor, factors)) if getattr(self.base_layer, "is_tensor_parallel", False) else factors

    def factor_dtype(self) -> torch.dtype:
        """Adapters are fp32 also beside 4-bit and 16-bit weights, since small steps vanish in 16 bits; fp64 stays fp64."""
        dtype = self.weight.dtype
        return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32

    @property
    def label(self) -> str:
        """What the path of the layer's weight has beyond the layer's own."""
        return ""

    def parts(self, names: Iterable[str]) -> list[Any]:
        """What merging ``names`` changes, a stored matrix at a time: objects with this layer's ``label``, ``weight``,
        ``delta_weight``, ``read_weight``, ``merged_weight``, ``rounded`` and ``write_weight``. The layer itself, where it has one
        matrix."""
        return [self]

    def why_no_merge(self, name: str) -> str:
        """Why the adapter can't become part of the weight; empty where it can."""
        return ""

    def delta_weight(self, name: str) -> torch.Tensor:
        """What ``name`` adds to W, in W's shape, fp32."""
        raise NotImplementedError

    def read_weight(self) -> torch.Tensor:
        """W as floats."""
        return self.base_layer.dense_weight()

    def write_weight(self, w: torch.Tensor) -> None:
        """Store W."""
        self.base_layer.set_dense_weight(w)

    def rounded(self, w: torch.Tensor) -> torch.Tensor:
        """W as ``write_weight(w)`` would store it, in floats; nothing is stored."""
        return self.base_layer.rounded(w)

    def take_snapshot(self) -> Any:
        """W's bytes, a copy."""
        return self.base_layer.weight_snapshot()

    def restore_snapshot(self, snapshot: Any) -> None:
        """Put W's bytes back."""
        self.base_layer.restore_weight(snapshot)

    @torch.no_grad()
    def merged_weight(self, names: Iterable[str]) -> torch.Tensor:
        """W with the adapters added, summed in fp32 and rounded nowhere on the way. W itself stays."""
        first, *others = names
        w = self.delta_weight(first)
        for name in others:
            w += self.delta_weight(name)
        return w.add_(self.read_weight())

    def merge(self, names: list[str], keep_original: bool, is_tied: bool) -> None:
        """Store W with the adapters added; ``keep_original`` keeps W's bytes for an exact unmerge. A weight that ``is_tied`` to
        another module's stays there as it is, and this layer gets one of its own."""
        if keep_original:
            self._snapshot = self.take_snapshot()
        if is_tied:
            self._tied = self.base_layer.weight
            self.base_layer.weight = nn.Parameter(self._tied.detach().clone(), requires_grad=self._tied.requires_grad)
        for part in self.parts(names):
            part.write_weight(part.merged_weight(names))
        self.merged = [*self.merged, *names]

    def keeps_original(self) -> bool:
        """Whether ``unmerge`` has the bytes that it needs."""
        return self._snapshot is not None

    def unmerge(self) -> None:
        """Put W's own bytes back."""
        if self._tied is not None:
            self.base_layer.weight = self._tied
        self.restore_snapshot(self._snapshot)
        self._snapshot, self._tied, self.merged = None, None, []


class PlainLayer(AdapterLayer):
    """On a module of torch's own, whose weight is read and written as it stands."""

    def read_weight(self) -> torch.Tensor:
        return self.weight.detach()

    @torch.no_grad()
    def write_weight(self, w: torch.Tensor) -> None:
        self.weight.copy_(w)

    def rounded(self, w: torch.Tensor) -> torch.Tensor:
        return w.to(self.weight.dtype).to(w.dtype)

    def take_snapshot(self) -> torch.Tensor:
        return self.weight.detach().clone()

    def restore_snapshot(self, snapshot: torch.Tensor) -> None:
        self.write_weight(snapshot)


class ModuleToSave(Wrapper):
    """A whole module trained per adapter (``modules_to_save``): a copy for each, the original where none is active."""

    def __init__(self, original: nn.Module):
        super().__init__(original)
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()

    def adapter_names(self) -> list[str]:
        return list(self.modules_to_save)

    def add_adapter(self, name: str) -> None:
        """A trainable copy of the original."""
        made = copy.deepcopy(self.original_module, {id(owner): owner for owner in _owners_of_hooks(self.original_module)})
        self.modules_to_save[name] = made.requires_grad_(True).train(self.training)

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return list(self.modules_to_save[name].parameters())

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return self.modules_to_save[name].state_dict(keep_vars=True)

    def delete_adapter(self, name: str) -> None:
        del self.modules_to_save[name]

    def original(self) -> nn.Module:
        return self.modules_to_save[self.merged[-1]] if self.merged else self.original_module

    def current(self) -> nn.Module:
        """The module that a forward pass uses now: of several active adapters the last."""
        names = self.active or self.merged
        return self.original_module if self.disabled or not names else self.modules_to_save[names[-1]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is not None and not self.disabled:
            return self._forward_rows(*args, **kwargs)
        return self.current()(*args, **kwargs)

    def _forward_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Each row by its own copy: (batch, ...) -> (batch, ...)."""
        index = self.rows_of(x.shape[0], x.device)
        parts = [(self.modules_to_save[names[0]] if names else self.original_module)(x[rows]) for names, rows in index.items()]
        return torch.cat(parts)[torch.cat(list(index.values())).argsort()]

    def __getattr__(self, name: str) -> Any:
        """What the wrapper itself lacks (weight, out_features, …) is the current module's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.current(), name)


def _owners_of_hooks(module: nn.Module) -> list[nn.Module]:
    """What stands beside the model and acts through this module's hooks: a copy of the module goes on with the same."""
    tables = [table for part in module.modules() for table in (part._forward_hooks, part._forward_pre_hooks)]
    hooks = [hook for table in tables for hook in table.values()]
    owners = [getattr(getattr(hook, "func", hook), "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, Beside)]


class Beside(Wrapper):
    """Acts on a whole model through hooks on its modules, none of which is replaced; the submodule ``NAME`` of the model.

    ``prompt_embeddings[name]`` makes an adapter's tensor or tensors: a plain Parameter, or an encoder that is trained for it.
    """

    NAME = ""
    can_merge = False

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.prompt_embeddings = nn.ModuleDict()
        self._handles: list[Any] = []

    @classmethod
    def of(cls, model: nn.Module) -> Beside | None:
        """The model's, None where it has none. ValueError where the name is taken by something else."""
        found = getattr(model, cls.NAME, None)
        if found is not None and not isinstance(found, cls):
            raise ValueError(f"model: expected one without an attribute {cls.NAME}, peftk's own, got a {type(found).__name__}")
        return found

    def stand(self, model: nn.Module) -> None:
        """Take the place in the model."""
        model.add_module(self.NAME, self)

    def add(self, name: str, encoder: nn.Module, config: Any) -> None:
        """A new adapter."""
        self.prompt_embeddings[name] = encoder

    def adapter_names(self) -> list[str]:
        return list(self.prompt_embeddings)

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        return list(self.prompt_embeddings[name].parameters())

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What the encoder makes, which is what inference needs."""
        return self.prompt_embeddings[name].flat()

    def load_tensors(self, name: str, tensors: dict[str, torch.Tensor], source: Any) -> None:
        """Take a file's tensors, keyed as ``adapter_tensors`` are. An encoder can't: ValueError where it makes others than these,
        as its own file is older or newer then."""
        encoder = self.prompt_embeddings[name]
        if encoder.is_plain:
            encoder.load_flat(tensors)
            return
        for key, made in encoder.flat().items():
            if not torch.allclose(made.cpu(), tensors[key].to(made.dtype).cpu(), rtol=1e-3, atol=1e-5):
                raise ValueError(
                    f"{source}: {key}: expected what the encoder makes, got other values; is the encoder's file older?"
                )

    def encoder_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The encoder's own tensors, which only training needs; empty for plain Parameters."""
        encoder = self.prompt_embeddings[name]
        return {} if encoder.is_plain else encoder.state_dict(keep_vars=True)

    def drop_encoder(self, name: str) -> None:
        """What the encoder makes becomes a plain Parameter; nothing for one that is plain already."""
        encoder = self.prompt_embeddings[name]
        if not encoder.is_plain:
            wanted = encoder.requires_grad_of_parameters()
            self.prompt_embeddings[name] = encoder.plain().requires_grad_(wanted)

    def delete_adapter(self, name: str) -> None:
        del self.prompt_embeddings[name]

    def original(self) -> None:
        return None

    def leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def swap_modules(model: nn.Module, new: dict[nn.Module, nn.Module | None]) -> None:
    """Put ``new[module]`` wherever ``module`` stands below ``model``: at every place of one that stands at several. None: take
    it out."""
    by_id = {id(old): module for old, module in new.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in by_id and by_id[id(child)] is None:
                delattr(parent, name)
            elif id(child) in by_id:
                setattr(parent, name, by_id[id(child)])
