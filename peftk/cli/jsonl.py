"""Files of records: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftk.cli.errors import UserError


def read_text(path: Path) -> str:
    """The file's text. UserError for a file that isn't there, isn't UTF-8 or is empty."""
    if not path.is_file():
        raise UserError(f"--data {path}: no such file; expected JSONL")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--data {path}: expected UTF-8 text, got another encoding (byte {error.start}: {error.reason})"
        ) from error
    if not text.strip():
        raise UserError(f"--data {path}: the file is empty, expected a record a line")
    return text


def read_records(path: Path, kinds: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, for messages; the object) of every line that isn't blank. UserError for what is no object; ``kinds`` says
    which keys one should have."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"--data {path} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: expected JSON, got something else ({error.msg} at column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: expected JSON, got something else ({error})") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object with {kinds}, got {type(record).__name__}")
        _check_unicode(record, where)
        yield where, record


def _check_unicode(record: dict[str, Any], where: str) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not Unicode text (half a surrogate pair: {error.object[error.start]!r})") from error


def text_of(record: dict[str, Any], key: str, where: str) -> str:
    """The text under ``key``. UserError where it is missing, no text, or blank."""
    if key not in record:
        raise UserError(f"{where}: missing key {key!r}, expected one")
    if not isinstance(record[key], str):
        raise UserError(f"{where}: {key!r}: expected text, got {type(record[key]).__name__}")
    if not record[key].strip():
        raise UserError(f"{where}: {key!r} is empty, expected some text")
    return record[key]


def texts_of(record: dict[str, Any], key: str, where: str) -> list[str]:
    """The list of texts under ``key``, none of them blank. UserError otherwise."""
    if key not in record:
        raise UserError(f"{where}: missing key {key!r}, expected one")
    if not isinstance(record[key], list) or not record[key]:
        raise UserError(f"{where}: {key!r}: expected a list of texts, got {json.dumps(record[key])[:40]}")
    for i, entry in enumerate(record[key]):
        if not isinstance(entry, str) or not entry.strip():
            raise UserError(f"{where}: {key}[{i}]: expected text, got {json.dumps(entry)[:40]}")
    return record[key]
