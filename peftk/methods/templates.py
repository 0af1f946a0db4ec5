"""How a template is written, soft or hard: ``"[cls] [v]*3 {x} is a [mask] [sep]"``."""

from __future__ import annotations

import re
from typing import Any

SPECIAL = ("mask", "cls", "sep")


def split_template(template: str) -> list[tuple[str, Any]]:
    """Its pieces, in order: ("v", how many virtual tokens), ("x", None), ("special", one of SPECIAL), ("words", text)."""
    if not isinstance(template, str):
        raise TypeError(f"template: expected a text, got {template!r}")
    pieces: list[tuple[str, Any]] = []
    for word in template.split():
        if virtual_ones := re.fullmatch(r"\[v\](?:\*(\d+))?", word):
            pieces.append(("v", int(virtual_ones.group(1) or 1)))
        elif word == "{x}":
            pieces.append(("x", None))
        elif special := re.fullmatch(rf"\[({'|'.join(SPECIAL)})\]", word.lower()):
            pieces.append(("special", special.group(1)))
        elif pieces and pieces[-1][0] == "words":
            pieces[-1] = ("words", f"{pieces[-1][1]} {word}")
        else:
            pieces.append(("words", word))
    return pieces


def special_id(kind: str, tokenizer: Any) -> int:
    """The id of one of SPECIAL. ValueError where the tokenizer has none."""
    found = getattr(tokenizer, f"{kind}_token_id", None)
    if found is None:
        raise ValueError(f"template: expected a tokenizer with a {kind} token, got {type(tokenizer).__name__}")
    return found
