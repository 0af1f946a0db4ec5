"""The corpora as JSONL for ``peftk finetune --task ...``."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftk.atomic import write_folder

# By name: the command's task, and what makes a line of a record.
KINDS: dict[str, tuple[str, Callable[[Any], list[dict[str, Any]]]]] = {
    "glosses": ("classification", lambda texts: [{"text": text, "label": label} for text, label in texts.glosses()]),
    "kinds": ("classification", lambda texts: [{"text": word, "label": kind} for word, kind in texts.kinds()]),
    "names": ("token-classification", lambda texts: [{"tokens": words, "tags": tags} for words, tags in texts.names()]),
    "verses": ("seq2seq", lambda texts: [{"source": ours, "target": theirs} for ours, theirs in texts.aligned()]),
    "definitions": (
        "seq2seq",
        lambda texts: [{"source": f"{word}, a kind of {kind}", "target": text} for word, kind, text in texts.definitions()],
    ),
}


def convert(texts: Any, name: str, folder: Path, test: int = 500, limit: int | None = None, seed: int = 0) -> dict[str, int]:
    """``train.jsonl`` and ``test.jsonl`` in a new ``folder``, shuffled by ``seed``; ``limit``: of the training records. Returns
    the counts. ValueError for a name that isn't one of KINDS, or too few records."""
    if name not in KINDS:
        raise ValueError(f"name: expected one of {', '.join(KINDS)}, got {name!r}")
    records = KINDS[name][1](texts)
    if len(records) <= test:
        raise ValueError(f"test: expected fewer than the {len(records)} records, got {test}")
    random.Random(seed).shuffle(records)
    parts = {"train": records[test:][:limit], "test": records[:test]}
    with write_folder(folder) as whole:
        for part, lines in parts.items():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (whole / f"{part}.jsonl").write_text(text, encoding="utf-8")
    return {part: len(lines) for part, lines in parts.items()}
