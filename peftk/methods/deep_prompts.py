"""Trained keys and values in front of every attention layer: what Prefix Tuning and P-Tuning v2 share.

Hooks on the attention modules hand them a cache that puts the prefix in front and a mask that is wider; hooks on the positional
embeddings move positions on by the prefix's length, as though it had been read before. The real cache never holds a prefix, so
caches, beams and gradient checkpointing are as without; a checkpointed layer makes its prefix again from the parameters.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from peftk.methods.adapter import Beside
from peftk.methods.attention import CROSS, PrefixCache, find_attentions, find_positions, shifted, widened_mask
from peftk.methods.layout import positions
from peftk.methods.prompts import as_keywords, cache_of, is_causal, parameters_of

INFIX = "peftk_infix_start"  # a keyword that models hand on to their attention: (batch,), the first column that sees the infix


class DeepPrompts(Beside):
    """The prefixes of a model: ``prompt_embeddings[name].pair(at)`` is (n, 2 * width), keys and values for the attention module
    ``at``, or None where the prefix leaves it alone."""

    NAME = "deep_prompts"

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.attentions = find_attentions(model)
        self.lengths: dict[str, int] = {}  # of prefixes that positions count
        self.infix: dict[str, int] = {}  # by name, the token behind which an infix stands
        self.fills_positions = is_causal(model) and "position_ids" in parameters_of(model)
        self._batch: int | None = None
        self._first: torch.Tensor | None = None  # of the call that runs, what INFIX says
        hook = {"with_kwargs": True}
        self._handles = [model.register_forward_pre_hook(self.enter, **hook)]
        for at, attention in enumerate(self.attentions):
            self._handles.append(attention.module.register_forward_pre_hook(partial(self.attend, at), **hook))
        for module in find_positions(model, self.attentions):
            self._handles.append(module.register_forward_hook(self.move_positions, **hook))

    def add(self, name: str, encoder: nn.Module, config: Any) -> None:
        super().add(name, encoder, config)
        self.lengths[name] = config.num_virtual_tokens if encoder.moves_positions else 0
        if config.variant == "infix":
            self.infix[name] = config.infix_token_id

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        del self.lengths[name]
        self.infix.pop(name, None)

    def check_active(self, names: list[str]) -> None:
        here = [name for name in names if name in self.adapter_names()]
        if len(here) > 1 and any(name in self.infix for name in here):
            raise ValueError(f"names: expected prefixes, got {', '.join(here)}: an infix can't be combined with another one")

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the model's own call."""
        self._batch = self._first = None
        by_row = self.by_row()
        if not any(by_row):
            return None
        kwargs = as_keywords(module, args, kwargs)
        given = next((kwargs[name] for name in _BATCHED if kwargs.get(name) is not None), None)
        if given is None:
            return None
        self._batch = given.shape[0]
        cache = cache_of(kwargs)
        is_start = cache is None or cache.get_seq_length() == 0
        mask = kwargs.get("attention_mask")
        knows = mask is not None and mask.dim() == 2 and kwargs.get("position_ids") is None
        if self.fills_positions and is_start and knows:
            kwargs["position_ids"] = positions(mask, given.shape[1])
        if any(name in self.infix for names in by_row for name in names):
            self._first = self._starts(by_row, kwargs.get("input_ids"), given, is_start)
            kwargs[INFIX] = self._first
        return (), kwargs

    def attend(self, at: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before an attention module's call."""
        by_row = self.by_row()
        have = {name for names in by_row for name in names if self.prompt_embeddings[name].has(at)}
        if not have:  # and then no infix, which is for every module with attention of its kind
            return None
        kwargs = as_keywords(module, args, kwargs)
        first = kwargs.pop(INFIX, None)
        attention = self.attentions[at]
        batch, queries = kwargs["hidden_states"].shape[:2]
        pairs, seen = self._pairs(at, by_row, batch)
        if any(name in self.infix for name in have):
            if first is None:
                kind, versions = type(module).__name__, sys.modules.get(type(module).__module__.partition(".")[0])
                of = f" of {versions.__name__} {versions.__version__}" if hasattr(versions, "__version__") else ""
                raise ValueError(
                    f"infix_token_id: expected a model that hands keywords on to its attention, but {kind}{of} got none"
                )
            behind = torch.arange(queries, device=first.device) >= first[:, None]
            seen = behind[..., None] if seen is None else behind[..., None] & seen
            seen = seen.expand(batch, queries, pairs.shape[1])
        keys, values = (
            part.unflatten(-1, (attention.heads, attention.head_dim)).transpose(1, 2) for part in pairs.chunk(2, dim=-1)
        )
        real = cache_of(kwargs)
        kwargs[attention.mask] = widened_mask(attention, kwargs, keys.shape[2], seen, real)
        kwargs[attention.cache] = PrefixCache(real, keys, values)
        kwargs[attention.cache].reads = real is not None or attention.kind != CROSS
        if "position_bias" in kwargs and kwargs.get("cache_position") is not None:  # T5 of transformers 4 counts the keys by it
            kwargs["cache_position"] = kwargs["cache_position"] + keys.shape[2]
            kwargs[attention.cache].shifted = keys.shape[2]
        return (), kwargs

    def _pairs(self, at: int, by_row: list[tuple[str, ...]], batch: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys and values, (1 or batch, n, 2 * width), and, where rows differ in length, (batch, 1, n): which are a row's own.
        Shorter ones stand on the right, next to the tokens."""
        made = {names: self._of(at, names) for names in dict.fromkeys(by_row)}
        if len(made) == 1:
            return made[by_row[0]][None], None
        widest = max(pair.shape[0] for pair in made.values())
        padded = torch.stack([nn.functional.pad(pair, (0, 0, widest - pair.shape[0], 0)) for pair in made.values()])
        which = {names: index for index, names in enumerate(made)}
        index = torch.tensor(self.spread([which[names] for names in by_row], batch), device=padded.device)
        lengths = torch.tensor([pair.shape[0] for pair in made.values()], device=padded.device)[index]
        seen = torch.arange(widest, device=padded.device) >= (widest - lengths)[:, None]
        return padded[index], seen[:, None]

    def _of(self, at: int, names: tuple[str, ...]) -> torch.Tensor:
        parts = [self.prompt_embeddings[name].pair(at) for name in names if self.prompt_embeddings[name].has(at)]
        if parts:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        device = next(self.parameters()).device
        return torch.zeros(0, 2 * self.attentions[at].width, device=device, dtype=next(self.parameters()).dtype)

    def move_positions(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """After positional embeddings were made: those further on instead."""
        lengths = [sum(self.lengths[name] for name in names) for names in self.by_row()]
        if not any(lengths):
            return None
        kwargs = as_keywords(module, args, kwargs)
        if self._first is not None:
            return self._move_behind(module, kwargs, output, max(lengths))
        if len(set(lengths)) == 1:
            return shifted(module, kwargs, lengths[0])
        batch = self._batch if self._batch is not None else len(lengths)
        made = {by: shifted(module, kwargs, by) for by in dict.fromkeys(lengths)}
        return _by_row(made, self.spread(lengths, batch))

    def _move_behind(self, module: nn.Module, kwargs: dict[str, Any], output: Any, by: int) -> Any:
        """Only the tokens behind an infix are further on."""
        further = shifted(module, kwargs, by)

        def choose(near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
            behind = torch.arange(near.shape[-2], device=near.device) >= self._first.to(near.device)[:, None]
            return torch.where(behind[..., None], far, near)

        if isinstance(output, tuple):
            return tuple(choose(near, far) for near, far in zip(output, further, strict=True))
        return choose(output, further)

    def _starts(
        self, by_row: list[tuple[str, ...]], ids: torch.Tensor | None, given: torch.Tensor, is_start: bool
    ) -> torch.Tensor:
        """(batch,): the first column of this call that stands behind a row's infix. A call that goes on with a cache does
        whole; a row without an infix does nowhere."""
        batch, length = given.shape[:2]
        if not is_start:
            return torch.zeros(batch, dtype=torch.long, device=given.device)
        if ids is None:
            raise ValueError("input_ids: expected some, to find where the infix stands, got None")
        tokens = [self.infix.get(names[0], -1) if names else -1 for names in by_row]
        tokens = torch.tensor(self.spread(tokens, batch), device=ids.device)
        found = ids == tokens[:, None]
        missing = (tokens >= 0) & ~found.any(1)
        if missing.any():
            row = missing.int().argmax().item()
            raise ValueError(f"input_ids: expected the token {tokens[row].item()}, behind which the infix stands, in row {row}")
        return torch.where(found.any(1), found.int().argmax(1) + 1, length)


_BATCHED = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels")


def _by_row(made: dict[int, Any], lengths: list[int]) -> Any:
    """Of what was made for each length the rows that have it: tensors (1 or batch, length, d), or (length, d), or tuples."""
    first = next(iter(made.values()))
    if isinstance(first, tuple):
        return tuple(_by_row({by: parts[i] for by, parts in made.items()}, lengths) for i in range(len(first)))
    rows = {by: part if part.dim() == 3 else part[None] for by, part in made.items()}
    return torch.cat([rows[by][min(row, rows[by].shape[0] - 1)][None] for row, by in enumerate(lengths)])
