"""What becomes of each tensor of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from peftk.streaming.merging import Change, as_stored
from peftk.streaming.outputs import Cast, Copied, Output, Quantised
from peftk.streaming.safetensors_file import DTYPES
from peftk.streaming.skeleton import Names
from peftk.streaming.source import Source, Tensor
from peftk.streaming.values import FileValues, NF4Values, Transposed, Values

_PART = ".weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, or one weight in bitsandbytes' form with all its parts; ``key`` is the model's name of it."""

    key: str
    tensors: Mapping[str, Tensor]  # under the model's names
    nf4: NF4Values | None = None

    @property
    def values(self) -> Values:
        """Of a linear layer's weight in 4 bits always (n, k); else as it is stored. ValueError for a dtype that torch lacks."""
        if self.nf4 is not None:
            return self.nf4
        if self.tensors[self.key].dtype not in DTYPES:
            raise ValueError(f"{self.key}: expected a dtype of {', '.join(DTYPES)}, got {self.tensors[self.key].dtype}")
        return FileValues(self.tensors[self.key])

    @property
    def is_float(self) -> bool:
        dtype = DTYPES.get(self.tensors[self.key].dtype)
        return self.nf4 is not None or (dtype is not None and dtype.is_floating_point)

    @property
    def dtype(self) -> torch.dtype:
        """In which it is used."""
        return self.values.dtype if self.nf4 is None else self.nf4.facts.dtype


def read(source: Source, names: Names) -> list[list[Stored]]:
    """Of each file what it holds; a weight in 4 bits is where its codes are. ValueError names a key that doesn't fit, and two
    that are the same one to the model."""
    tensors = {names.of_model(name): tensor for name, tensor in source.tensors.items()}
    if len(tensors) != len(source.tensors):
        keys = [names.of_model(name) for name in source.tensors]
        raise ValueError(f"expected each tensor once, got {max(keys, key=keys.count)} twice, with and without {names.prefix}")
    weights = {key.partition(_PART)[0] + ".weight" for key in tensors if _PART in key}
    parts: dict[str, dict[str, Tensor]] = {weight: {} for weight in weights}
    for key, tensor in tensors.items():
        weight = key if key in weights else key.rpartition(".weight.")[0] + ".weight"
        if weight in weights:
            parts[weight][key] = tensor
    taken = {key for found in parts.values() for key in found}
    groups = []
    for group in source.groups:
        keys = map(names.of_model, group)
        groups.append([_stored(key, tensors, parts) for key in keys if key in weights or key not in taken])
    return groups


def _stored(key: str, tensors: Mapping[str, Tensor], parts: Mapping[str, dict[str, Tensor]]) -> Stored:
    if key in parts:
        return Stored(key, parts[key], NF4Values(key, parts[key]))
    return Stored(key, {key: tensors[key]})


@dataclass(frozen=True)
class Wanted:
    """The new checkpoint's form. ``dtype``: of what is dense, None for each tensor's own. ``quantise``: paths of dense linear
    layers that go into 4 bits. ``keep_4bit``: layers in 4 bits stay so."""

    dtype: torch.dtype | None = None
    quantise: Collection[str] = ()
    keep_4bit: bool = True
    block_size: int = 64
    double_quant: bool = True
    transposed: Collection[str] = ()  # paths of linear layers whose dense weight is stored as (k, n)
    tied: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by name of a shared parameter all its names
    vocabulary: Collection[str] = ()  # names of the weights of the input embedding and the output head, which may be told apart


@dataclass(frozen=True)
class Planned:
    """Outputs by file, the paths of layers that are in 4 bits then, and whether tied weights are apart."""

    groups: list[list[Output]]
    quantised: list[str]
    untied: bool


def plan(groups: Sequence[Sequence[Stored]], wanted: Wanted, changes: Mapping[str, Change] | None = None) -> Planned:
    """ValueError names a tensor that the adapter changes and the checkpoint hasn't, or shares."""
    left = dict(changes or {})
    groups, untied = _told_apart(groups, wanted, left)
    made: list[list[Output]] = []
    quantised: list[str] = []
    for group in groups:
        made.append([])
        for stored in group:
            outputs = _outputs(stored, wanted, left.pop(stored.key, None))
            made[-1] += outputs
            if isinstance(outputs[0], Quantised) or (stored.nf4 is not None and isinstance(outputs[0], Copied)):
                quantised.append(stored.key.removesuffix(".weight"))
    if left:
        raise ValueError(
            f"{sorted(left)[0]}: the adapter changes it, and the checkpoint has no tensor of this name: transformers makes it"
            " of others as it reads them. Merge in memory (peftk.merge) and save the model"
        )
    return Planned(made, quantised, untied)


def _told_apart(
    groups: Sequence[Sequence[Stored]], wanted: Wanted, changes: Mapping[str, Change]
) -> tuple[list[list[Stored]], bool]:
    """Where an adapter changes one of two tied weights, both are stored."""
    have = {stored.key for group in groups for stored in group}
    shared = {tuple(wanted.tied[key]) for key in changes if key in wanted.tied}
    for names in shared:
        if not set(names) <= set(wanted.vocabulary):
            raise ValueError(
                f"{names[0]}: expected a weight of one layer, got one that is also {', '.join(names[1:])}: it can't be merged"
            )
    absent = {name: names for names in shared for name in names if name not in have}
    found = []
    for group in groups:
        found.append(list(group))
        for stored in group:
            for name in [name for name, names in absent.items() if stored.key in names]:
                found[-1].append(Stored(name, {name: stored.tensors[stored.key]}))
    return found, bool(shared)


def _outputs(stored: Stored, wanted: Wanted, change: Change | None) -> list[Output]:
    path = stored.key.removesuffix(".weight")
    if stored.nf4 is not None:
        return _of_4bit(stored, wanted, change)
    is_transposed = path in wanted.transposed and stored.key.endswith(".weight")
    if path in wanted.quantise and stored.key.endswith(".weight"):
        values = Transposed(stored.values) if is_transposed else stored.values
        base = None
        if change is not None:
            values, base = change.of(values), Transposed(stored.values) if is_transposed else stored.values
        return [Quantised(stored.key, values, wanted.dtype or stored.dtype, wanted.block_size, wanted.double_quant, base=base)]
    if not stored.is_float:
        return [Copied(stored.key, stored.tensors[stored.key])]
    dtype = wanted.dtype or stored.dtype
    if change is None and dtype == stored.dtype:
        return [Copied(stored.key, stored.tensors[stored.key])]
    values = stored.values if change is None else as_stored(change, stored.values, is_transposed)
    return [Cast(stored.key, values, dtype, measured=change is not None and change.is_sum)]


def _of_4bit(stored: Stored, wanted: Wanted, change: Change | None) -> list[Output]:
    nf4 = stored.nf4
    values = nf4 if change is None else change.of(nf4)
    if not wanted.keep_4bit or (change is not None and not change.is_sum):
        return [Cast(stored.key, values, wanted.dtype or stored.dtype, measured=change is not None and change.is_sum)]
    if change is None:
        return [Copied(key, tensor) for key, tensor in stored.tensors.items()]
    facts = nf4.facts
    return [Quantised(stored.key, values, facts.dtype, facts.block_size, facts.absmax_scale is not None, facts.quant_type)]
