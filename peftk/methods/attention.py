"""transformers' attention modules: what their keys look like, and how keys and values get in front of them.

All of them hand fresh keys and values to a cache, ``cache.update(keys, values, layer_idx)``, and go on with what it returns. So
a cache of our own puts a prefix in front, with or without a real one behind it, which never holds the prefix.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from peftk.methods.prompts import CACHE_NAMES, as_keywords, encoder_of, is_encoder_decoder, is_position_table, parameters_of

# Of the only stack, or the decoder, to itself; of the encoder to itself; of the decoder to the encoder.
SELF, ENCODER, CROSS = "self", "encoder", "cross"

# Facts by name, as the families have them.
_KEY_VALUE = (("k_proj", "v_proj"), ("key", "value"), ("k", "v"))  # projections of keys and of values
_FUSED = ("c_attn", "query_key_value", "qkv_proj")  # of both, and of queries
_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_CACHE_LENGTH = ("cache_length", "past_key_values_length")  # of positional embeddings: how many tokens came before
_CROSS_PATHS = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn")


@dataclass(frozen=True)
class Attention:
    """One attention module: keys and values are (batch, heads, length, head_dim)."""

    path: str
    module: nn.Module
    kind: str  # SELF, ENCODER or CROSS
    heads: int  # of keys and values
    head_dim: int
    cache: str  # names of forward's parameters
    mask: str

    @property
    def width(self) -> int:
        """Of a token's keys."""
        return self.heads * self.head_dim


def find_attentions(model: nn.Module) -> list[Attention]:
    """In the model's order. ValueError where there is none, or none that is known."""
    encoder = set(encoder_of(model).modules()) if is_encoder_decoder(model) else set()
    found = [_facts(path, module, module in encoder) for path, module in model.named_modules()]
    found = [facts for facts in found if facts is not None]
    if not any(facts.kind == SELF for facts in found):
        named = sorted({type(module).__name__ for module in model.modules() if "Attention" in type(module).__name__})
        told = (
            f"attention that peftk doesn't know ({', '.join(named)})" if named else f"a {type(model).__name__} without attention"
        )
        raise ValueError(
            "model: expected one whose attention has projections of keys and values (k_proj and v_proj, key and value, k and v, "
            f"or one for both) and takes a cache, got {told}"
        )
    return found


def _facts(path: str, module: nn.Module, is_in_encoder: bool) -> Attention | None:
    names = parameters_of(module)
    cache = next((name for name in CACHE_NAMES if name in names), None)
    head_dim = next((getattr(module, name) for name in _HEAD_DIM if isinstance(getattr(module, name, None), int)), None)
    width = _width(module, head_dim)
    if cache is None or head_dim is None or width is None or "alibi" in names:
        return None
    is_cross = "Cross" in type(module).__name__ or any(part in _CROSS_PATHS for part in path.split("."))
    kind = CROSS if is_cross else ENCODER if is_in_encoder else SELF
    mask = "mask" if "mask" in names else "attention_mask"
    if is_cross and "encoder_attention_mask" in names:
        mask = "encoder_attention_mask"
    return Attention(path, module, kind, width // head_dim, head_dim, cache, mask)


def _width(module: nn.Module, head_dim: int | None) -> int | None:
    """Of a token's keys, and of its values: None where they differ, or nothing is known."""
    for pair in _KEY_VALUE:
        key, value = (getattr(getattr(module, name, None), "out_features", None) for name in pair)
        if key is not None and key == value:
            return key
    if any(isinstance(getattr(module, name, None), nn.Module) for name in _FUSED) and head_dim is not None:
        config = getattr(module, "config", None)
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
        return None if heads is None else heads * head_dim
    return None


def find_positions(model: nn.Module, attentions: list[Attention]) -> list[nn.Module]:
    """The modules that make positional embeddings of the stack with SELF attention; none where attention itself counts the keys
    (T5). ValueError where attention takes position ids, and what makes use of them isn't known."""
    encoder = set(encoder_of(model).modules()) if is_encoder_decoder(model) else set()
    found = []
    for path, module in model.named_modules():
        is_rotary = type(module).__name__.endswith("RotaryEmbedding") and "position_ids" in parameters_of(module)
        if (is_rotary or is_position_table(path, module)) and module not in encoder:
            found.append(module)
    takes = [a for a in attentions if a.kind == SELF and "position_ids" in parameters_of(a.module)]
    if not found and takes:
        raise ValueError(
            f"model: expected positions that peftk knows, got {type(takes[0].module).__name__}, which counts by itself"
        )
    return found


def shifted(module: nn.Module, kwargs: dict[str, Any], by: int) -> Any:
    """What a module of ``find_positions`` gives for positions ``by`` further on."""
    names = parameters_of(module)
    if kwargs.get("position_ids") is not None:
        key = "position_ids"
    else:
        key = next((name for name in _CACHE_LENGTH if name in names), names[0])
    table = module.weight.shape[0] - getattr(module, "offset", 0) if isinstance(module, nn.Embedding) else None
    length = kwargs[key].shape[-1] if isinstance(kwargs[key], torch.Tensor) else 0
    if table is not None and length + by > table:
        raise ValueError(
            f"num_virtual_tokens: expected at most {table} positions for virtual and real tokens together, got {length + by}, of "
            f"which {length} were given"
        )
    return module.forward(**{**kwargs, key: kwargs[key] + by})


class PrefixCache:
    """Stands for a layer's cache: ``update`` puts keys and values, (1 or batch, heads, n, head_dim), in front of those that the
    real cache, or none, gives. To the module it is of the real cache's class, which decides where encoders are attended to."""

    shifted = 0  # by how much the module's cache_position is further on than the real cache's

    reads = True  # False: cross attention without a cache; Whisper of transformers 4 asks whether there are keys to read

    def __init__(self, real: Any, keys: torch.Tensor, values: torch.Tensor):
        self._real, self._keys, self._values = real, keys, values

    def __bool__(self) -> bool:
        return self.reads

    @property
    def __class__(self) -> type:
        return PrefixCache if self._real is None else type(self._real)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values so far, the prefix first."""
        if self._real is not None:
            facts = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, dict)), {})
            if self.shifted and facts.get("cache_position") is not None:
                facts["cache_position"] = facts["cache_position"] - self.shifted
            keys, values = self._real.update(keys, values, *args, **kwargs)
        return _in_front(self._keys, keys), _in_front(self._values, values)

    def get_seq_length(self, *args: Any) -> Any:
        """T5 counts the keys before a query by it."""
        return self._keys.shape[2] + (0 if self._real is None else self._real.get_seq_length(*args))

    @property
    def layers(self) -> Any:
        """Those whose keys are read instead of made again."""
        return _Layers(self)

    @property
    def is_updated(self) -> dict[int, bool]:
        """By layer, whether the encoder's keys are in the cache."""
        return {} if self._real is None else self._real.is_updated

    @property
    def self_attention_cache(self) -> PrefixCache:
        """As of an EncoderDecoderCache."""
        return self._part("self_attention_cache")

    @property
    def cross_attention_cache(self) -> PrefixCache:
        """As of an EncoderDecoderCache."""
        return self._part("cross_attention_cache")

    def _part(self, name: str) -> PrefixCache:
        if self._real is None:
            return self
        part = PrefixCache(getattr(self._real, name), self._keys, self._values)
        part.shifted = self.shifted
        return part

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_real"], name)


class _Layers:
    def __init__(self, cache: PrefixCache):
        self.cache = cache

    def __getitem__(self, at: int) -> SimpleNamespace:
        layer, cache = self.cache._real.layers[at], self.cache
        return SimpleNamespace(keys=_in_front(cache._keys, layer.keys), values=_in_front(cache._values, layer.values))


def _in_front(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    prefix = prefix.to(states.device, states.dtype).expand(states.shape[0], -1, -1, -1)
    return torch.cat([prefix, states], dim=2)


def widened_mask(
    attention: Attention, kwargs: dict[str, Any], n: int, seen: torch.Tensor | None, cache: Any
) -> torch.Tensor | None:
    """The mask of a call with ``n`` keys more in front. ``seen`` (batch, queries or 1, n) says who sees them; None: all do.

    No mask means two things: where a kernel counts on itself for causality, queries and keys are no longer the same, so it must
    be said. ValueError for masks of other kinds (flex attention's).
    """
    mask, module = kwargs.get(attention.mask), attention.module
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "eager") or "eager"
    hidden = kwargs["hidden_states"]
    if mask is None:
        is_causal = kwargs.get("is_causal")
        is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        queries = hidden.shape[1]
        says = is_causal and queries > 1 and attention.kind != CROSS and implementation not in ("eager", *_FLASH)
        if seen is None and not says:
            return None
        keys = _keys_of_call(attention, kwargs, cache, queries)
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=hidden.device)
        mask = mask.tril() if says else mask
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        raise ValueError(
            f"attention_mask: expected (batch, length) or (batch, heads, queries, keys) beside a prefix, got {mask!r}"
        )
    if mask.dim() == 2:
        front = mask.new_ones(mask.shape[0], n) if seen is None else seen[:, 0].to(mask.dtype)
        return torch.cat([front, mask], dim=1)
    if seen is None:
        return nn.functional.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0.0)
    batch, queries = max(mask.shape[0], seen.shape[0]), max(mask.shape[2], seen.shape[1])
    front = seen[:, None]
    if mask.dtype != torch.bool:
        front = torch.zeros_like(front, dtype=mask.dtype).masked_fill(~front, torch.finfo(mask.dtype).min)
    mask = mask.expand(batch, -1, queries, -1)
    return torch.cat([front.expand(batch, mask.shape[1], queries, n), mask], dim=3)


_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")  # their causality counts from the last query and key


def _keys_of_call(attention: Attention, kwargs: dict[str, Any], cache: Any, queries: int) -> int:
    """How many keys a call without a mask has, the prefix aside."""
    other = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
    if attention.kind == CROSS and other is not None:
        return other.shape[1]
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is None:
        return queries
    asked, layer = queries, attention.module.layer_idx
    if (
        "cache_position" in inspect.signature(cache.get_mask_sizes).parameters
    ):  # transformers 4: where the queries stand, not how many
        asked = kwargs.get("cache_position")
        asked = torch.arange(queries) + cache.get_seq_length(layer) if asked is None else asked
    return cache.get_mask_sizes(asked, layer)[0]


class _Recorder(PrefixCache):
    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen = keys.detach(), values.detach()
        return keys, values


@contextlib.contextmanager
def recorded(attentions: list[Attention]) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Keys and values, (batch, heads, length, head_dim), by attention's index, that calls of the model made in the ``with``."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def listen(at: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        recorders[at] = _Recorder(None, none, none)
        return (), {**as_keywords(module, args, kwargs), attentions[at].cache: recorders[at]}

    recorders: dict[int, _Recorder] = {}
    none = torch.empty(1, 1, 0, 1)
    handles = [a.module.register_forward_pre_hook(partial(listen, at), with_kwargs=True) for at, a in enumerate(attentions)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        seen.update({at: recorder.seen for at, recorder in recorders.items() if hasattr(recorder, "seen")})
