"""long_runs.csv: the last result of each long check, with its machine and commit; README's table of them.

python -m tests.reliability.record        writes README's table again
"""

from __future__ import annotations

import csv
import datetime
import io
from pathlib import Path

from bench.report import commit_name, machine_name, rewrite_between
from peftk.atomic import write_file

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- reliability:begin -->", "<!-- reliability:end -->"
RESULTS = Path(__file__).with_name("long_runs.csv")
COLUMNS = ("check", "what", "result", "held", "minutes", "date", "commit", "machine")


def record(check: str, what: str, result: str, held: bool, seconds: float) -> None:
    """Write a row in the place of the same check's of the same thing, and print it."""
    row = {
        "check": check, "what": what, "result": result, "held": "yes" if held else "no", "minutes": f"{seconds / 60:.1f}",
        "date": datetime.date.today().isoformat(), "commit": commit_name(), "machine": machine_name(),
    }  # fmt: skip
    rows = [*(old for old in read() if (old["check"], old["what"]) != (check, what)), row]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: (row["check"], row["what"])))
    write_file(RESULTS, text.getvalue().encode())
    rewrite_between(README, BEGIN, END, table())
    print(f"{check}, {what}: {result}: {'held' if held else 'NOT held'}")


def read() -> list[dict[str, str]]:
    """Every row."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def table() -> str:
    """The rows as README shows them."""
    lines = ["| check | what | result | held | minutes | when and where |", "|---|---|---|---|--:|---|"]
    for row in read():
        where = f"{row['date']}, {row['commit']}, {row['machine']}"
        lines.append(f"| {row['check']} | {row['what']} | {row['result']} | {row['held']} | {row['minutes']} | {where} |")
    return "\n".join(lines)


if __name__ == "__main__":
    rewrite_between(README, BEGIN, END, table())
