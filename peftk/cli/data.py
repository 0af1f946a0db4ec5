"""Text files and JSONL records as token sequences with labels.

A label is the token itself where the loss counts and IGNORED where it doesn't. Three kinds of data:
    text         one document a file; loss everywhere
    JSONL        {"prompt": ..., "completion": ...}; loss on the completion and the end-of-text token
    JSONL        {"messages": [{"role": ..., "content": ...}, ...]} through the model's chat template; loss on what the
                 assistant says, end of turn included
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftk.cli.errors import UserError
from peftk.cli.jsonl import read_records, read_text
from peftk.cli.loss import IGNORED

RECORD_SUFFIXES = (".jsonl", ".ndjson")
RECORD_KINDS = '"prompt" and "completion", or "messages"'


@dataclass(frozen=True)
class Document:
    """Tokens and labels of the same length; ``is_record`` for a JSONL line, which packing keeps whole."""

    input_ids: list[int]
    labels: list[int]
    is_record: bool


def read_documents(paths: Sequence[Path], tokenizer: Any) -> list[Document]:
    """Every document of the files, in order. UserError names the file, and for JSONL the line and the key."""
    documents: list[Document] = []
    for path in paths:
        if path.suffix.lower() in RECORD_SUFFIXES:
            documents += _records(path, tokenizer)
        else:
            documents.append(_text(path, tokenizer))
    return documents


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _start(tokenizer: Any) -> list[int]:
    """The token that a text begins with, for the tokenizers that add one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def _text(path: Path, tokenizer: Any) -> Document:
    ids = [*_start(tokenizer), *_encode(tokenizer, read_text(path)), tokenizer.eos_token_id]
    return Document(ids, list(ids), is_record=False)


def _records(path: Path, tokenizer: Any) -> list[Document]:
    documents = []
    for where, record in read_records(path, RECORD_KINDS):
        if "messages" in record:
            documents.append(_conversation(record["messages"], tokenizer, where))
        elif "prompt" in record or "completion" in record:
            documents.append(_completion(record, tokenizer, where))
        else:
            raise UserError(f"{where}: expected the keys {RECORD_KINDS}, got {', '.join(map(repr, record)) or 'none'}")
    return documents


def _completion(record: dict[str, Any], tokenizer: Any, where: str) -> Document:
    for key in ("prompt", "completion"):
        if key not in record:
            raise UserError(f"{where}: missing key {key!r}, expected one")
        if not isinstance(record[key], str):
            raise UserError(f"{where}: {key!r}: expected text, got {type(record[key]).__name__}")
    if not record["completion"]:
        raise UserError(f"{where}: 'completion' is empty, expected what the model is to answer")
    prompt = _start(tokenizer) + _encode(tokenizer, record["prompt"])
    completion = _encode(tokenizer, record["completion"]) + [tokenizer.eos_token_id]
    return Document(prompt + completion, [IGNORED] * len(prompt) + completion, is_record=True)


def _conversation(messages: Any, tokenizer: Any, where: str) -> Document:
    _check_messages(messages, where)
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: 'messages' needs a chat template, and the model's tokenizer has none")
    if not tokenizer.is_fast:
        raise UserError(f"{where}: 'messages' needs a tokenizer that tells each token's place in the text (a tokenizer.json)")
    text, spans = assistant_spans(messages, tokenizer, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = [IGNORED] * len(encoded.input_ids)
    for i, (start, stop) in enumerate(encoded.offset_mapping):
        if any(begin <= start and stop <= end and start < stop for begin, end in spans):
            labels[i] = encoded.input_ids[i]
    if all(label == IGNORED for label in labels):
        raise UserError(
            f"{where}: no token of the assistant's turns is left to learn from: raise --seq-len, or shorten what comes before"
        )
    return Document(encoded.input_ids, labels, is_record=True)


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages': expected a list of turns, got {json.dumps(messages)[:40]}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"{where}: messages[{i}]: expected an object, got {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise UserError(f"{where}: messages[{i}]: missing key {key!r}, expected one")
            if not isinstance(message[key], str):
                raise UserError(f"{where}: messages[{i}].{key}: expected text, got {type(message[key]).__name__}")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: 'messages' has no turn with role 'assistant', expected one to learn from")


def assistant_spans(messages: list[dict[str, str]], tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character spans that the assistant writes: from the end of the generation prompt to
    the end of the turn. UserError where the template rewrites earlier turns, so that a turn can't be found in the whole."""
    whole = _render(tokenizer, messages, where, prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], where, prompt=True) if i else _opening(tokenizer, messages, where)
        after = _render(tokenizer, messages[: i + 1], where, prompt=False)
        if before is None or not (after.startswith(before) and whole.startswith(after)):
            raise UserError(
                f"{where}: messages[{i}]: the chat template renders this turn otherwise inside the conversation than at its"
                " end, so the assistant's words can't be told from the rest: use prompt and completion"
            )
        end = len(after)
        trimmed = len(after.rstrip())
        if after[:trimmed].endswith(tuple(tokenizer.all_special_tokens)):
            end = trimmed  # the template's line break after the end-of-turn token is nobody's words
        spans.append((len(before), end))
    return whole, spans


def _opening(tokenizer: Any, messages: list[dict[str, str]], where: str) -> str | None:
    """What stands before an assistant's turn that opens the conversation: all up to its content; None where the template
    changes the content."""
    first = _render(tokenizer, messages[:1], where, prompt=False)
    start = first.rfind(messages[0]["content"].strip())
    return None if start < 0 else first[:start]


def _render(tokenizer: Any, messages: list[dict[str, str]], where: str, prompt: bool) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise UserError(f"{where}: the chat template refuses the conversation: {error}") from error
