from __future__ import annotations

import json

import pytest

from peftk.cli.data import read_documents
from peftk.cli.errors import UserError
from peftk.cli.loss import IGNORED


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def learned(tokenizer, document):
    """The text that carries loss, runs joined by '|'."""
    assert len(document.input_ids) == len(document.labels)
    runs, run = [], []
    for token, label in zip(document.input_ids, document.labels, strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            runs, run = ([*runs, run] if run else runs), []
        else:
            run.append(token)
    return "|".join(tokenizer.decode(r) for r in [*runs, run] if r)


def test_a_text_is_one_document_that_ends(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the man\nhad it — ä 日本", encoding="utf-8")
    (document,) = read_documents([path], tokenizer)
    assert learned(tokenizer, document) == "the man\nhad it — ä 日本<|im_end|>"
    assert not document.is_record


def test_a_completion_carries_the_loss_and_the_end(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "to be or", "completion": " not to be"}, "", {"prompt": "", "completion": "x"})
    first, second = read_documents([path], tokenizer)
    assert tokenizer.decode(first.input_ids) == "to be or not to be<|im_end|>"
    assert learned(tokenizer, first) == " not to be<|im_end|>"
    assert learned(tokenizer, second) == "x<|im_end|>"


def test_a_completion_is_tokenised_apart_from_its_prompt(tokenizer, tmp_path):
    """As in generation, where the prompt is all there is."""
    path = write(tmp_path / "a.jsonl", {"prompt": "th", "completion": "e"})
    (document,) = read_documents([path], tokenizer)
    assert document.input_ids[:-2] == tokenizer("th").input_ids


def test_only_the_assistants_turns_carry_loss(tokenizer, tmp_path):
    turns = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello  "},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "bye 日本\nnow"},
    ]
    (document,) = read_documents([write(tmp_path / "a.jsonl", {"messages": turns})], tokenizer)
    assert learned(tokenizer, document) == "hello  <|im_end|>|bye 日本\nnow<|im_end|>"
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(document.input_ids) == rendered


def test_a_conversation_may_open_with_the_assistant(tokenizer, tmp_path):
    turns = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "hi"}]
    (document,) = read_documents([write(tmp_path / "a.jsonl", {"messages": turns})], tokenizer)
    assert learned(tokenizer, document) == "hi<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, tmp_path, monkeypatch):
    template = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    turns = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "hi"}]
    with pytest.raises(UserError, match=r"line 1: messages\[0\]: the chat template renders this turn otherwise"):
        read_documents([write(tmp_path / "a.jsonl", {"messages": turns})], tokenizer)


def test_without_a_chat_template_messages_are_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="line 1: 'messages' needs a chat template"):
        read_documents([write(tmp_path / "a.jsonl", {"messages": [{"role": "assistant", "content": "x"}]})], tokenizer)


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a",', "line 2: expected JSON"),
        ("[1]", "line 2: expected an object with .* got list"),
        ("{}", "line 2: expected the keys .* got none"),
        ('{"text": "a"}', "line 2: expected the keys .* got 'text'"),
        ('{"prompt": "a"}', "line 2: missing key 'completion'"),
        ('{"completion": "a"}', "line 2: missing key 'prompt'"),
        ('{"prompt": 1, "completion": "a"}', "line 2: 'prompt': expected text, got int"),
        ('{"prompt": "a", "completion": ""}', "line 2: 'completion' is empty"),
        ('{"messages": "a"}', "line 2: 'messages': expected a list of turns"),
        ('{"messages": [1]}', r"line 2: messages\[0\]: expected an object, got int"),
        ('{"messages": [{"role": "user"}]}', r"line 2: messages\[0\]: missing key 'content'"),
        ('{"messages": [{"role": "user", "content": null}]}', r"line 2: messages\[0\].content: expected text, got NoneType"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: 'messages' has no turn with role 'assistant'"),
    ],
)
def test_bad_records_name_file_and_line(tokenizer, tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", GOOD, line)
    with pytest.raises(UserError, match=message) as error:
        read_documents([path], tokenizer)
    assert str(path) in str(error.value)


def test_bad_files_are_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match="--data .*none.txt: no such file"):
        read_documents([tmp_path / "none.txt"], tokenizer)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="empty.txt: the file is empty"):
        read_documents([tmp_path / "empty.txt"], tokenizer)
    (tmp_path / "latin.txt").write_bytes("früh".encode("latin-1"))
    with pytest.raises(UserError, match="latin.txt: expected UTF-8 text, got another encoding .byte 2"):
        read_documents([tmp_path / "latin.txt"], tokenizer)


def test_line_separators_inside_a_record_are_no_line_breaks(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a\u2028", "completion": "b\u0085c"}\r\n', encoding="utf-8", newline="")
    assert len(read_documents([path], tokenizer)) == 1
