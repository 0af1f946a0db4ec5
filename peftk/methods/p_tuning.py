"""P-Tuning (Liu et al. 2021, "GPT Understands, Too"): virtual tokens at any place of the input, mixed with real words, made in
training by a bidirectional LSTM and an MLP over them (section 3.2), an MLP, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftk.methods.input_prompts import Arrange, InputPrompts, entry_of
from peftk.methods.layout import NOTHING, Row, fixed, real, virtual
from peftk.methods.prompts import (
    Dense,
    EncodedPrompt,
    PlainPrompt,
    PromptConfig,
    check_fits,
    factor_dtype,
    is_count,
    is_probability,
)
from peftk.methods.templates import special_id, split_template
from peftk.methods.word_init import check_ids, embedded, following_ids, load_tokenizer, token_ids

ENCODERS = ("MLP", "LSTM", "NONE")


@dataclass
class PTuningConfig(PromptConfig):
    """HF peft's field names up to ``encoder_dropout``; the others are ours. Virtual tokens stand where one of
    ``placeholder_token_id``, ``template`` and ``positions`` says, and in front without any.

    ``generate`` goes on behind a template as long as it has a cache: without one each step is a new, longer {x}.
    """

    encoder_reparameterization_type: str = "MLP"  # "MLP" | "LSTM" (with an MLP behind) | "NONE"
    encoder_hidden_size: int | None = None  # None: token_dim
    encoder_num_layers: int = 2  # of the LSTM
    encoder_dropout: float = 0.0  # between the LSTM's layers
    placeholder_token_id: int | None = None  # each in a row's ids is the next virtual token; it may lie beyond the vocabulary
    template: str | None = None  # such as "[v]*3 {x} [v] is a [mask]": {x} the row's tokens, [v] virtual, words as they are
    positions: list[int] | None = None  # before which of a row's tokens the virtual ones stand; their count stands behind all
    init_token_ids: list[int | None] | None = None  # words that virtual tokens start from; None: at random
    tokenizer: Any = None  # for a template's words; an object, not saved
    tokenizer_name_or_path: str | None = None
    template_parts: list[list[Any]] | None = None  # the template with ids for words; made by itself

    peft_type = "P_TUNING"
    PRIVATE = "PEFTK_P_TUNING"
    KIND = InputPrompts
    TRAINING = ("init_token_ids", "tokenizer", "tokenizer_name_or_path")
    OURS = ("placeholder_token_id", "template", "positions", "template_parts", *TRAINING)

    def __post_init__(self) -> None:
        way = self.encoder_reparameterization_type
        self.encoder_reparameterization_type = getattr(way, "value", way)  # HF peft's enum
        if self.template is not None and self.template_parts is None:
            self.template_parts = parse_template(self.template, self._ids_of)
        name, count = self._counted()
        if self.num_virtual_tokens is None:
            self.num_virtual_tokens = count
        super().__post_init__()
        if count not in (None, self.num_virtual_tokens):
            raise ValueError(f"{name}: expected num_virtual_tokens={self.num_virtual_tokens} virtual tokens, got {count}")

    def _counted(self) -> tuple[str, int | None]:
        """The field that says how many virtual tokens there are, and how many; None where none does."""
        if self.template_parts is not None:
            return "template", sum(count for kind, count in self.template_parts if kind == "v")
        return "positions", None if self.positions is None else len(self.positions)

    def checks(self) -> dict[str, tuple[bool, str]]:
        given = [name for name in ("placeholder_token_id", "template", "positions") if getattr(self, name) is not None]
        places, words, way = self.positions, self.init_token_ids, self.encoder_reparameterization_type
        return {
            **super().checks(),
            "encoder_reparameterization_type": (way in ENCODERS, f"one of {', '.join(ENCODERS)}"),
            "encoder_hidden_size": (self.encoder_hidden_size is None or is_count(self.encoder_hidden_size), "a positive integer"),
            "encoder_num_layers": (is_count(self.encoder_num_layers), "a positive integer"),
            "encoder_dropout": (is_probability(self.encoder_dropout), "a probability in [0, 1)"),
            "placeholder_token_id": (_is_place_or_none(self.placeholder_token_id), "None or a token id"),
            "positions": (
                places is None or (all(map(_is_place, places)) and list(places) == sorted(places) and len(places) > 0),
                "None or ascending integers from 0",
            ),
            "init_token_ids": (
                words is None or (len(words) == self.num_virtual_tokens and all(_is_place_or_none(word) for word in words)),
                "a token id, or None, for each virtual token",
            ),
            (given[1] if len(given) > 1 else "template"): (len(given) < 2, f"None beside {given[0] if given else ''}"),
        }

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k not in self.TRAINING}

    def has_encoder(self) -> bool:
        return self.encoder_reparameterization_type != "NONE"

    def build(self, model: nn.Module) -> nn.Module:
        _, embedding, keys = entry_of(model)
        if keys == "decoder":  # HF peft can't; of two stacks' vectors it would use the first
            self.num_transformer_submodules = 1
        n = self.num_virtual_tokens
        check_fits(model, n)
        width = embedded(embedding, [0]).shape[1]
        self.settle(token_dim=width)
        words = dict(enumerate(self.init_token_ids or ()))
        words = {at: word for at, word in words.items() if word is not None}
        check_ids("init_token_ids", list(words.values()), embedding)
        check_ids("template", [i for kind, ids in self.template_parts or () if kind == "ids" for i in ids], embedding)
        if self.encoder_hidden_size is None:
            self.encoder_hidden_size = width
        rows = n * self.num_transformer_submodules  # HF peft's file has as many; the first are used
        start = torch.randn(rows, width)
        if words and not self.inference_mode:
            start[list(words)] = embedded(embedding, list(words.values())).to(start)
        return self._encoder(start).to(embedding.weight.device, factor_dtype(embedding.weight))

    def _encoder(self, start: torch.Tensor) -> nn.Module:
        if not self.has_encoder() or self.is_plain:
            return PlainPrompt(start)
        if self.encoder_reparameterization_type == "MLP":
            return MLPPrompt(start, self.encoder_hidden_size)
        return LSTMPrompt(start, self.encoder_hidden_size, self.encoder_num_layers, self.encoder_dropout)

    def arrangement(self) -> Arrange | None:
        n = self.num_virtual_tokens
        if self.placeholder_token_id is not None:
            return Placeholders(self.placeholder_token_id, n)
        if self.template_parts is not None:
            return Template(self.template_parts)
        return None if self.positions is None else Positions(tuple(self.positions))

    def _ids_of(self, kind: str, text: str, is_behind: bool) -> list[int]:
        """Of a template's words, or of a special token."""
        if kind == "words":
            return (following_ids if is_behind else token_ids)(text, self.tokenizer, self.tokenizer_name_or_path)
        return [special_id(text, load_tokenizer(self.tokenizer, self.tokenizer_name_or_path))]


def _is_place(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_place_or_none(value: Any) -> bool:
    return value is None or _is_place(value)


def parse_template(template: str, ids_of: Callable[[str, str, bool], list[int]]) -> list[list[Any]]:
    """``[v]*2 {x} is a [mask]`` -> [["v", 2], ["x", None], ["ids", [...]]]. ``ids_of(kind, text, is_behind)``, where something
    may stand before. ValueError unless there is one {x} and some [v]."""
    parts: list[list[Any]] = []
    for kind, what in split_template(template):
        parts.append([kind, what] if kind in "vx" else ["ids", ids_of(kind, what, bool(parts))])
    if [kind for kind, _ in parts].count("x") != 1 or not any(kind == "v" and count for kind, count in parts):
        raise ValueError(f"template: expected one {{x}} and at least one [v], got {template!r}")
    return parts


@dataclass(frozen=True)
class Placeholders:
    """Virtual tokens where the ids say."""

    token: int
    n: int
    added = 0
    needs_ids = True

    def __call__(self, ids: list[int] | None, length: int, kept: list[int], first: int) -> Row:
        if ids is None:  # where only lengths matter
            return real(range(length))
        here = [at for at, token in enumerate(ids) if token == self.token]
        if len(here) != self.n:
            raise ValueError(f"expected {self.n} placeholders (token {self.token}), got {len(here)}")
        slot = [NOTHING] * length
        for i, at in enumerate(here):
            slot[at] = first + i
        return Row(list(range(length)), slot, [NOTHING] * length)


@dataclass(frozen=True)
class Positions:
    """Virtual tokens before certain ones of a row's tokens."""

    places: tuple[int, ...]

    @property
    def added(self) -> int:
        return len(self.places)

    def __call__(self, ids: list[int] | None, length: int, kept: list[int], first: int) -> Row:
        if self.places[-1] > len(kept):
            raise ValueError(f"expected positions up to its {len(kept)} tokens, got {self.places[-1]}")
        row = real([])
        before = 0
        for i, place in enumerate(self.places):
            row += real(kept[before:place]) + virtual([first + i])
            before = place
        return row + real(kept[before:])


class Template:
    """A row's tokens among virtual ones and words."""

    def __init__(self, parts: Sequence[Sequence[Any]]):
        self.parts = parts
        self.added = sum(count if kind == "v" else len(count) if kind == "ids" else 0 for kind, count in parts)

    def __call__(self, ids: list[int] | None, length: int, kept: list[int], first: int) -> Row:
        row = real([])
        for kind, what in self.parts:
            if kind == "v":
                row += virtual(list(range(first, first + what)))
                first += what
            else:
                row += real(kept) if kind == "x" else fixed(what)
        return row


class MLPPrompt(EncodedPrompt):
    """Embedding (n, d) -> Linear -> ReLU -> Linear -> ReLU -> Linear (n, d)."""

    def __init__(self, start: torch.Tensor, hidden: int):
        super().__init__()
        d = start.shape[1]
        self.embedding = nn.Embedding.from_pretrained(start, freeze=False)
        self.mlp_head = nn.Sequential(Dense(d, hidden), nn.ReLU(), Dense(hidden, hidden), nn.ReLU(), Dense(hidden, d))

    def forward(self) -> torch.Tensor:
        return self.mlp_head(self.embedding.weight)


class LSTMPrompt(EncodedPrompt):
    """Embedding (n, d) -> bidirectional LSTM (n, 2 * hidden) -> Linear -> ReLU -> Linear (n, d)."""

    def __init__(self, start: torch.Tensor, hidden: int, layers: int, dropout: float):
        super().__init__()
        d = start.shape[1]
        self.embedding = nn.Embedding.from_pretrained(start, freeze=False)
        self.lstm_head = nn.LSTM(d, hidden, num_layers=layers, dropout=dropout, bidirectional=True, batch_first=True)
        self.mlp_head = nn.Sequential(Dense(2 * hidden, 2 * hidden), nn.ReLU(), Dense(2 * hidden, d))

    def forward(self) -> torch.Tensor:
        return self.mlp_head(self.lstm_head(self.embedding.weight[None])[0])[0]
