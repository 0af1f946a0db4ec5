"""QLoRA (Dettmers et al. 2023) as a recipe: 4-bit linear layers, gradient checkpointing, LoRA on all of them.

Norms, embeddings and head keep their dtype. qlora_recipe.py has the paper's settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from peftk.methods.adapter import Wrapper
from peftk.methods.attach import attach, check_config, check_new_name, find_attached, wrappers
from peftk.methods.lora import LoraConfig
from peftk.methods.lora_init import TAKEN_FROM_W, family
from peftk.methods.lora_linear import LoraLinear
from peftk.methods.qlora_recipe import qlora_recipe
from peftk.methods.targets import TASK_HEADS, output_heads, select_whole, visible_modules
from peftk.nn import quantizable, quantize_model
from peftk.nn.base import check_module
from peftk.nn.quantize_model import check_skip


def qlora(
    model: nn.Module,
    config: LoraConfig | None = None,
    *,
    skip: Sequence[str] = (),
    block_size: int = 64,
    double_quant: bool = True,
    gradient_checkpointing: bool = True,
    adapter_name: str = "default",
    progress: bool = True,
) -> nn.Module:
    """Quantise the model in place, a layer at a time, and attach LoRA to it (``qlora_recipe(model).config`` if None). Returns
    the model.

    The output head, the config's ``modules_to_save``, the heads of classification models and what ``skip`` names stay dense.
    Starts that are taken out of the weights (PiSSA, OLoRA, LoftQ) are taken out of the dense ones, and the rest is then
    quantised.
    ``gradient_checkpointing`` needs a transformers model (or one with the same two methods); TypeError, before anything is
    changed, without them.
    """
    check_module(model)
    config = qlora_recipe(model).config if config is None else config
    check_config(config)
    check_skip(skip)
    check_new_name(model, adapter_name)
    if gradient_checkpointing:
        _check_checkpointing(model)
    kept = (*_kept_dense(model, config), *skip)
    if family(config.init_lora_weights) in TAKEN_FROM_W:
        _attach_and_quantize(model, config, adapter_name, kept, block_size, double_quant)
    quantize_model(model, kept, block_size, double_quant, progress)
    if gradient_checkpointing:
        _enable_checkpointing(model)
    state = find_attached(model)
    return model if state is not None and adapter_name in state.configs else attach(model, config, adapter_name)


def _enable_checkpointing(model: nn.Module) -> None:
    """By the model's own methods. The hooks with which they make inputs ask for gradients are kept out of whole graphs, which
    refuse them ("returning intermediate with requires_grad_()") and checkpoint without."""
    before = {id(hook) for module in model.modules() for hook in module._forward_hooks.values()}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not _new_hooks(model, before):  # transformers adds them by itself where it knows of an adapter
        model.enable_input_require_grads()
    for hooks, key in _new_hooks(model, before):
        hooks[key] = _outside_of_graphs(hooks[key])


def _new_hooks(model: nn.Module, before: set[int]) -> list[tuple[dict[int, Any], int]]:
    tables = [module._forward_hooks for module in model.modules()]
    return [(hooks, key) for hooks in tables for key, hook in hooks.items() if id(hook) not in before]


def _outside_of_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        return None if torch.compiler.is_compiling() else hook(*arguments)

    return called


def _attach_and_quantize(
    model: nn.Module, config: LoraConfig, name: str, kept: tuple[str, ...], block_size: int, double_quant: bool
) -> None:
    """The adapted layers, of which those in ``kept`` stay dense. ValueError where LoftQ would quantise one of these."""
    wanted = quantizable(model, kept)
    if config.init_lora_weights == "loftq":
        loftq = dataclasses.replace(config.loftq_config, block_size=block_size, double_quant=double_quant)
        config = dataclasses.replace(config, loftq_config=loftq)
        if dense := [path for path in config.targets(model) if path not in wanted]:
            raise ValueError(f"target_modules: expected layers that are quantised with loftq, got {', '.join(dense)}, kept dense")
    attach(model, config, name)
    for path, layer in wrappers(model, LoraLinear):
        if path in wanted:
            layer.quantize_base(block_size, double_quant)


def _kept_dense(model: nn.Module, config: LoraConfig) -> tuple[str, ...]:
    heads = {id(head) for head in output_heads(model)}
    paths = [path for path, module in model.named_modules() if id(module) in heads]
    modules = visible_modules(model, lambda module: isinstance(module, Wrapper))
    return (*paths, *select_whole(modules, config), *TASK_HEADS.get(config.task_type, ()))


def _check_checkpointing(model: nn.Module) -> None:
    """Inputs of the first layer must get a gradient, so that a checkpointed segment with a frozen base sends one back."""
    for method in ("gradient_checkpointing_enable", "enable_input_require_grads"):
        if not callable(getattr(model, method, None)):
            raise TypeError(
                f"gradient_checkpointing: expected False for a {type(model).__name__}, which has no {method}(), got True"
            )
