"""Virtual tokens among a model's inputs: hooks lay out a longer batch and put trained vectors in place of embedded ids.

Decoder-only and encoder-only models are met at their own call, so that ids, masks, labels and position ids agree all the way;
encoder-decoder models at the encoder's, and where that takes no token ids (Whisper), at the decoder's inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peftk.methods.adapter import Beside
from peftk.methods.layout import NOTHING, Layout, Row, positions, real, virtual
from peftk.methods.prompts import (
    as_keywords,
    cache_of,
    encoder_of,
    has_learned_positions,
    is_causal,
    is_encoder_decoder,
    max_positions,
    parameters_of,
    token_embedding,
)

# (ids of one row, their count, columns with attention, index of the first virtual token) -> the row with virtual tokens. Its
# ``added`` says by how much a row grows.
Arrange = Callable[[list[int] | None, int, list[int], int], Row]


class InputPrompts(Beside):
    """The input-level prompts of a model: ``prompt_embeddings[name]()`` is (n, d)."""

    NAME = "input_prompts"

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.arrange: dict[str, Arrange] = {}  # of those that don't simply stand in front
        self.used: dict[str, int] = {}  # how many of a prompt's vectors stand in the input
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None  # slots and vectors for the embedding's next call
        entry, embedding, self.keys = entry_of(model)
        self.is_left = self.keys != "encoder" and is_causal(model)
        self.takes_positions = self._key("position_ids") in parameters_of(entry)
        self.limit = max_positions(model) if has_learned_positions(entry) else None
        self.pad_token_id = getattr(getattr(model, "config", None), "pad_token_id", None)
        self._handles = [
            entry.register_forward_pre_hook(self.enter, with_kwargs=True),
            embedding.register_forward_hook(self.embed),
        ]
        if self.keys == "encoder":
            decoder = model.get_decoder()
            self._handles.append(decoder.register_forward_pre_hook(self.remember, with_kwargs=True))

    def add(self, name: str, encoder: nn.Module, config: Any) -> None:
        super().add(name, encoder, config)
        self.used[name] = config.num_virtual_tokens
        arrange = config.arrangement()
        if arrange is not None:
            self.arrange[name] = arrange

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        del self.used[name]
        self.arrange.pop(name, None)

    def check_active(self, names: list[str]) -> None:
        here = [name for name in names if name in self.adapter_names()]
        placed = [name for name in here if name in self.arrange]
        if placed and len(here) > 1:
            raise ValueError(
                f"names: expected prompts that stand in front of the input, got {', '.join(here)}; {', '.join(placed)} has "
                "places of its own and can't be combined with another prompt"
            )

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the call that takes token ids."""
        self._pending = None
        by_row = self.by_row()
        if not any(by_row):
            return None
        kwargs = as_keywords(module, args, kwargs)
        if self.keys == "decoder":
            _decoder_ids(module, kwargs)
        ids, embeds = kwargs.get(self._key("input_ids")), kwargs.get(self._key("inputs_embeds"))
        given = ids if ids is not None else embeds
        if given is None:
            return None
        mask = kwargs.get(self._key("attention_mask"))
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask: expected (batch, length) beside a prompt, got {tuple(mask.shape)}; a static cache makes such "
                "masks: use a dynamic one"
            )
        cache = cache_of(kwargs)
        kwargs.pop("cache_position", None)  # of older transformers: where the model counts by itself, it counts the prompt
        if cache is not None and cache.get_seq_length() > 0:
            self._continue(by_row, kwargs, given, mask, cache.get_seq_length())
        else:
            self._start(by_row, kwargs, ids, embeds, mask)
        return (), kwargs

    def _start(
        self,
        by_row: list[tuple[str, ...]],
        kwargs: dict[str, Any],
        ids: torch.Tensor | None,
        embeds: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> None:
        given = ids if ids is not None else embeds
        batch, length = given.shape[:2]
        if ids is None and any(getattr(self.arrange.get(n), "needs_ids", False) for names in by_row for n in names):
            raise ValueError("input_ids: expected ids, to find placeholders in, got embeddings")
        is_template = self._is_template(by_row)
        if is_template and mask is None:
            mask = torch.ones(batch, length, dtype=torch.long, device=given.device)
        layout, table = self._lay_out(by_row, ids, mask, batch, length, given.device)
        if self.limit is not None and layout.length > self.limit:
            raise ValueError(
                f"num_virtual_tokens: expected at most {self.limit} positions for virtual and real tokens together, got "
                f"{layout.length}, of which {length} were given"
            )
        if ids is not None:
            self._pending = layout.slot, table
            harmless, filler = self._harmless()
            carried = layout.carry(ids, harmless, filler, fixed=layout.fixed)
            kwargs[self._key("input_ids")] = carried.masked_fill(layout.slot != NOTHING, harmless)
        else:
            kwargs[self._key("inputs_embeds")] = self._put(layout.carry(embeds, 0, 0), layout.slot, table)
        new_mask = layout.mask(mask, batch)
        if new_mask is not None:
            kwargs[self._key("attention_mask")] = new_mask
        self._carry_positions(kwargs, layout, new_mask, is_template)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = layout.carry(kwargs["token_type_ids"], 0, 0)
        labels = kwargs.get("labels")
        if labels is not None and labels.shape == given.shape[:2] and not labels.is_floating_point():
            kwargs["labels"] = layout.carry(labels, -100, -100)
        for name in ("start_positions", "end_positions"):
            if kwargs.get(name) is not None:
                kwargs[name] = layout.new_columns(kwargs[name].view(-1))

    def _continue(
        self, by_row: list[tuple[str, ...]], kwargs: dict[str, Any], given: torch.Tensor, mask: torch.Tensor | None, past: int
    ) -> None:
        """A step with a cache, which holds the prompt already."""
        batch, length = given.shape[:2]
        if any(name in self.arrange for names in by_row for name in names):
            self._continue_arranged(by_row, kwargs, given, mask, past)
            return
        lengths = self.spread([sum(self.used[name] for name in names) for names in by_row], batch)
        widest = max(lengths)
        if mask is None and len(set(lengths)) > 1:
            mask = torch.ones(batch, past + length - widest, dtype=torch.long, device=given.device)
        shift = torch.tensor(lengths, device=given.device)[:, None]
        if mask is not None:
            columns = torch.arange(widest, device=mask.device)
            mask = torch.cat([(columns >= widest - shift).to(mask.dtype).expand(batch, -1), mask], dim=1)
            kwargs[self._key("attention_mask")] = mask
        ids = kwargs.get(self._key("position_ids"))
        if ids is not None:
            kwargs[self._key("position_ids")] = ids + shift
        elif mask is not None and self.takes_positions:
            kwargs[self._key("position_ids")] = positions(mask, length)

    def _continue_arranged(
        self, by_row: list[tuple[str, ...]], kwargs: dict[str, Any], given: torch.Tensor, mask: torch.Tensor | None, past: int
    ) -> None:
        """Rows are packed to the right, so that their lengths say the mask; new tokens stand behind the layout."""
        batch, length = given.shape[:2]
        added = self.spread([sum(self._added(name) for name in names) for names in by_row], batch)
        if not any(added):
            return
        key = self._key("position_ids")
        if mask is None and len(set(added)) > 1:
            raise ValueError("attention_mask: expected one, to go on after prompts of different lengths, got None")
        if mask is None:
            if kwargs.get(key) is not None:
                kwargs[key] = kwargs[key] + added[0]
            return
        added = torch.tensor(added, device=mask.device)
        total = past + length
        start = total - (mask.sum(1) + added)
        mask = (torch.arange(total, device=mask.device) >= start[:, None]).to(mask.dtype)
        kwargs[self._key("attention_mask")] = mask
        if self.takes_positions:
            kwargs[key] = positions(mask, length)

    def _added(self, name: str) -> int:
        """By how much a row grows."""
        return getattr(self.arrange.get(name), "added", self.used[name])

    def remember(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the decoder of an encoder-decoder model: what the encoder said is longer than the mask of its inputs."""
        by_row = self.by_row()
        if not any(by_row):
            return None
        kwargs = as_keywords(module, args, kwargs)
        said, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if said is None:
            return None
        batch, length = said.shape[:2]
        if mask is None:
            if self._is_template(by_row):
                raise ValueError("attention_mask: expected one beside a template, got None")
            before = length - max(sum(self._added(name) for name in names) for names in by_row)
        else:
            before = mask.shape[1]
        if any(self._added(name) for names in by_row for name in names):
            rows = self._rows(by_row, None, mask, batch, before)
            kwargs["encoder_attention_mask"] = Layout(rows, batch, self.is_left, said.device).mask(mask, batch)
        return (), kwargs

    def embed(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """After the embedding of the ids that ``enter`` laid out."""
        if self._pending is None or self._pending[0].shape != output.shape[:-1]:
            return None
        (slot, table), self._pending = self._pending, None
        return self._put(output, slot, table)

    def _put(self, embedded: torch.Tensor, slot: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        vectors = nn.functional.embedding(slot.clamp(min=0), table).to(embedded.device, embedded.dtype)
        return torch.where((slot != NOTHING)[..., None], vectors, embedded)

    def _lay_out(
        self,
        by_row: list[tuple[str, ...]],
        ids: torch.Tensor | None,
        mask: torch.Tensor | None,
        batch: int,
        length: int,
        device: torch.device,
    ) -> tuple[Layout, torch.Tensor]:
        rows = self._rows(by_row, ids, mask, batch, length)
        table = torch.cat([self.prompt_embeddings[name]()[: self.used[name]] for name in self._first_slots(by_row)])
        return Layout(rows, batch, self.is_left, device), table

    def _first_slots(self, by_row: list[tuple[str, ...]]) -> dict[str, int]:
        """By name the index of a prompt's first vector among those of all that the batch uses."""
        first, at = {}, 0
        for name in dict.fromkeys(name for names in by_row for name in names):
            first[name], at = at, at + self.used[name]
        return first

    def _rows(
        self, by_row: list[tuple[str, ...]], ids: torch.Tensor | None, mask: torch.Tensor | None, batch: int, length: int
    ) -> list[Row]:
        """One row for all, or one each."""
        first = self._first_slots(by_row)
        if not any(name in first for name in self.arrange):
            fronts = [[slot for n in names for slot in range(first[n], first[n] + self.used[n])] for names in by_row]
            rows = [virtual(front) + real(range(length)) for front in fronts]
            return rows if len(rows) == 1 else self.spread(rows, batch)
        by_row = self.spread(by_row, batch)
        listed = None if ids is None else ids.tolist()
        kept = [list(range(length))] * batch if mask is None else [_columns(row) for row in mask.tolist()]
        rows = []
        for at, names in enumerate(by_row):
            here = None if listed is None else listed[at]
            if not names:
                rows.append(real(range(length)))
            elif names[0] not in self.arrange:
                rows.append(virtual(range(first[names[0]], first[names[0]] + self.used[names[0]])) + real(range(length)))
            else:
                try:
                    rows.append(self.arrange[names[0]](here, length, kept[at], first[names[0]]))
                except ValueError as error:
                    raise ValueError(f"input_ids: row {at}: {error}") from error
        return rows

    def _harmless(self) -> tuple[int, int]:
        """Ids to look up at virtual tokens and at padding: whatever they give is replaced or masked, but some models tell
        padding by its id."""
        pad = self.pad_token_id if self.pad_token_id is not None else 0
        return (1 if pad == 0 else 0), pad

    def _is_template(self, by_row: list[tuple[str, ...]]) -> bool:
        """Whether real tokens move against each other."""
        return any(name in self.arrange and self._added(name) for names in by_row for name in names)

    def _carry_positions(self, kwargs: dict[str, Any], layout: Layout, mask: torch.Tensor | None, is_template: bool) -> None:
        """Ids that the caller gives are moved; without, a causal model would count padding too: here only what the mask keeps."""
        key = self._key("position_ids")
        given = kwargs.get(key)
        if given is not None and not is_template:
            first = (~layout.is_padding()).long().cumsum(1) - 1
            added = ((layout.slot != NOTHING) & (layout.source == NOTHING)).sum(1, keepdim=True)
            moved = layout.carry(given.expand(layout.source.shape[0], -1), 0, 0) + added
            kwargs[key] = torch.where(layout.source != NOTHING, moved, first.clamp(min=0))
        elif self.takes_positions and self.is_left and mask is not None:
            kwargs[key] = positions(mask, layout.length)
        elif given is not None:
            raise ValueError("position_ids: expected None beside a template, which moves tokens, got ids")

    def _key(self, name: str) -> str:
        return f"decoder_{name}" if self.keys == "decoder" else name


def entry_of(model: nn.Module) -> tuple[nn.Module, nn.Module, str]:
    """(the module whose call takes token ids, their embedding, "model" | "encoder" | "decoder"). ValueError where there is
    none."""
    if not is_encoder_decoder(model):
        entry, keys = model, "model"
        if not {"input_ids", "inputs_embeds"} & set(parameters_of(model)):
            raise ValueError(f"model: expected one whose forward takes input_ids, got {type(model).__name__}")
        return entry, token_embedding(model), keys
    encoder = encoder_of(model)
    if "input_ids" in parameters_of(encoder):
        return encoder, token_embedding(encoder), "encoder"
    return model, token_embedding(model.get_decoder()), "decoder"


def _columns(mask: list[int]) -> list[int]:
    return [column for column, keep in enumerate(mask) if keep]


def _decoder_ids(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Models shift labels into decoder ids themselves; with a prompt between, that must come first."""
    config, labels = model.config, kwargs.get("labels")
    if labels is None or any(kwargs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
        return
    ids = labels.new_full(labels.shape, config.decoder_start_token_id)
    ids[:, 1:] = labels[:, :-1]
    kwargs["decoder_input_ids"] = ids.masked_fill(ids == -100, config.pad_token_id)
