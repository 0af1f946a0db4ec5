"""What training changes, as one file beside HF peft's: exact where those aren't (several adapters, PiSSA's start, encoders)."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import peftk
from peftk.files import read_torch, write_torch
from peftk.methods.adalora_state import adalora_state, restore_adalora
from peftk.methods.attach import attached, find_attached, wrappers

logger = logging.getLogger("peftk")
MARK = "peftk_adapters_only"  # a key that tells such a state_dict from one that lacks the model's other weights by mistake
RANKS = "peftk_adalora"  # a key for what AdaLoRA knows beside its parameters


def adapter_state(model: nn.Module) -> dict[str, Any]:
    """The parameters of all adapters under their names in the model's state_dict, the mark, and AdaLoRA's ranks where there are
    any. ValueError for sharded parameters."""
    state = attached(model)
    named = [(wrapper, name) for _, wrapper in wrappers(model) for name in wrapper.adapter_names()]
    ours = {id(p) for wrapper, name in named for p in wrapper.adapter_parameters(name)}
    if state.biases is not None:
        ours |= {id(p) for p in state.biases.parameters(model).values()}
    found = {name: p.detach() for name, p in model.named_parameters() if id(p) in ours}
    if sharded := [name for name, p in found.items() if isinstance(p, DTensor)]:
        raise ValueError(f"model: expected adapters that are whole in each process, got sharded ones, {sharded[0]} for one")
    ranks = adalora_state(model)
    return found | {MARK: torch.ones(1, dtype=torch.uint8)} | ({RANKS: ranks} if ranks else {})


def fit_to_loaded(model: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """A hook before load_state_dict: AdaLoRA's parameters become as large as those in the file, and its allocators go on as they
    did there. Takes this out of ``state_dict``."""
    ranks = state_dict.pop(RANKS, None)
    if ranks is not None and find_attached(model) is not None:
        restore_adalora(model, ranks)


def check_loaded(model: nn.Module, incompatible: Any) -> None:
    """A hook after load_state_dict: where only adapters were loaded, the other weights aren't missing. ValueError where adapters
    are missing, or the file has others."""
    missing, unexpected = incompatible
    if MARK not in unexpected:
        return
    unexpected.remove(MARK)
    ours = set(adapter_state(model)) - {RANKS} if find_attached(model) is not None else set()
    _check_names(ours & set(missing), set(unexpected))
    missing.clear()


def _check_names(lacking: set[str], others: set[str]) -> None:
    if lacking or others:
        raise ValueError(
            f"checkpoint: expected the tensors of the model's adapters, got none for {sorted(lacking)} and others, "
            f"{sorted(map(str, others))}: attach what was attached when it was written"
        )


def write_adapters(model: nn.Module, folder: str | os.PathLike, state_file: str | None = None) -> None:
    """HF peft's files of each adapter, ``default`` in the folder itself and others below it, as HF peft has them; with
    ``state_file``, ``adapter_state`` too. ValueError for an adapter that HF peft's files can't hold (PiSSA on a weight that was
    quantised after it); with ``state_file``, which can, a warning."""
    for name in attached(model).configs:
        try:
            peftk.save_adapter(model, Path(folder) / ("" if name == "default" else name), name)
        except ValueError as error:
            if state_file is None:
                raise
            logger.warning("%s has no adapter_model.safetensors, and training goes on: %s", folder, error)
    if state_file is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_torch(Path(folder) / state_file, adapter_state(model))


def read_state(model: nn.Module, path: str | os.PathLike) -> None:
    """Fill the adapters in place with a ``state_file``. ValueError where it doesn't fit."""
    state = read_torch(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected tensors by name, got a {type(state).__name__}")
    own = {MARK, RANKS}
    _check_names(adapter_state(model).keys() - state.keys() - own, state.keys() - adapter_state(model).keys() - own)
    fit_to_loaded(model, state)
    _check_tensors(state, adapter_state(model), path)
    check_loaded(model, model.load_state_dict(state, strict=False))


def _check_tensors(state: dict[str, Any], ours: dict[str, Any], path: str | os.PathLike) -> None:
    """Before any of it is loaded: tensors of floats, of the adapters' shapes."""
    for name in [name for name, tensor in ours.items() if isinstance(tensor, torch.Tensor) and name != MARK and name in state]:
        theirs, wanted, got = state[name], tuple(ours[name].shape), type(state[name]).__name__
        if isinstance(theirs, torch.Tensor):
            is_plain = theirs.layout == torch.strided and theirs.is_floating_point() and not theirs.is_meta
            if is_plain and theirs.shape == wanted:
                continue
            got = f"{theirs.dtype} {tuple(theirs.shape)} on {theirs.device}"
        raise ValueError(f"{path}: {name}: expected floats of shape {wanted}, got {got}")
