"""Vectors of real words to start a prompt from (Lester et al. 2021, section 3.2: sampled vocabulary, text, class labels)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peftk.methods.prompts import evaluating


def token_ids(text: str, tokenizer: Any, tokenizer_name: str | None = None, options: dict | None = None) -> list[int]:
    """Ids of ``text``: by ``tokenizer``, a callable that returns ``input_ids`` or has ``encode``, else by transformers' of that
    name. No special tokens are added where the tokenizer can leave them out. ValueError where neither is given, or none come."""
    tokenizer = load_tokenizer(tokenizer, tokenizer_name, options)
    encode = getattr(tokenizer, "encode", None)
    made = encode(text, add_special_tokens=False) if callable(encode) else tokenizer(text)
    ids = getattr(made, "ids", made)
    ids = list(ids["input_ids"] if isinstance(ids, dict) else ids)
    if not ids:
        raise ValueError(f"tokenizer: expected tokens for {text!r}, got none")
    return ids


def following_ids(text: str, tokenizer: Any, tokenizer_name: str | None = None) -> list[int]:
    """Ids of ``text`` behind another word: byte-level and SentencePiece tokenizers keep the space before a word in its token.
    Errors as in ``token_ids``; ValueError where the tokenizer joins the two words."""
    tokenizer = load_tokenizer(tokenizer, tokenizer_name)
    before, both = token_ids("a", tokenizer), token_ids(f"a {text}", tokenizer)
    if both[: len(before)] != before or len(both) == len(before):
        raise ValueError(f"tokenizer: expected tokens of {text!r} of their own behind another word, got {both}")
    return both[len(before) :]


def load_tokenizer(tokenizer: Any, name: str | None, options: dict | None = None) -> Any:
    """``tokenizer``, or transformers' of that name. ValueError where neither is given."""
    if tokenizer is not None:
        return tokenizer
    if name is None:
        raise ValueError("tokenizer: expected one, or tokenizer_name_or_path, to make ids of a text, got None")
    from transformers import AutoTokenizer

    options = {key: value for key, value in (options or {}).items() if key != "trust_remote_code"}  # a file may ask for it
    return AutoTokenizer.from_pretrained(name, **options)


def repeated(ids: Sequence[int], n: int) -> list[int]:
    """``n`` of them: from the start again where they are too few, cut where too many."""
    return [ids[at % len(ids)] for at in range(n)]


def check_ids(name: str, ids: Sequence[int], embedding: nn.Module) -> None:
    """ValueError, naming the argument, for ids that the embedding doesn't have."""
    tokens = rows_of(embedding)
    if wrong := [token for token in ids if not 0 <= token < tokens]:
        raise ValueError(f"{name}: expected ids below {tokens}, the model's, got {wrong[0]}")


def rows_of(embedding: nn.Module) -> int:
    """How many tokens it has."""
    return getattr(embedding, "num_embeddings", embedding.weight.shape[0])


@torch.no_grad()
def embedded(embedding: nn.Module, ids: Sequence[int]) -> torch.Tensor:
    """(len(ids), d): what the embedding gives for them, with the scale that some models put on it: prompts stand behind that."""
    with evaluating(embedding):
        return embedding(torch.tensor(ids, device=embedding.weight.device)).detach()


def sampled(embedding: nn.Module, n: int, frequent: Sequence[int] | None, among: int, special: set[int]) -> list[int]:
    """``n`` ids at random of ``frequent``, or of the first ``among`` that aren't special: tokenizers are trained so that low ids
    are the frequent ones."""
    pool = list(frequent) if frequent is not None else [i for i in range(rows_of(embedding)) if i not in special][:among]
    if n <= len(pool):
        return [pool[at] for at in torch.randperm(len(pool))[:n].tolist()]
    return [pool[at] for at in torch.randint(len(pool), (n,)).tolist()]


def special_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Ids that stand for no text, by the tokenizer and the model's config."""
    config = getattr(model, "config", None)
    found = set(getattr(tokenizer, "all_special_ids", ()) or ())
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        found |= set(value if isinstance(value, list | tuple) else [value]) - {None}
    return found


def class_label_rows(embedding: nn.Module, labels: Sequence[Sequence[int]], n: int, filler: Sequence[int]) -> torch.Tensor:
    """(n, d): a label's vectors, their mean where it has several tokens; ``filler`` ids where labels are too few."""
    rows = [embedded(embedding, ids).mean(0, keepdim=True) for ids in labels[:n]]
    if len(rows) < n:
        rows.append(embedded(embedding, filler[: n - len(rows)]))
    return torch.cat(rows)
