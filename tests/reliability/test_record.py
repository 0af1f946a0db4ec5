"""README's table of long runs is the record's, and a new result takes an old one's place."""

from __future__ import annotations

from tests.reliability import record


def test_readme_shows_the_record():
    assert record.read() and f"{record.BEGIN}\n{record.table()}\n{record.END}" in record.README.read_text()


def test_a_result_replaces_the_same_checks(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{record.BEGIN}\n{record.END}\nafter\n")
    monkeypatch.setattr(record, "README", readme)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "long_runs.csv")
    record.record("soak", "9 steps", "grew", False, 60.0)
    record.record("soak", "9 steps", "as it was", True, 90.0)
    (row,) = record.read()
    assert (row["result"], row["held"], row["minutes"]) == ("as it was", "yes", "1.5") and row["commit"] and row["machine"]
    assert "| soak | 9 steps | as it was | yes | 1.5 |" in readme.read_text() and readme.read_text().endswith("after\n")
    assert "grew: NOT held" in capsys.readouterr().out
