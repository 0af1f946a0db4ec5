"""Prefix Tuning (Li & Liang 2021): trained keys and values in front of every attention layer, [PREFIX; x; y].

In training an MLP may make them, embedding -> Linear -> tanh -> Linear (section 4.3); inference needs what it makes only. For the
ablations of section 7: [x; INFIX; y], and trained vectors at the input only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftk.methods.adapter import Beside
from peftk.methods.attention import CROSS, ENCODER, SELF, Attention, find_attentions, find_positions, recorded
from peftk.methods.deep_prompts import DeepPrompts
from peftk.methods.input_prompts import InputPrompts, entry_of
from peftk.methods.prompts import (
    Dense,
    EncodedPrompt,
    PlainPrompt,
    PromptConfig,
    are_ids,
    check_fits,
    evaluating,
    factor_dtype,
    is_count,
    is_encoder_decoder,
    is_probability,
    parameters_of,
    token_embedding,
)
from peftk.methods.word_init import check_ids, embedded, repeated, token_ids

KINDS = (ENCODER, SELF, CROSS)
VARIANTS = ("prefix", "infix", "embedding")


@dataclass
class PrefixTuningConfig(PromptConfig):
    """HF peft's field names up to ``init_weights``; the others are ours.

    Where ``attentions`` is None, SEQ_2_SEQ_LM gets HF peft's prefix: in the decoder's self-attention, layer l with
    the keys and values 2l modulo the number of layers, so that an even number of layers share in twos.
    """

    prefix_projection: bool = False  # an MLP makes the prefix in training
    encoder_hidden_size: int | None = None  # of the MLP; None: token_dim
    init_weights: str | None = None  # "zero": the prefix is zero at first
    prefix_dropout: float = 0.0  # on keys and values, in training
    attentions: list[str] | None = None  # of "encoder", "self", "cross": a prefix of its own for each
    variant: str = "prefix"  # "infix": [x; INFIX; y]; "embedding": vectors at the input only
    infix_token_id: int | None = None  # the infix stands behind this token's first place
    init_text: str | None = None  # start from its words' activations
    init_token_ids: list[int] | None = None  # the same, by ids
    tokenizer: Any = None  # for init_text; an object, not saved
    tokenizer_name_or_path: str | None = None

    peft_type = "PREFIX_TUNING"
    PRIVATE = "PEFTK_PREFIX_TUNING"
    OURS = (
        "prefix_dropout", "attentions", "variant", "infix_token_id", "init_text", "init_token_ids", "tokenizer",
        "tokenizer_name_or_path",
    )  # fmt: skip
    TRAINING = ("prefix_dropout", "init_text", "init_token_ids", "tokenizer", "tokenizer_name_or_path")

    @property
    def KIND(self) -> type[Beside]:
        """What stands beside the model."""
        return InputPrompts if self.variant == "embedding" else DeepPrompts

    def checks(self) -> dict[str, tuple[bool, str]]:
        has_tokenizer = self.tokenizer is not None or self.tokenizer_name_or_path is not None
        kinds = self.attentions
        is_infix = self.variant == "infix"
        return {
            **super().checks(),
            "encoder_hidden_size": (self.encoder_hidden_size is None or is_count(self.encoder_hidden_size), "a positive integer"),
            "init_weights": (self.init_weights in (None, "zero"), 'None or "zero"'),
            "prefix_dropout": (is_probability(self.prefix_dropout), "a probability in [0, 1)"),
            "attentions": (kinds is None or (bool(kinds) and set(kinds) <= set(KINDS)), f"None or some of {', '.join(KINDS)}"),
            "variant": (self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}"),
            "infix_token_id": (is_infix == (self.infix_token_id is not None), "a token id for an infix, None otherwise"),
            "init_token_ids": (
                self.init_token_ids is None or (are_ids(self.init_token_ids) and self.init_text is None),
                "token ids, or None beside init_text",
            ),
            "tokenizer": (self.init_text is None or has_tokenizer, "one, or tokenizer_name_or_path, for init_text"),
        }

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        return {
            k: v for k, v in fields.items() if k not in ("tokenizer", "tokenizer_name_or_path", "init_text", "init_token_ids")
        }

    def has_encoder(self) -> bool:
        return self.prefix_projection

    def build(self, model: nn.Module) -> nn.Module:
        check_fits(model, self.num_virtual_tokens)
        if self.variant == "embedding":
            return self._vectors(model)
        found = find_attentions(model)
        find_positions(model, found)
        groups = self._groups(model, found)
        if self.variant == "infix":
            _check_takes_infix(model)
        first = next(a for a in found if a.kind == SELF)
        widths = {found[at].width for places in groups.values() for at in places}
        if len(widths) == 1:
            self.settle(token_dim=first.width, num_attention_heads=first.heads)
            if self.attentions is None:
                self.settle(num_layers=len(groups["self"]))
        elif self.token_dim is None:
            self.token_dim = first.width
        ids = self._start_ids(model)
        weight = token_embedding(model.get_decoder() if is_encoder_decoder(model) else model).weight
        facts = {"device": weight.device, "dtype": factor_dtype(weight)}
        prefixes = {kind: self._prefix([2 * found[at].width for at in places]).to(**facts) for kind, places in groups.items()}
        if ids is not None:
            start = _activations(model, found, ids, {at for places in groups.values() for at in places})
            for kind, places in groups.items():
                prefixes[kind].begin([start[at] for at in places])
        index = {at: (kind, i) for kind, places in groups.items() for i, at in enumerate(places)}
        if self.attentions is None and self.num_transformer_submodules == 2:
            count = len(groups["self"])
            index = {at: ("self", 2 * i % count) for i, at in enumerate(groups["self"])}
        return Prefixes(prefixes, index, self.attentions is not None)

    def _groups(self, model: nn.Module, found: Sequence[Attention]) -> dict[str, list[int]]:
        """By kind, indices of the attention modules that get a prefix."""
        groups = {}
        for kind in self.attentions or (SELF,):
            groups[kind] = [at for at, attention in enumerate(found) if attention.kind == kind]
            if not groups[kind]:
                raise ValueError(
                    f"attentions: expected kinds that the model has, got {kind!r}, which {type(model).__name__} lacks"
                )
        return groups

    def _prefix(self, widths: list[int]) -> nn.Module:
        n, is_zero = self.num_virtual_tokens, self.init_weights == "zero"
        if not self.prefix_projection or self.is_plain:
            make = torch.zeros if is_zero else torch.randn
            return Prefix([make(n, width) for width in widths], self.prefix_dropout)
        if self.encoder_hidden_size is None:
            self.encoder_hidden_size = self.token_dim
        return ProjectedPrefix(n, self.token_dim, self.encoder_hidden_size, widths, self.prefix_dropout, is_zero)

    def _start_ids(self, model: nn.Module) -> list[int] | None:
        if self.inference_mode or (self.init_text is None and self.init_token_ids is None):
            return None
        ids = self.init_token_ids or token_ids(self.init_text, self.tokenizer, self.tokenizer_name_or_path)
        name = "init_token_ids" if self.init_text is None else "tokenizer"
        check_ids(name, ids, token_embedding(model.get_decoder() if is_encoder_decoder(model) else model))
        return repeated(ids, self.num_virtual_tokens)

    def _vectors(self, model: nn.Module) -> nn.Module:
        """The variant at the input: what Prompt Tuning trains, with Prefix Tuning's MLP."""
        _, embedding, _ = entry_of(model)
        width = embedded(embedding, [0]).shape[1]
        self.settle(token_dim=width)
        facts = {"device": embedding.weight.device, "dtype": factor_dtype(embedding.weight)}
        prefix = self._prefix([width]).to(**facts)
        ids = self._start_ids(model)
        if ids is not None:
            prefix.begin([embedded(embedding, ids)])
        return PlainPrompt(prefix.pair(0)) if prefix.is_plain else PrefixVectors(prefix)


def _check_takes_infix(model: nn.Module) -> None:
    if is_encoder_decoder(model):
        raise ValueError("variant: expected a prefix for an encoder-decoder model, got 'infix', which is for one stack")
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()):
        kind = type(model).__name__
        raise ValueError(f"variant: expected a prefix for {kind}, got 'infix': its forward hands no keywords on to attention")


class Prefix(nn.Module):
    """Keys and values of some layers, (n, 2 * width) each, as parameters."""

    is_plain = True

    def __init__(self, pairs: Sequence[torch.Tensor], dropout: float):
        super().__init__()
        self.pairs = nn.ParameterList([nn.Parameter(pair.detach().clone()) for pair in pairs])
        self.dropout = dropout

    def pair(self, i: int) -> torch.Tensor:
        """(n, 2 * width) of layer ``i``."""
        return nn.functional.dropout(self.pairs[i], self.dropout, self.training)

    def flat(self) -> torch.Tensor:
        """(n, sum of 2 * width): all layers side by side."""
        return torch.cat(list(self.pairs), dim=1).detach()

    @torch.no_grad()
    def load_flat(self, flat: torch.Tensor) -> None:
        """Take a file's tensor."""
        for pair, values in zip(self.pairs, flat.split([pair.shape[1] for pair in self.pairs], dim=1), strict=True):
            pair.copy_(values)

    def begin(self, pairs: Sequence[torch.Tensor]) -> None:
        """Make it these."""
        self.load_flat(torch.cat(list(pairs), dim=1))


class ProjectedPrefix(nn.Module):
    """The same, made by an MLP: embedding (n, d) -> Linear -> tanh -> a Linear a layer. Layers make their own, so that one which
    is checkpointed needs no tensor of another's graph."""

    is_plain = False

    def __init__(self, n: int, d: int, hidden: int, widths: Sequence[int], dropout: float, is_zero: bool):
        super().__init__()
        self.embedding = nn.Embedding(n, d)
        self.hidden = Dense(d, hidden)
        self.out = nn.ModuleList([Dense(hidden, width) for width in widths])
        self.dropout = dropout
        for layer in self.out if is_zero else ():
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _activation(self) -> torch.Tensor:
        return torch.tanh(self.hidden(self.embedding.weight))

    def pair(self, i: int) -> torch.Tensor:
        """(n, 2 * width) of layer ``i``."""
        return nn.functional.dropout(self.out[i](self._activation()), self.dropout, self.training)

    @torch.no_grad()
    def flat(self) -> torch.Tensor:
        """(n, sum of 2 * width): all layers side by side."""
        activation = self._activation()
        return torch.cat([layer(activation) for layer in self.out], dim=1)

    def plain(self) -> Prefix:
        """What the MLP makes now, as parameters."""
        return Prefix(self.flat().split([layer.out_features for layer in self.out], dim=1), self.dropout)

    @torch.no_grad()
    def begin(self, pairs: Sequence[torch.Tensor]) -> None:
        """Make the last layers' weights such that the prefix is this: the least change that does (exact where the hidden layer is
        no narrower than the prefix is long)."""
        activation = self._activation().double()
        inverse = torch.linalg.pinv(activation)
        for layer, pair in zip(self.out, pairs, strict=True):
            missing = pair.to(activation.device, torch.float64) - layer(activation.to(layer.weight.dtype)).double()
            layer.weight += (inverse @ missing).T.to(layer.weight.dtype)


class Prefixes(nn.Module):
    """An adapter's prefixes by kind of attention. ``index``: by attention module, which of them and which of its layers."""

    def __init__(self, prefixes: dict[str, nn.Module], index: dict[int, tuple[str, int]], is_named: bool):
        super().__init__()
        self.prefixes = nn.ModuleDict(prefixes)
        self.index = index
        self.is_named = is_named  # a file's keys say the kind
        self.moves_positions = SELF in prefixes

    @property
    def is_plain(self) -> bool:
        """Whether no MLP is left."""
        return all(prefix.is_plain for prefix in self.prefixes.values())

    def has(self, at: int) -> bool:
        """Whether attention module ``at`` gets a prefix."""
        return at in self.index

    def pair(self, at: int) -> torch.Tensor:
        """(n, 2 * width): keys and values for attention module ``at``."""
        kind, i = self.index[at]
        return self.prefixes[kind].pair(i)

    def flat(self) -> dict[str, torch.Tensor]:
        """By the file's key."""
        return {self._key(kind): prefix.flat() for kind, prefix in self.prefixes.items()}

    def load_flat(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take a file's tensors."""
        for kind, prefix in self.prefixes.items():
            prefix.load_flat(tensors[self._key(kind)])

    def plain(self) -> Prefixes:
        """What the MLPs make now, as parameters."""
        made = {kind: p if p.is_plain else p.plain() for kind, p in self.prefixes.items()}
        return Prefixes(made, self.index, self.is_named).train(self.training)

    def requires_grad_of_parameters(self) -> bool:
        """Whether it is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def _key(self, kind: str) -> str:
        return f"{kind}.prompt_embeddings" if self.is_named else "prompt_embeddings"


class PrefixVectors(EncodedPrompt):
    """An MLP's vectors for the input: () -> (n, d)."""

    def __init__(self, prefix: ProjectedPrefix):
        super().__init__()
        self.prefix = prefix

    def forward(self) -> torch.Tensor:
        return self.prefix.pair(0)


@torch.no_grad()
def _activations(model: nn.Module, found: list[Attention], ids: list[int], wanted: set[int]) -> dict[int, torch.Tensor]:
    """By attention module, keys and values of these tokens, (n, 2 * width)."""
    if any(found[at].kind != SELF for at in wanted) and "input_ids" not in parameters_of(model):
        raise ValueError(f"init_text: expected a model whose stacks take token ids, got {type(model).__name__}")
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    runs, inputs = model, {"input_ids": tokens}
    if is_encoder_decoder(model):
        needs_encoder = any(found[at].kind != SELF for at in wanted)
        runs = model if needs_encoder else model.get_decoder()
        inputs |= {"decoder_input_ids": tokens} if needs_encoder else {}
    with evaluating(model), recorded(found) as seen:
        runs(**inputs)
    return {at: torch.cat([states[0].transpose(0, 1).flatten(1) for states in seen[at]], dim=1).float() for at in wanted}
