"""What the four prompt methods share: HF peft's fields, facts about the model, task heads, and a plain prompt."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peftk.methods.adapter import Beside, ModuleToSave, Wrapper
from peftk.methods.attach import attached, known, wrappers
from peftk.methods.targets import put_in_place, select_whole, visible_modules, whole_names

# Fields of HF peft's file that say nothing about what is computed.
_INFORMATIVE = {"peft_type", "peft_version", "auto_mapping", "revision", "runtime_config"}

# A model's class says its task: HF peft needs it in the file to put prompts in place.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
_NO_HEAD = "FEATURE_EXTRACTION"
TASKS = sorted({*_TASKS.values(), _NO_HEAD})


@dataclass
class PromptConfig:
    """HF peft's fields of all prompt methods."""

    num_virtual_tokens: int | None = None
    task_type: str | None = None  # None: by the model's class. SEQ_CLS, TOKEN_CLS and QUESTION_ANS train the model's head whole
    modules_to_save: list[str] | None = None  # trained whole, beside the prompt
    inference_mode: bool = False  # the prompt is not trained
    base_model_name_or_path: str | None = None
    token_dim: int | None = None  # these three are the model's, and are checked where the method depends on them
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None  # 2 for SEQ_2_SEQ_LM: HF peft's tensors are for two stacks then

    peft_type = ""
    KIND: ClassVar[type[Beside]] = Beside  # what stands beside the model
    PRIVATE = ""  # the type of a file that HF peft must refuse
    FILE_PREFIX = "base_model."  # of the keys of modules_to_save
    OURS: ClassVar[tuple[str, ...]] = ()  # fields that HF peft doesn't have
    TRAINING: ClassVar[tuple[str, ...]] = ()  # of these, those that don't change what a trained prompt computes

    _has_hf_task: ClassVar[bool] = True
    is_plain: ClassVar[bool] = False  # set on one that is read: the prompt is a tensor, and nothing that made it comes with it

    def __post_init__(self) -> None:
        if isinstance(self.modules_to_save, set | tuple):
            self.modules_to_save = sorted(self.modules_to_save)
        for name, (fits, expected) in self.checks().items():
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def checks(self) -> dict[str, tuple[bool, str]]:
        """By field: whether it fits, and what was expected."""
        names = self.modules_to_save
        return {
            "num_virtual_tokens": (is_count(self.num_virtual_tokens), "a positive integer"),
            "base_model_name_or_path": (isinstance(self.base_model_name_or_path, str | None), "a text or None"),
            "task_type": (self.task_type is None or self.task_type in TASKS, f"None or one of {', '.join(TASKS)}"),
            "modules_to_save": (names is None or are_strings(names), "a list of names"),
            "inference_mode": (isinstance(self.inference_mode, bool), "True or False"),
            **{
                name: (getattr(self, name) is None or is_count(getattr(self, name)), "None or a positive integer")
                for name in ("token_dim", "num_layers", "num_attention_heads")
            },
            "num_transformer_submodules": (
                self.num_transformer_submodules is None
                or (is_count(self.num_transformer_submodules) and self.num_transformer_submodules <= 2),
                "None, 1 or 2",
            ),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> PromptConfig:
        """From an adapter_config.json. A field that asks for what is not done here is refused, never ignored."""
        known = {f.name for f in dataclasses.fields(cls)}
        if asked := {k: v for k, v in fields.items() if k not in known | _INFORMATIVE and v not in (None, False, [], {}, "")}:
            told = ", ".join(f"{k}={v!r}" for k, v in asked.items())
            raise ValueError(f"expected a {fields.get('peft_type')} without {told}: peftk doesn't do that")
        return cls(**{k: v for k, v in fields.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds. ``peft_type`` is HF peft's only where HF peft computes the same; fields unknown to it
        are warned of there, and left out."""
        fields = {f.name: f for f in dataclasses.fields(self)}
        held = {name: getattr(self, name) for name in fields}
        ours = {name for name in self.OURS if held[name] != fields[name].default}
        hf_can = not ours - set(self.TRAINING) and self._has_hf_task
        kept = {name: copy.deepcopy(value) for name, value in held.items() if name not in set(self.OURS) - ours}
        return {**kept, "peft_type": self.peft_type if hf_can else self.PRIVATE, "inference_mode": True}

    def inject(self, model: nn.Module, name: str) -> PromptConfig:
        """Put a prompt called ``name`` beside the model and the heads of its task in place, all or, on a ValueError, none.
        Returns a copy with what the model says."""
        config = copy.copy(self)
        if config.task_type is None:
            config.task_type = task_of(model)
        if config.num_transformer_submodules is None:
            config.num_transformer_submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
        # Of encoder-decoder models HF peft lays prefixes out as it does here for this one task only.
        config._has_hf_task = config.task_type is not None and is_encoder_decoder(model) <= (config.task_type == "SEQ_2_SEQ_LM")
        modules = visible_modules(model, lambda module: isinstance(module, Wrapper))
        whole = select_whole(modules, config)
        beside = config.KIND.of(model)
        encoder = config.build(model).train(model.training)
        if beside is None:
            beside = config.KIND(model)
            beside.stand(model)
        beside.add(name, encoder, config)
        put_in_place(model, {modules[path]: ModuleToSave for path in whole})
        for path in whole:
            model.get_submodule(path).add_adapter(name)
        config.modules_to_save = whole_names(config, whole)
        return config

    def build(self, model: nn.Module) -> nn.Module:
        """The encoder, for ``KIND.prompt_embeddings``. Fills in what the model says; ValueErrors come from here, before anything
        is in place."""
        raise NotImplementedError

    def has_encoder(self) -> bool:
        """Whether something makes the prompt in training."""
        return False

    def arrangement(self) -> Callable | None:
        """Where the virtual tokens of an input-level prompt stand; None: in front."""
        return None

    def settle(self, **facts: int) -> None:
        """Take what the model says; ValueError where the config says something else."""
        for name, value in facts.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"{name}: expected {value}, as the model has it, got {getattr(self, name)!r}")
            setattr(self, name, value)


class Dense(nn.Linear):
    """An encoder's layer: of a class of its own, so that quantize_model leaves it alone."""


class PlainPrompt(nn.Module):
    """A prompt that is its own parameter: () -> (n, d)."""

    is_plain = True

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self) -> torch.Tensor:
        return self.weight

    def flat(self) -> dict[str, torch.Tensor]:
        """By the file's key."""
        return {"prompt_embeddings": self.weight}

    @torch.no_grad()
    def load_flat(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take a file's tensor."""
        self.weight.copy_(tensors["prompt_embeddings"])


class EncodedPrompt(nn.Module):
    """A prompt that an encoder makes, () -> (n, d); subclasses bring ``forward``."""

    is_plain = False

    def flat(self) -> dict[str, torch.Tensor]:
        """By the file's key."""
        with torch.no_grad(), evaluating(self):  # a file never holds what dropout left
            return {"prompt_embeddings": self().detach()}

    def plain(self) -> PlainPrompt:
        """What the encoder makes now, as a parameter."""
        return PlainPrompt(self.flat()["prompt_embeddings"])

    def requires_grad_of_parameters(self) -> bool:
        """Whether it is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside the ``with`` it is in eval mode; afterwards every module is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def drop_encoder(model: nn.Module, adapter_name: str = "default") -> nn.Module:
    """The MLP or LSTM that makes a prompt or a prefix in training is dropped: what it makes now is the parameter from here on, a
    new one to an optimizer. Returns the model. ValueError for an unknown adapter, or one without an encoder."""
    state = attached(model)
    known(state, adapter_name, "adapter_name")
    beside = [w for _, w in wrappers(model, Beside) if adapter_name in w.adapter_names()]
    if not any(wrapper.encoder_tensors(adapter_name) for wrapper in beside):
        raise ValueError(f"adapter_name: expected an adapter with an encoder, got {adapter_name!r}, which has none")
    for wrapper in beside:
        wrapper.drop_encoder(adapter_name)
    return model


def is_count(value: Any) -> bool:
    """A positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_probability(value: Any) -> bool:
    """In [0, 1)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value < 1


def are_strings(value: Any) -> bool:
    """A list of strings."""
    return isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)


def are_ids(value: Any) -> bool:
    """A list, not empty, of integers from 0."""
    right = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return right and all(isinstance(entry, int) and entry >= 0 for entry in value)


def task_of(model: nn.Module) -> str | None:
    """HF peft's task type by the model's class; None where it has none for it."""
    for base in type(model).__mro__:
        for ending, task in _TASKS.items():
            if base.__name__.endswith(ending):
                return task if task != "SEQ_2_SEQ_LM" or is_encoder_decoder(model) else "CAUSAL_LM"
    return _NO_HEAD if type(model).__name__.endswith("Model") else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """As the model's config says."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def encoder_of(model: nn.Module) -> nn.Module:
    """Of an encoder-decoder model; heads of transformers 4 have no get_encoder of their own. ValueError where nothing has one."""
    for module in model.modules():
        if callable(getter := getattr(module, "get_encoder", None)):
            return getter()
    raise ValueError(f"model: expected an encoder-decoder model with get_encoder, got {type(model).__name__}")


def is_causal(model: nn.Module) -> bool:
    """Whether tokens see those before them only: then padding stands on the left, and on the right otherwise."""
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def has_learned_positions(module: nn.Module) -> bool:
    """Whether positions are looked up in a table, which ends somewhere."""
    return any(is_position_table(path, part) for path, part in module.named_modules())


def is_position_table(path: str, module: nn.Module) -> bool:
    """By the names that the families have for it."""
    names = ("wpe", "position_embeddings", "embed_positions")
    return isinstance(module, nn.Embedding) and path.rpartition(".")[2] in names


def max_positions(model: nn.Module) -> int | None:
    """As the model's config says."""
    config = getattr(model, "config", None)
    names = ("max_target_positions", "max_position_embeddings")
    return next((value for name in names if is_count(value := getattr(config, name, None))), None)


def check_fits(model: nn.Module, n: int) -> None:
    """ValueError where ``n`` virtual tokens leave no position for a real one."""
    limit = max_positions(model)
    if limit is not None and n >= limit:
        raise ValueError(f"num_virtual_tokens: expected fewer than the model's {limit} positions, got {n}")


def token_embedding(module: nn.Module) -> nn.Module:
    """The module that embeds token ids. ValueError where there is none."""
    getter = getattr(module, "get_input_embeddings", None)
    try:
        found = getter() if callable(getter) else None
    except NotImplementedError:
        found = None
    weight = getattr(found, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise ValueError(f"model: expected one that embeds token ids (get_input_embeddings), got {type(module).__name__}")
    return found


def factor_dtype(weight: torch.Tensor) -> torch.dtype:
    """Prompts are fp32 also beside 16-bit and 4-bit weights, since small steps vanish there; fp64 stays fp64."""
    return torch.promote_types(weight.dtype, torch.float32) if weight.dtype.is_floating_point else torch.float32


# What the families and releases of transformers call the cache of keys and values, the newest first.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among a call's arguments, whatever name the caller gave it; None without one."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def parameters_of(module: nn.Module) -> tuple[str, ...]:
    """Names of forward's parameters."""
    return _parameters(getattr(module.forward, "__func__", module.forward), hasattr(module.forward, "__func__"))


@functools.cache  # hooks ask at every call
def _parameters(function: Callable, is_method: bool) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[int(is_method) :]


def as_keywords(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(parameters_of(module), args, strict=False)), **kwargs}
