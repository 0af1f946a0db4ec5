"""Hard prompts: words around the input, and a verbaliser that reads a class off what the model says at [mask].

The baseline that P-Tuning (Liu et al. 2021, sections 2 and 4) is compared with; verbalisers as in pattern-exploiting training
(Schick & Schütze 2021, section 3.1).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftk.methods.layout import positions
from peftk.methods.prompts import is_causal, is_encoder_decoder, parameters_of
from peftk.methods.templates import special_id, split_template
from peftk.methods.word_init import following_ids, token_ids

IGNORED = -100
SCORES = ("mean", "sum", "first")


class HardTemplate:
    """``"{x} is a kind of [mask]"``: {x} the input's words, [mask] the answer's place.

    A causal model's answer are the next tokens, so that [mask] ends the template; a masked model's stands anywhere, and its [cls]
    and [sep] are written out. ValueError for another template, and for one with virtual tokens: see ``soften``.
    """

    def __init__(self, template: str, tokenizer: Any, is_causal: bool = True):
        pieces = split_template(template)
        kinds = [kind for kind, _ in pieces]
        if "v" in kinds:
            raise ValueError(f"template: expected words only, got {template!r}, whose [v] are PTuningConfig's")
        if kinds.count("x") != 1 or pieces.count(("special", "mask")) != 1:
            raise ValueError(f"template: expected one {{x}} and one [mask], got {template!r}")
        if is_causal and pieces[-1] != ("special", "mask"):
            raise ValueError(f"template: expected [mask] at the end for a causal model, got {template!r}")
        self.tokenizer, self.is_causal = tokenizer, is_causal
        self.parts: list[tuple[str, Any]] = []  # ("ids", tokens), ("x", None), ("mask", None)
        for kind, what in pieces:
            if kind == "words":
                self.parts.append(("ids", (following_ids if self.parts else token_ids)(what, tokenizer)))
            elif what == "mask" or kind == "x":
                self.parts.append((what or kind, None))
            else:
                self.parts.append(("ids", [special_id(what, tokenizer)]))
        self.mask_id = None if is_causal else special_id("mask", tokenizer)

    @property
    def word_ids(self) -> list[int]:
        """The template's own tokens, in order."""
        return [token for kind, ids in self.parts if kind == "ids" for token in ids]

    def soften(self, placeholder_token_id: int) -> HardTemplate:
        """The same with ``placeholder_token_id`` in place of each of its own tokens: the inputs for
        ``PTuningConfig(placeholder_token_id=..., num_virtual_tokens=len(word_ids), init_token_ids=word_ids)``."""
        soft = copy.copy(self)
        soft.parts = [(kind, [placeholder_token_id] * len(ids) if kind == "ids" else None) for kind, ids in self.parts]
        return soft

    def inputs(self, texts: Sequence[str], answers: Sequence[Sequence[int]] | None = None) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and, with an answer's token ids for each text, ``labels``, all (b, length), int64:
        a batch for any model that this template is for. Without answers a masked model gets one blank. Padded on the left for
        causal models, so that answers end in the last column, on the right for masked ones."""
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts: expected a list of some, got {texts!r}")
        if answers is not None and len(answers) != len(texts):
            raise ValueError(f"answers: expected {len(texts)}, one a text, got {len(answers)}")
        blank = [] if self.is_causal else [IGNORED]
        rows = [self._row(text, list(answer)) for text, answer in zip(texts, answers or [blank] * len(texts), strict=True)]
        length = max(len(ids) for ids, _ in rows)
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        made = {
            "input_ids": self._stack([ids for ids, _ in rows], pad, length),
            "attention_mask": self._stack([[1] * len(ids) for ids, _ in rows], 0, length),
        }
        return made if answers is None else made | {"labels": self._stack([labels for _, labels in rows], IGNORED, length)}

    def _row(self, text: str, answer: list[int]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for kind, what in self.parts:
            if kind == "x":
                what = (following_ids if ids else token_ids)(text, self.tokenizer)
            elif kind == "mask":
                what = answer if self.is_causal else [self.mask_id] * len(answer)
            ids += what
            labels += answer if kind == "mask" else [IGNORED] * len(what)
        return ids, labels

    def _stack(self, rows: list[list[int]], filler: int, length: int) -> torch.Tensor:
        pads = [[filler] * (length - len(row)) for row in rows]
        return torch.tensor([pad + row if self.is_causal else row + pad for row, pad in zip(rows, pads, strict=True)])

    def answer_logits(self, model: nn.Module, inputs: dict[str, torch.Tensor], k: int = 1) -> torch.Tensor:
        """(b, k, vocabulary): what the model says where answers of ``k`` tokens stand. ``inputs`` as ``inputs`` makes them; of a
        causal model without labels, k = 1, the next token. Prompts in front of the input may be attached. ValueError where the
        model is of the other sort."""
        if is_encoder_decoder(model) or is_causal(model) != self.is_causal:
            sort = "causal" if self.is_causal else "masked"
            raise ValueError(f"model: expected a {sort} language model, as the template is for one, got {type(model).__name__}")
        given = {key: value for key, value in inputs.items() if key != "labels"}
        length = given["input_ids"].shape[1]
        if not self.is_causal:
            logits = model(**given).logits
            columns = (given["input_ids"] == self.mask_id).nonzero()[:, 1].view(-1, k) + logits.shape[1] - length
            return logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[2]))
        if "position_ids" in parameters_of(model):
            given["position_ids"] = positions(given["attention_mask"], length)
        behind = 1 if "labels" in inputs else 0  # the last token's prediction stands behind the answer
        if "logits_to_keep" in parameters_of(model):  # as a tensor: a slice's product copies the head's weight
            given["logits_to_keep"] = torch.arange(-k - behind, 0, device=given["input_ids"].device)
        logits = model(**given).logits
        return logits[:, logits.shape[1] - k - behind : logits.shape[1] - behind]


class Verbalizer:
    """Labels and the words that say them: ``{"plant": ["plant", "tree"], ...}``, or a list of labels that are their own words.

    A word's score is its log-probability by token ("mean", length-normalised), whole ("sum"), or its first token's ("first",
    which needs one pass only; ValueError where two labels begin alike). A label that has several words has the logarithm of the
    sum of their exponentials.
    """

    def __init__(self, labels: Mapping[str, Sequence[str]] | Sequence[str], tokenizer: Any, score: str = "mean"):
        if score not in SCORES:
            raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
        if isinstance(labels, str) or not isinstance(labels, Mapping | Sequence):
            raise TypeError(f"labels: expected a list of labels, or a dict of their words, got {labels!r}")
        words = labels if isinstance(labels, Mapping) else {label: [label] for label in labels}
        if len(words) < 2 or not all(words.values()):
            raise ValueError(f"labels: expected at least two, each with words, got {labels!r}")
        self.labels, self.score = list(words), score
        self.words = [
            [following_ids(word, tokenizer) for word in words[label]] for label in self.labels
        ]  # ids, by label and word
        if score == "first":
            self.words = [[ids[:1] for ids in label] for label in self.words]
            self._check_first()

    def _check_first(self) -> None:
        owner: dict[int, str] = {}
        for label, words in zip(self.labels, self.words, strict=True):
            for (token,) in words:
                if owner.setdefault(token, label) != label:
                    raise ValueError(
                        f"labels: expected different first tokens for score='first', got {owner[token]!r} and {label!r}"
                    )

    def answer(self, label: str) -> list[int]:
        """Token ids of a label's first word: what to train on. ValueError for an unknown label."""
        if label not in self.labels:
            raise ValueError(f"label: expected one of {', '.join(self.labels)}, got {label!r}")
        return self.words[self.labels.index(label)][0]

    @torch.no_grad()
    def scores(self, model: nn.Module, template: HardTemplate, texts: Sequence[str]) -> torch.Tensor:
        """(b, labels), fp32: the labels' scores for each text. One pass for all words of one token, one for each longer word."""
        device = next(model.parameters()).device
        one = None
        columns = []
        for words in self.words:
            of_words = []
            for ids in words:
                if len(ids) == 1:
                    one = _log_probabilities(model, template, texts, None, device)[:, 0] if one is None else one
                    of_words.append(one[:, ids[0]])
                else:
                    said = _log_probabilities(model, template, texts, ids, device)
                    whole = said[:, range(len(ids)), ids].sum(1)
                    of_words.append(whole / len(ids) if self.score == "mean" else whole)
            columns.append(torch.stack(of_words).logsumexp(0))
        return torch.stack(columns, dim=1)


def _log_probabilities(
    model: nn.Module, template: HardTemplate, texts: Sequence[str], answer: list[int] | None, device: torch.device
) -> torch.Tensor:
    """(b, tokens of the answer or 1, vocabulary)"""
    inputs = template.inputs(texts, None if answer is None else [answer] * len(texts))
    inputs = {key: value.to(device) for key, value in inputs.items()}
    return template.answer_logits(model, inputs, len(answer or [0])).float().log_softmax(-1)


def precision_at_1(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """The share of rows whose highest score, the first of equal ones, is the target's. scores (b, labels), targets (b,) indices.
    ValueError for other shapes, other indices, and for no rows."""
    if targets.is_floating_point() or targets.is_complex():
        raise TypeError(f"targets: expected indices, got {targets.dtype}")
    if scores.dim() != 2 or targets.shape != scores.shape[:1] or not len(targets):
        raise ValueError(
            f"targets: expected an index for each row of scores, got {tuple(targets.shape)} for {tuple(scores.shape)}"
        )
    if not bool(((targets >= 0) & (targets < scores.shape[1])).all()):
        raise ValueError(f"targets: expected indices below {scores.shape[1]}, got {targets.tolist()!r:.200}")
    return (scores.argmax(1) == targets).float().mean().item()
