"""Prompt Tuning (Lester et al. 2021): trained vectors, (n, d), in front of the embedded input; nothing else is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftk.methods.input_prompts import InputPrompts, entry_of
from peftk.methods.prompts import PlainPrompt, PromptConfig, are_ids, are_strings, check_fits, factor_dtype, is_count
from peftk.methods.word_init import check_ids, class_label_rows, embedded, repeated, sampled, special_ids, token_ids

_WAYS = ("RANDOM", "SAMPLE_VOCAB", "TEXT", "CLASS_LABELS")


@dataclass
class PromptTuningConfig(PromptConfig):
    """HF peft's field names; ``CLASS_LABELS`` and what it needs are ours. RANDOM is N(0, 1), HF peft's."""

    prompt_tuning_init: str = "RANDOM"  # "RANDOM" | "SAMPLE_VOCAB" | "TEXT" | "CLASS_LABELS"
    prompt_tuning_init_text: str | None = None  # TEXT: its tokens, cut or repeated to the prompt's length
    tokenizer_name_or_path: str | None = None  # for TEXT and CLASS_LABELS, where no tokenizer is given
    tokenizer_kwargs: dict[str, Any] | None = None
    tokenizer: Any = None  # an object; not saved
    class_labels: list[str] | None = None  # CLASS_LABELS: one vector a label, SAMPLE_VOCAB for the rest
    frequent_token_ids: list[int] | None = None  # SAMPLE_VOCAB: what to sample from; None: the lowest ids
    sample_vocab_size: int = 5000  # how many of the lowest ids: the paper's

    peft_type = "PROMPT_TUNING"
    PRIVATE = "PEFTK_PROMPT_TUNING"
    KIND = InputPrompts
    OURS = ("tokenizer", "class_labels", "frequent_token_ids", "sample_vocab_size")
    TRAINING = OURS

    def __post_init__(self) -> None:
        self.prompt_tuning_init = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)  # HF peft's enum
        super().__post_init__()

    def checks(self) -> dict[str, tuple[bool, str]]:
        way, starts = self.prompt_tuning_init, not self.inference_mode
        is_text, is_labels = way == "TEXT" and starts, way == "CLASS_LABELS" and starts
        has_tokenizer = self.tokenizer is not None or self.tokenizer_name_or_path is not None
        return {
            **super().checks(),
            "prompt_tuning_init": (way in _WAYS, f"one of {', '.join(_WAYS)}"),
            "prompt_tuning_init_text": (not is_text or bool(self.prompt_tuning_init_text), "a text for TEXT"),
            "class_labels": (not is_labels or (are_strings(self.class_labels) and bool(self.class_labels)), "a list of labels"),
            "tokenizer": (not (is_text or is_labels) or has_tokenizer, f"one, or tokenizer_name_or_path, for {way!r}"),
            "frequent_token_ids": (self.frequent_token_ids is None or are_ids(self.frequent_token_ids), "a list of token ids"),
            "sample_vocab_size": (is_count(self.sample_vocab_size), "a positive integer"),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> PromptTuningConfig:
        """A prompt that comes from a file has begun: no tokenizer is looked for again."""
        began = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_kwargs": None}
        return super().from_dict({**fields, **began})

    def to_dict(self) -> dict[str, Any]:
        """How it began says nothing about what it computes: HF peft would look for a tokenizer that isn't named."""
        fields = {k: v for k, v in super().to_dict().items() if k not in self.OURS}
        needs = fields["prompt_tuning_init"] == "TEXT" and not fields["tokenizer_name_or_path"]
        if needs or fields["prompt_tuning_init"] == "CLASS_LABELS":
            fields["prompt_tuning_init"] = "RANDOM"
        if fields["prompt_tuning_init"] != "TEXT":
            fields["tokenizer_kwargs"] = None
        return fields

    def build(self, model: nn.Module) -> PlainPrompt:
        _, embedding, keys = entry_of(model)
        if keys == "decoder":  # HF peft can't; of two stacks' vectors it would use the first
            self.num_transformer_submodules = 1
        check_fits(model, self.num_virtual_tokens)
        rows = self.num_virtual_tokens * self.num_transformer_submodules  # HF peft's file has as many; the first are used
        weight = self._start(model, embedding, rows)
        self.settle(token_dim=weight.shape[1])
        return PlainPrompt(weight.to(embedding.weight.device, factor_dtype(embedding.weight)))

    def _start(self, model: nn.Module, embedding: nn.Module, rows: int) -> torch.Tensor:
        if self.prompt_tuning_init == "RANDOM" or self.inference_mode:
            return torch.randn(rows, embedded(embedding, [0]).shape[1])
        if self.frequent_token_ids is not None:
            check_ids("frequent_token_ids", self.frequent_token_ids, embedding)
        names = self.tokenizer, self.tokenizer_name_or_path, self.tokenizer_kwargs
        if self.prompt_tuning_init == "TEXT":
            ids = repeated(token_ids(self.prompt_tuning_init_text, *names), rows)
            check_ids("tokenizer", ids, embedding)
            return embedded(embedding, ids)
        special = special_ids(model, self.tokenizer)
        words = sampled(embedding, rows, self.frequent_token_ids, self.sample_vocab_size, special)
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            return embedded(embedding, words)
        labels = [token_ids(label, *names) for label in self.class_labels]
        for ids in labels:
            check_ids("tokenizer", ids, embedding)
        return class_label_rows(embedding, labels, rows, words)
