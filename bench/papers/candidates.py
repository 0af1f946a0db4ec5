"""How a task is tuned: a method, its options, and the steps. A method is one entry of METHODS and knows no task's kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

import peftk

# (a config to attach, OwnParameters, or None where nothing is trained; the task, perhaps with other inputs or a quantised model)
Prepared = tuple[Any, Any]

# Which linear layers, under BERT's and Llama's names. A pooler belongs to no layer of the stack, and stays as it is.
MODULES = {
    "q": r".*\.(query|q_proj)",
    "q,v": r".*\.(query|value|q_proj|v_proj)",
    "q,k,v,o": r".*\.(query|key|value|attention\.output\.dense|[qkvo]_proj)",
    "all": "all-linear",
}
POOLER = ["pooler.dense"]
HEADS = ("lm_head", "classifier")  # of the models here; never quantised
HEAD_RATE = 5e-2  # of a head that begins at random and has 60 steps; at 5e-3 it decides the score, whatever the method


@dataclass(frozen=True)
class Candidate:
    """One line of an experiment. Equal ones are trained once, whatever they are called."""

    task: str
    method: str
    rate: float
    steps: int
    options: tuple[tuple[str, Any], ...] = ()
    batch: int = 16
    head_rate: float | None = None  # of a fresh head, which starts from nothing; None: ``rate``

    def prepare(self, task: Any) -> Prepared:
        """The config, and the task as the method sees it."""
        timed = {"steps": self.steps} if self.method in TIMED else {}
        return METHODS[self.method](task, **dict(self.options), **timed)


@dataclass(frozen=True)
class OwnParameters:
    """No adapter: the model's own parameters are trained, all of them or the head's. For tasks that give a copy of the model."""

    head_only: bool = False

    def release(self, model: nn.Module) -> None:
        """Let them be trained, and no others."""
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(not self.head_only or path.startswith(HEADS))


def rates(model: nn.Module, candidate: Candidate) -> list[dict[str, Any]]:
    """An optimizer's groups: the head's trainable parameters at ``head_rate``, all others at ``rate``."""
    trained = peftk.trainable_parameters(model)
    if candidate.head_rate is None:
        return [{"params": trained, "lr": candidate.rate}]
    heads = {parameter for path, parameter in model.named_parameters() if path.startswith(HEADS)}
    split = [[p for p in trained if (p in heads) == is_head] for is_head in (False, True)]
    groups = zip(split, (candidate.rate, candidate.head_rate), strict=True)
    return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]


def in_nf4(task: Any) -> Any:
    """The task with a copy of its model whose linear layers are in NF4, double quantised; the head is not."""
    made = copy.copy(task)
    made.model = peftk.quantize_model(copy.deepcopy(task.model), skip=HEADS, progress=False)
    return made


def _hard(task: Any, nf4: bool = False) -> Prepared:
    return None, in_nf4(task) if nf4 else task


def _own(task: Any, head_only: bool = False) -> Prepared:
    return OwnParameters(head_only), task


def _lora(task: Any, r: int, modules: str = "all", alpha: float = 16, dropout: float = 0.0, dora: bool = False) -> Prepared:
    facts = {"lora_dropout": dropout, "use_dora": dora, "task_type": task.task_type, "exclude_modules": POOLER}
    return peftk.LoraConfig(r=r, lora_alpha=alpha, target_modules=MODULES[modules], **facts), task


def _qlora(task: Any, **options: Any) -> Prepared:
    return _lora(in_nf4(task), **options)


def _adalora(task: Any, steps: int, r: int, alpha: float = 16) -> Prepared:
    """``r`` a matrix is left on average; training begins with half as many again (section 3.3), rounded up."""
    ranks = {"target_r": r, "init_r": -(-3 * r // 2)}
    phases = {"total_step": steps, "tinit": round(0.1 * steps), "tfinal": round(0.3 * steps)}
    facts = {"lora_alpha": alpha, "task_type": task.task_type, "exclude_modules": POOLER}
    return peftk.AdaLoraConfig(**ranks, **phases, **facts), task


def _prompt(task: Any, n: int, init: str = "SAMPLE_VOCAB", text: str | None = None) -> Prepared:
    labels = list(task.verbalizer.labels) if init == "CLASS_LABELS" else None
    facts = {"prompt_tuning_init_text": text, "class_labels": labels, "tokenizer": task.tokenizer}
    return peftk.PromptTuningConfig(num_virtual_tokens=n, prompt_tuning_init=init, **facts), task


def _p_tuning_in_front(task: Any, n: int, encoder: str) -> Prepared:
    return peftk.PTuningConfig(num_virtual_tokens=n, encoder_reparameterization_type=encoder), task


def _p_tuning(task: Any, encoder: str, from_words: bool = True) -> Prepared:
    words = task.template.word_ids
    where = {"placeholder_token_id": task.placeholder, "num_virtual_tokens": len(words)}
    start = {"init_token_ids": words if from_words else None}
    return peftk.PTuningConfig(encoder_reparameterization_type=encoder, **where, **start), task.softened()


def _prefix(task: Any, n: int, variant: str = "prefix", mlp: bool = False, zero: bool = False) -> Prepared:
    facts = {"prefix_projection": mlp, "encoder_hidden_size": 512 if mlp else None, "init_weights": "zero" if zero else None}
    infix = task.separator if variant == "infix" else None
    return peftk.PrefixTuningConfig(num_virtual_tokens=n, variant=variant, infix_token_id=infix, **facts), task


def _p_tuning_v2(task: Any, n: int, mlp: bool = False) -> Prepared:
    return peftk.PTuningV2Config(num_virtual_tokens=n, prefix_projection=mlp), task


METHODS: dict[str, Callable[..., Prepared]] = {
    "hard template": _hard,
    "prompt tuning": _prompt,
    "P-Tuning": _p_tuning,
    "P-Tuning in front": _p_tuning_in_front,
    "prefix tuning": _prefix,
    "P-Tuning v2": _p_tuning_v2,
    "LoRA": _lora,
    "AdaLoRA": _adalora,
    "QLoRA": _qlora,
    "own parameters": _own,
}
TIMED = {"AdaLoRA"}  # these are told how many steps there are
