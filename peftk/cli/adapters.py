"""The methods that ``peftk finetune`` knows: the flags of each, and the config that it makes of them. A new one is an entry."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

import peftk
from peftk.cli import flags
from peftk.cli.errors import UserError
from peftk.methods.prompts import is_encoder_decoder, token_embedding
from peftk.methods.word_init import sampled, special_ids

BASES = ("dense", "nf4")

# By name of the flag: what argparse is told. A flag that is given to a method which doesn't list it is refused.
FLAGS: dict[str, dict[str, Any]] = {
    "r": {"type": flags.positive_int, "help": "rank"},
    "init_r": {"type": flags.positive_int, "help": "rank of every matrix at the start"},
    "target_r": {"type": flags.positive_int, "help": "average rank at the end"},
    "tinit": {"type": flags.non_negative_int, "help": "steps before the first pruning; None: a tenth of them"},
    "tfinal": {"type": flags.non_negative_int, "help": "steps after the last pruning; None: three tenths of them"},
    "delta_t": {"type": flags.positive_int, "help": "steps between two prunings"},
    "orth_reg_weight": {"type": flags.non_negative_float, "help": "of the regulariser that keeps singular vectors apart"},
    "alpha": {"type": flags.positive_float, "help": "the branch is scaled by alpha/r, or alpha/init_r"},
    "target_modules": {"nargs": "+", "metavar": "NAME", "help": "layers to adapt, or all-linear (all but the head)"},
    "dropout": {"type": flags.share, "help": "on the low-rank branch's input; on a prefix's keys and values"},
    "num_virtual_tokens": {
        "type": flags.positive_int,
        "help": "length of the prompt or the prefix; None: 20, or what --template has",
    },
    "prefix_projection": {"action": argparse.BooleanOptionalAction, "help": "an MLP makes the prefix in training"},
    "encoder": {"choices": ("mlp", "lstm", "none"), "help": "what makes the prompt in training"},
    "encoder_hidden_size": {"type": flags.positive_int, "help": "of the MLP or LSTM; None: the model's"},
    "template": {"help": "where the virtual tokens stand: '[v]*3 {x} [v] is a'; None: in front"},
    "init": {
        "choices": ("random", "vocab", "text", "labels"),
        "help": "what it starts from; a prefix from words' keys and values",
    },
    "init_text": {"metavar": "TEXT", "help": "words to start from, with --init text"},
}


@dataclass(frozen=True)
class Setting:
    """What a config needs beside its flags."""

    task_type: str  # HF peft's
    model_name: str
    model: nn.Module
    tokenizer: Any
    labels: list[str] | None  # of the task's classes
    modules_to_save: list[str] | None  # modules of the model that are new
    steps: int  # of the optimizer, in the whole run


@dataclass(frozen=True)
class Method:
    """``flags``: the defaults of those that it knows; ``bases``: the first is the default."""

    about: str
    bases: tuple[str, ...]
    lr: float
    flags: dict[str, Any]
    config: Callable[[argparse.Namespace, Setting], Any]
    schedule: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None  # works in each step; has a state_dict


def _shared(setting: Setting) -> dict[str, Any]:
    return {
        "task_type": setting.task_type,
        "modules_to_save": setting.modules_to_save,
        "base_model_name_or_path": setting.model_name,
    }


def _low_rank(arguments: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    targets = arguments.target_modules
    return {
        "lora_alpha": arguments.alpha,
        "lora_dropout": arguments.dropout,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        **_shared(setting),
    }


def _lora(arguments: argparse.Namespace, setting: Setting) -> peftk.LoraConfig:
    return peftk.LoraConfig(r=arguments.r, **_low_rank(arguments, setting))


def _dora(arguments: argparse.Namespace, setting: Setting) -> peftk.LoraConfig:
    return dataclasses.replace(_lora(arguments, setting), use_dora=True)


def _adalora(arguments: argparse.Namespace, setting: Setting) -> peftk.AdaLoraConfig:
    return peftk.AdaLoraConfig(
        init_r=arguments.init_r,
        target_r=arguments.target_r,
        tinit=setting.steps // 10 if arguments.tinit is None else arguments.tinit,
        tfinal=setting.steps * 3 // 10 if arguments.tfinal is None else arguments.tfinal,
        deltaT=arguments.delta_t,
        orth_reg_weight=arguments.orth_reg_weight,
        total_step=setting.steps,
        **_low_rank(arguments, setting),
    )


def _prefix(arguments: argparse.Namespace, setting: Setting) -> peftk.PrefixTuningConfig:
    return _prefix_of(peftk.PrefixTuningConfig, arguments, setting)


def _p_tuning_v2(arguments: argparse.Namespace, setting: Setting) -> peftk.PTuningV2Config:
    return _prefix_of(peftk.PTuningV2Config, arguments, setting)


def _prefix_of(kind: type, arguments: argparse.Namespace, setting: Setting) -> Any:
    _check_init(arguments)
    if arguments.init == "labels":
        raise UserError(f"--init labels: starts --method prompt, not {arguments.method}: use random, vocab or text")
    ids = _frequent_ids(setting, arguments.num_virtual_tokens) if arguments.init == "vocab" else None
    if arguments.encoder_hidden_size is not None and not arguments.prefix_projection:
        raise UserError(
            "--encoder-hidden-size: of the MLP that --prefix-projection brings, which is not given: add it, or leave this out"
        )
    return kind(
        num_virtual_tokens=arguments.num_virtual_tokens,
        prefix_projection=arguments.prefix_projection,
        encoder_hidden_size=arguments.encoder_hidden_size,
        prefix_dropout=arguments.dropout,
        init_text=arguments.init_text,
        init_token_ids=ids,
        tokenizer=setting.tokenizer if arguments.init == "text" else None,
        **_shared(setting),
    )


def _check_init(arguments: argparse.Namespace) -> None:
    if (arguments.init == "text") != (arguments.init_text is not None):
        raise UserError("--init text and --init-text go together, got one without the other: give both or none")


def _frequent_ids(setting: Setting, n: int) -> list[int]:
    """Of tokens that Prompt Tuning samples from too. A prefix at random takes most of the attention at first: Whisper's held-out
    loss after 8 steps was 3.25 with one, the model's own was 0.95."""
    model = setting.model
    stack = model.get_decoder() if is_encoder_decoder(model) else model
    return sampled(token_embedding(stack), n, None, _FREQUENT, special_ids(model, setting.tokenizer))


_STARTS = {"random": "RANDOM", "vocab": "SAMPLE_VOCAB", "text": "TEXT", "labels": "CLASS_LABELS"}


def _prompt(arguments: argparse.Namespace, setting: Setting) -> peftk.PromptTuningConfig:
    _check_init(arguments)
    if arguments.init == "labels" and setting.labels is None:
        raise UserError(
            "--init labels: --task has no labels; it is for classification and token-classification: use random, vocab or text"
        )
    return peftk.PromptTuningConfig(
        num_virtual_tokens=arguments.num_virtual_tokens,
        prompt_tuning_init=_STARTS[arguments.init],
        prompt_tuning_init_text=arguments.init_text,
        class_labels=setting.labels if arguments.init == "labels" else None,
        tokenizer=setting.tokenizer,
        **_shared(setting),
    )


def _p_tuning(arguments: argparse.Namespace, setting: Setting) -> peftk.PTuningConfig:
    if arguments.encoder == "none" and arguments.encoder_hidden_size is not None:
        raise UserError("--encoder-hidden-size: --encoder none has no layer: leave it out, or use mlp or lstm")
    template = arguments.template
    if template is not None and setting.task_type == "TOKEN_CLS":
        raise UserError("--template: --task token-classification has a tag for each word, which a template moves: leave it out")
    return peftk.PTuningConfig(
        num_virtual_tokens=arguments.num_virtual_tokens or (_LENGTH if template is None else None),  # a template counts by itself
        template=template,
        encoder_reparameterization_type=arguments.encoder.upper(),
        encoder_hidden_size=arguments.encoder_hidden_size,
        tokenizer=setting.tokenizer,
        **_shared(setting),
    )


_LENGTH = 20
_FREQUENT = 5000  # of the lowest ids: tokenizers are trained so that these are the frequent ones
_LOW_RANK = {"r": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": ["all-linear"]}
_ADALORA = {
    **{name: default for name, default in _LOW_RANK.items() if name != "r"},
    **{"alpha": 24.0, "init_r": 12, "target_r": 8, "tinit": None, "tfinal": None, "delta_t": 1, "orth_reg_weight": 0.5},
}
_PROMPT = {"num_virtual_tokens": _LENGTH, "init": "vocab", "init_text": None}
_PREFIX = {**_PROMPT, "prefix_projection": False, "encoder_hidden_size": None, "dropout": 0.0}
_P_TUNING = {"num_virtual_tokens": None, "encoder": "mlp", "encoder_hidden_size": None, "template": None}

METHODS = {
    "qlora": Method("LoRA on a 4-bit base", ("nf4",), 5e-4, _LOW_RANK, _lora),
    "lora": Method("low-rank updates of the linear layers", BASES, 5e-4, _LOW_RANK, _lora),
    "dora": Method("LoRA that trains each row's length apart", BASES, 5e-4, _LOW_RANK, _dora),
    "adalora": Method(
        "low-rank updates whose ranks go where they matter", BASES, 1e-3, _ADALORA, _adalora, peftk.adalora_schedule
    ),
    "prefix": Method("trained keys and values in every layer", BASES, 1e-2, _PREFIX, _prefix),
    "prompt": Method("trained vectors in front of the input", BASES, 3e-2, _PROMPT, _prompt),
    "ptuning": Method("trained vectors among the input, made by an encoder", BASES, 5e-3, _P_TUNING, _p_tuning),
    "ptuning-v2": Method("a prefix in every layer and a task's own head", BASES, 1e-2, _PREFIX, _p_tuning_v2),
}


def add_arguments(
    parser: argparse._ArgumentGroup, names: Collection[str] = tuple(FLAGS), others: Mapping[str, str] = MappingProxyType({})
) -> None:
    """--method, --base, and those of the methods' own flags that ``names`` has. ``others``: methods that need no adapter, with
    what to say of them."""
    about = "; ".join(f"{name}: {told}" for name, told in {**{n: m.about for n, m in METHODS.items()}, **others}.items())
    parser.add_argument("--method", choices=(*METHODS, *others), default="qlora", help=about)
    parser.add_argument("--base", choices=BASES, default=argparse.SUPPRESS, help="linear layers in --dtype, or in 4 bits")
    for name, options in ((name, FLAGS[name]) for name in names):
        known = {method: m.flags[name] for method, m in METHODS.items() if name in m.flags}
        by_default = {_told(default) for default in known.values()}
        told = f"{options['help']} ({', '.join(known)}; default: {' or '.join(sorted(by_default))})"
        parser.add_argument(_flag(name), **{**options, "help": told}, default=argparse.SUPPRESS)


def settle(arguments: argparse.Namespace) -> None:
    """Fill in the method's defaults. UserError for a flag that the method doesn't know, and for a base that it can't have."""
    method = METHODS[arguments.method]
    for name in FLAGS:
        if name in vars(arguments) and name not in method.flags:
            knowing = ", ".join(other for other, m in METHODS.items() if name in m.flags)
            raise UserError(f"{_flag(name)}: --method {arguments.method} doesn't know it; it is for {knowing}")
        if name in method.flags:
            setattr(arguments, name, getattr(arguments, name, method.flags[name]))
    arguments.base = getattr(arguments, "base", method.bases[0])
    if arguments.base not in method.bases:
        raise UserError(f"--base {arguments.base}: --method {arguments.method} is on {' or '.join(method.bases)}: use that")
    if getattr(arguments, "lr", 0.0) is None:
        arguments.lr = method.lr


def make_config(arguments: argparse.Namespace, setting: Setting) -> Any:
    """The method's config. UserError, with the flag's or the method's name, where peftk refuses a value."""
    try:
        return METHODS[arguments.method].config(arguments, setting)
    except ValueError as error:
        raise UserError(f"--method {arguments.method}: {error}") from error


def positions_taken(config: Any) -> int:
    """How many of a model's positions the adapter needs, beside those of the text."""
    arrangement = config.arrangement() if hasattr(config, "arrangement") else None
    return getattr(arrangement, "added", getattr(config, "num_virtual_tokens", None)) or 0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _told(default: Any) -> str:
    return " ".join(default) if isinstance(default, list) else str(default)
