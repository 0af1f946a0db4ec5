"""What the experiments train on: a frozen model, records, a loss and a score. A task knows no method."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.papers.texts import CLASSES, KINDS
from bench.papers.verses import NAME_TAGS
from peftk import HardTemplate, Verbalizer, precision_at_1

IGNORED = -100
SHORT = 14  # words and signs of an encoder's text: longer texts are left out, to save time
LONGEST = 48  # pieces of a text; longer ones are cut
AT_ONCE = 32  # rows of a batch that is scored


@dataclass(frozen=True)
class Sizes:
    """How many records."""

    train: int
    test: int


@dataclass
class Answering:
    """A causal model answers a text in a template's [mask]. With a verbaliser the score is precision at 1 among its labels,
    without one the mean loss of an answer's token, in nats."""

    model: nn.Module
    tokenizer: Any
    template: HardTemplate
    train: Sequence[tuple[str, list[int]]]  # text, answer's tokens
    test: Sequence[tuple[str, list[int]]]
    verbalizer: Verbalizer | None = None
    separator: int | None = None  # the token between text and answer, where there is one
    task_type = "CAUSAL_LM"

    @property
    def metric(self) -> str:
        return "held-out loss" if self.verbalizer is None else "P@1"

    def fresh(self, seed: int) -> nn.Module:
        """The model itself: what is trained is beside it, and is taken away again."""
        return self.model

    def softened(self) -> Answering:
        """The template's words as placeholders, the first id beyond the vocabulary."""
        soft = copy.copy(self)
        soft.template = self.template.soften(self.placeholder)
        return soft

    @property
    def placeholder(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    def loss(self, model: nn.Module, rows: Sequence[tuple[str, list[int]]]) -> torch.Tensor:
        """The mean over the answers' tokens."""
        inputs = self.template.inputs([text for text, _ in rows], [answer for _, answer in rows])
        k = max(len(answer) for _, answer in rows)
        logits = self.template.answer_logits(model, inputs, k).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, -k:].flatten(), ignore_index=IGNORED)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """On the held-out records."""
        batches = [self.test[at : at + AT_ONCE] for at in range(0, len(self.test), AT_ONCE)]
        if self.verbalizer is None:
            counts = [sum(len(answer) for _, answer in batch) for batch in batches]
            losses = [self.loss(model, batch).item() for batch in batches]
            return sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
        scores = [self.verbalizer.scores(model, self.template, [text for text, _ in batch]) for batch in batches]
        answers = [words[0] for words in self.verbalizer.words]
        return precision_at_1(torch.cat(scores), torch.tensor([answers.index(answer) for _, answer in self.test]))


@dataclass
class Encoding:
    """An encoder with a fresh head classifies texts, or tags their words (the first piece of each)."""

    model: nn.Module
    tokenizer: Any
    train: Sequence[tuple[Any, Any]]  # text, label's index; or words, tags' indices
    test: Sequence[tuple[Any, Any]]
    metric: str  # "accuracy" or "F1"
    separator: int | None = None

    @property
    def task_type(self) -> str:
        """HF peft's word, by which an adapter knows the head."""
        return "TOKEN_CLS" if self.metric == "F1" else "SEQ_CLS"

    def fresh(self, seed: int) -> nn.Module:
        """A copy whose head begins anew."""
        model = copy.deepcopy(self.model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.classifier.weight.normal_(0, model.config.initializer_range, generator=generator)
            model.classifier.bias.zero_()
        return model

    def _batch(self, rows: Sequence[tuple[Any, Any]]) -> dict[str, torch.Tensor]:
        texts, labels = [row[0] for row in rows], [row[1] for row in rows]
        is_tagging = self.metric == "F1"
        options = {"is_split_into_words": is_tagging, "truncation": True, "max_length": LONGEST, "padding": True}
        made = self.tokenizer(texts, return_tensors="pt", **options)
        if is_tagging:
            labels = [on_first_pieces(made.word_ids(i), tags) for i, tags in enumerate(labels)]
        return {**{key: made[key] for key in ("input_ids", "attention_mask")}, "labels": torch.tensor(labels)}

    def loss(self, model: nn.Module, rows: Sequence[tuple[Any, Any]]) -> torch.Tensor:
        """The model's own."""
        return model(**self._batch(rows)).loss

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """On the held-out records: accuracy, or the tags' micro-F1 without O."""
        said, right = [], []
        for at in range(0, len(self.test), AT_ONCE):
            inputs = self._batch(self.test[at : at + AT_ONCE])
            labels = inputs.pop("labels")
            kept = labels != IGNORED
            said.append(model(**inputs).logits.argmax(-1)[kept])
            right.append(labels[kept])
        said, right = torch.cat(said), torch.cat(right)
        if self.metric == "accuracy":
            return (said == right).float().mean().item()
        return micro_f1(said, right)


def micro_f1(said: torch.Tensor, right: torch.Tensor) -> float:
    """Of tags' indices, both (n,), 0 being O: 2 * hits / (tags said + tags that are); 0 where there is neither."""
    hits = ((said == right) & (right != 0)).sum().item()
    both = (said != 0).sum().item() + (right != 0).sum().item()
    return 2 * hits / both if both else 0.0


def on_first_pieces(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """By piece its word's tag, IGNORED on a word's further pieces and on special tokens. ``words``: by piece its word's index."""
    before = [None, *words]
    return [tags[now] if now is not None and now != was else IGNORED for was, now in zip(before, words, strict=False)]


def split(records: Sequence[Any], sizes: Sizes, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """(train, test), drawn once: every run has the same. ValueError where the records are too few."""
    if len(records) < sizes.train + sizes.test:
        raise ValueError(f"records: expected at least {sizes.train + sizes.test}, got {len(records)}")
    drawn = random.Random(seed).sample(list(records), sizes.train + sizes.test)
    return drawn[: sizes.train], drawn[sizes.train :]


def kinds(models: Any, texts: Any, sizes: Sizes) -> Answering:
    """Knowledge probing: ``{x} is a kind of [mask]``, x a word of at most two tokens, the answer one of KINDS."""
    records = texts.kinds()
    model, tokenizer = models.generator()
    template = HardTemplate("{x} is a kind of [mask]", tokenizer)
    records = [(word, kind) for word, kind in records if len(tokenizer(f" {word}").input_ids) <= 2]
    labels = sorted({kind for _, kind in records}, key=KINDS.index)
    verbalizer = Verbalizer(labels, tokenizer, score="first")
    train, test = split([(word, verbalizer.answer(kind)) for word, kind in records], sizes)
    return Answering(model, tokenizer, template, train, test, verbalizer)


def define(models: Any, texts: Any, sizes: Sizes, dense: bool = False) -> Answering:
    """Generation from a record: ``dachshund is a kind of hunting dog : small long-bodied short-legged ...``. ``dense``: by the
    model before it is quantised."""
    nouns = texts.definitions()
    model, tokenizer = models.generator(dense)
    template = HardTemplate("{x} : [mask]", tokenizer)
    records = [
        (f"{word} is a kind of {kind}", [*tokenizer(f" {text}").input_ids, tokenizer.eos_token_id]) for word, kind, text in nouns
    ]
    records = [(text, answer) for text, answer in records if len(answer) <= 14 and len(tokenizer(text).input_ids) <= 10]
    return Answering(model, tokenizer, template, *split(records, sizes), separator=template.word_ids[-1])


def glosses(models: Any, texts: Any, sizes: Sizes) -> Encoding:
    """A noun's definition -> its lexicographer class."""
    records = texts.glosses()
    names = [name for name in CLASSES if any(name == other for _, other in records)]
    model, tokenizer = models.encoder("sequence", names)
    short = [(text, names.index(name)) for text, name in records if len(text.split()) <= SHORT]
    train, test = split(short, sizes)
    return Encoding(model, tokenizer, train, test, "accuracy")


def names(models: Any, texts: Any, sizes: Sizes) -> Encoding:
    """A verse's words -> which of them are names."""
    records = [(words, [NAME_TAGS.index(tag) for tag in tags]) for words, tags in texts.names()]
    model, tokenizer = models.encoder("token", NAME_TAGS)
    train, test = split([(words, tags) for words, tags in records if len(words) <= SHORT], sizes)
    return Encoding(model, tokenizer, train, test, "F1")


# By name: what makes the task, and its sizes in earnest.
TASKS: dict[str, tuple[Callable[[Any, Any, Sizes], Any], Sizes]] = {
    "kinds": (kinds, Sizes(400, 200)),
    "define": (define, Sizes(400, 32)),
    "define-dense": (functools.partial(define, dense=True), Sizes(400, 32)),
    "glosses": (glosses, Sizes(600, 300)),
    "names": (names, Sizes(400, 200)),
}
QUICK = Sizes(32, 16)
