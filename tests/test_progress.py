"""track: a bar where tqdm is there, the same items everywhere."""

from __future__ import annotations

import logging

import pytest

from peftk import progress
from peftk.progress import track


def test_a_bar(capsys):
    pytest.importorskip("tqdm")
    assert list(track(["a", "b", "c"], "doing", True)) == ["a", "b", "c"]
    shown = capsys.readouterr()
    assert "doing" in shown.err and "3/3" in shown.err and shown.out == ""


@pytest.mark.parametrize(("items", "enabled"), [(["a", "b"], False), ([], True), ([], False)])
def test_no_bar(items, enabled, capsys):
    assert track(items, "doing", enabled) is items
    assert capsys.readouterr().err == ""


def test_without_tqdm_a_line_in_the_log(monkeypatch, caplog, capsys):
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    items = ["a", "b"]
    with caplog.at_level(logging.INFO, "peftk"):
        assert track(items, "doing", True) is items
    assert [r.getMessage() for r in caplog.records] == ["doing: 2"] and capsys.readouterr().err == ""
