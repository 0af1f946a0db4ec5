"""Cards by name, and sizes as people write them."""

from __future__ import annotations

import re

GIB = 1 << 30

# What a card has, as its maker says; the driver's own share (a few hundred MB) comes off in RESERVED_ON_GPU.
CARDS = {
    "rtx-3060": 12 * GIB,
    "t4": 16 * GIB,
    "rtx-4080": 16 * GIB,
    "rtx-3090": 24 * GIB,
    "rtx-4090": 24 * GIB,
    "l4": 24 * GIB,
    "rtx-5090": 32 * GIB,
    "v100-32gb": 32 * GIB,
    "a100-40gb": 40 * GIB,
    "rtx-a6000": 48 * GIB,
    "l40s": 48 * GIB,
    "a100-80gb": 80 * GIB,
    "h100-80gb": 80 * GIB,
    "h200": 141 * 10**9,
    "b200": 192 * 10**9,
}
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def size_of(text: str) -> int:
    """Bytes of '24GB', '512 MiB' or '1e9'. ValueError for anything else, and for nothing."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    try:
        size = int(float(found[1]) * UNITS[found[2]])
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"expected a size such as 24GB or 512MiB, got {text!r}") from None
    if size < 1:
        raise ValueError(f"expected a size above 0, got {text!r}")
    return size


def card_of(text: str) -> tuple[str, int]:
    """(name, bytes) of a name in CARDS or a size. ValueError lists the names."""
    if text.lower() in CARDS:
        return text.lower(), CARDS[text.lower()]
    try:
        return text, size_of(text)
    except ValueError as error:
        raise ValueError(f"{error}; or one of {', '.join(CARDS)}") from None
